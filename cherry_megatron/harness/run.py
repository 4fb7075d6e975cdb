"""`cherry evaluate --tasks`: the harness' tasks put to a run's newest checkpoint."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cherry_megatron.config import Config
from cherry_megatron.data.tokenizer import fingerprint
from cherry_megatron.errors import CherryError
from cherry_megatron.evaluate import with_loops
from cherry_megatron.harness.asking import Asked, keep, loaded_tasks, put
from cherry_megatron.harness.model import CherryLM, readable
from cherry_megatron.harness.tasks import Loaded
from cherry_megatron.inference.prompts import Prompts
from cherry_megatron.monitor.progress import Progress
from cherry_megatron.platform.machine import Machine
from cherry_megatron.pretrain import load_only, pretrain
from cherry_megatron.runs import checkpoint_to_load


def evaluate_run(
    config: Config, machine: Machine, asked: Asked, loops: list[int] | None, show_all: bool = False
) -> list[Path]:
    """Put tasks to a run's newest checkpoint; print the scores, and keep them in the run's folder.

    Args:
        config: the run's configuration.
        machine: from `prepare()`.
        asked: tasks.
        loops: numbers of loops, one evaluation each; more than the trained number is allowed.
        show_all: show Megatron's own output too.

    Returns:
        The folders that were written; none on other ranks than the first.

    Raises:
        CherryError: if there is no checkpoint, it cannot be asked, or a task or its data are not there.
    """
    counts = loops or [config.recurrence.loops]
    if min(counts) < 1:
        raise CherryError(f"--loops {min(counts)} must be a positive number")
    checkpoint = checkpoint_to_load(config)
    if checkpoint is None:
        raise CherryError(
            f"the run {config.run} has no checkpoint to evaluate; train it first, or set megatron.load"
        )
    texts = readable(config)
    with loaded_tasks(asked) as tasks:
        opened = replace(with_loops(config, max(counts)), generation=None)
        make = partial(TaskEvaluation, tasks, asked, counts, checkpoint, texts)
        evaluation: TaskEvaluation = pretrain(opened, machine, load_only(opened), show_all, make)
    return evaluation.written


class TaskEvaluation:
    """Called with the model in evaluation mode.

    Attributes:
        written: folders of results, on the first rank.

    Args:
        tasks: loaded.
        asked, loops, checkpoint: as in `evaluate_run`.
        texts: has the tokenizer.
        Others: from `pretrain`.
    """

    def __init__(
        self,
        tasks: Loaded,
        asked: Asked,
        loops: list[int],
        checkpoint: Path,
        texts: Prompts,
        config: Config,
        progress: Progress,
        _run_micro_batch: Callable[..., Any],
    ) -> None:
        self._tasks, self._asked, self._loops = tasks, asked, loops
        self._checkpoint, self._texts, self._config, self._say = checkpoint, texts, config, progress.say
        self.written: list[Path] = []

    def __call__(self, model: list[torch.nn.Module]) -> None:
        """Every rank calls it."""
        first = torch.distributed.get_rank() == 0
        for loops in self._loops:
            terminal = sys.stderr if first and sys.stderr.isatty() else None
            lm = CherryLM(model, self._texts, loops, terminal)
            found, seconds = put(lm, self._tasks, self._asked, first, sys.stdout)
            if first:
                model_ = {**self._described(loops), "cut": lm.cut, "seconds": seconds}
                self.written.append(keep(self._config.run, model_, self._asked, found, self._say))
                if lm.cut:
                    self._say(f"of {lm.cut} requests the beginning was left out: longer than megatron.seq-length")

    def _described(self, loops: int) -> dict[str, Any]:
        return {
            "checkpoint": str(self._checkpoint),
            "iteration": int(self._checkpoint.name.removeprefix("iter_")),
            "loops": loops,
            "config": str(self._config.source),
            "config_hash": self._config.hash(),
            "tokenizer": fingerprint(Path(self._config.value("tokenizer-model"))),
        }
