"""What is asked of a model, whichever form it has: tasks loaded, put to it by the harness, results kept."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from cherry_megatron.errors import CherryError
from cherry_megatron.harness import results
from cherry_megatron.harness.tasks import Loaded, load_tasks
from cherry_megatron.versions import git_state, installed_version, installed_versions

BOOTSTRAPS = 1000  # of the standard error of a score that is no mean
EXAMPLES_SEED = 1234  # the harness' own default, so that prompts are those of its command


@dataclass(frozen=True)
class Asked:
    """What to ask.

    Attributes:
        tasks: their names.
        task_dir: the folder with tasks and data.
        limit: the first so many items of each alone.
        fewshot: examples before each question; None for what a task says.
    """

    tasks: tuple[str, ...]
    task_dir: Path
    limit: int | None = None
    fewshot: int | None = None

    def __post_init__(self) -> None:
        if not self.tasks or not all(self.tasks):
            raise CherryError("--tasks names no task, or an empty one; write e.g. kmmlu,kobest")
        if self.limit is not None and self.limit < 1:
            raise CherryError(f"--limit {self.limit} must be a positive number")
        if self.fewshot is not None and self.fewshot < 0:
            raise CherryError(f"--fewshot {self.fewshot} must not be negative")


@contextlib.contextmanager
def loaded_tasks(asked: Asked) -> Iterator[Loaded]:
    """Tasks, while a temporary folder holds what `datasets` makes of their data."""
    with tempfile.TemporaryDirectory(prefix="cherry-tasks-") as cache:
        yield load_tasks(asked.tasks, asked.task_dir, asked.fewshot, Path(cache))


def put(lm: LM, tasks: Loaded, asked: Asked, first: bool, log: TextIO) -> tuple[Any, float]:
    """The harness' results, and how many seconds it took; its own bars go to a log."""
    started = time.perf_counter()
    for task in tasks[
        "tasks"
    ].values():  # anew each time: a second model, or number of loops, gets the same prompts
        task.set_fewshot_seed(seed=EXAMPLES_SEED)
    os.environ["DISABLE_MULTIPROC"] = "1"  # or the harness would fork a process that talks to others
    with contextlib.redirect_stderr(log):
        found = evaluate(lm, tasks, limit=asked.limit, bootstrap_iters=BOOTSTRAPS if first else 0)
    return found, round(time.perf_counter() - started, 1)


def keep(home: Path, model: dict[str, Any], asked: Asked, found: Any, say: Callable[[str], object]) -> Path:
    """Print the scores, and write them into a new folder, which is returned."""
    versions = installed_versions() | {name: installed_version(name) for name in ("lm-eval", "datasets")}
    said = {**asdict(asked), "task_dir": str(asked.task_dir)}
    written = results.write(home, {**model, "versions": versions, "git": git_state()}, said, found)
    say(results.table(found))
    say(f"kept in {written}")
    return written
