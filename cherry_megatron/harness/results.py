"""What an evaluation on tasks leaves: a folder with results.json and samples.jsonl, whole or not there.

RUN/tasks/20261130T120000-loops-8/results.json    what was asked of what, and the scores
                                  samples.jsonl   one line an item: question, answer, metrics
"""

import datetime
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cherry_megatron.errors import CherryError
from cherry_megatron.files import new_folder, read_lines, sync_folder

RESULTS, SAMPLES, FOLDER = "results.json", "samples.jsonl", "tasks"
_LINE = ("task", "item", "filter", "doc_hash", "prompt", "target", "answers", "metrics")  # what comparing needs
# Of the harness' results what is kept.
_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
type Harness = dict[str, Any]  #: what lm_eval.evaluate gives


@dataclass(frozen=True)
class Evaluated:
    """An evaluation that was kept.

    Attributes:
        folder: of its files.
        results: of results.json.
    """

    folder: Path
    results: dict[str, Any]

    @property
    def named(self) -> str:
        """In words: which model, and how it was asked."""
        model = self.results["model"]
        said = [str(self.folder), *(f"{key} {model[key]}" for key in ("iteration", "loops") if model.get(key))]
        shots = self.results["asked"]["fewshot"]
        return ", ".join([*said, *([] if shots is None else [f"{shots} examples"])])

    def samples(self) -> Iterator[dict[str, Any]]:
        """One item after the other.

        Raises:
            CherryError: if one is not what `write` writes.
        """
        for number, line in enumerate(read_lines(self.folder / SAMPLES), start=1):
            if not isinstance(line, dict) or not line.keys() >= set(_LINE):
                raise CherryError(f"{self.folder / SAMPLES}: line {number} is no item of a task; evaluate again")
            yield line


def write(home: Path, model: dict[str, Any], asked: dict[str, Any], found: Harness) -> Path:
    """Keep an evaluation under a name that tells when it was made.

    Args:
        home: the run's folder, or the model's.
        model: what was evaluated.
        asked: tasks, limit, fewshot.
        found: from the harness.

    Returns:
        The new folder.

    Raises:
        CherryError: if it cannot be written.
    """
    now = datetime.datetime.now(datetime.UTC)
    loops = f"-loops-{model['loops']}" if "loops" in model else ""
    target = home / FOLDER / f"{now:%Y%m%dT%H%M%S}{loops}"
    kept = {key: found[key] for key in _KEPT if key in found}
    made = {"made": now.isoformat(timespec="seconds"), "model": model, "asked": asked, **kept}
    with new_folder(target, 0) as folder:
        (folder / RESULTS).write_text(_json(made, indent=1) + "\n", encoding="utf-8")
        with (folder / SAMPLES).open("w", encoding="utf-8") as file:
            file.writelines(_json(line) + "\n" for line in _lines(found["samples"]))
        sync_folder(folder)
        folder.rename(target)
        sync_folder(target.parent)
    return target


def read(path: Path) -> Evaluated:
    """An evaluation: its own folder, or the newest of a run's folder.

    Raises:
        CherryError: if there is none.
    """
    folders = [path] if (path / RESULTS).is_file() else sorted(path.glob(f"{FOLDER}/*/{RESULTS}"))
    if not folders:
        raise CherryError(f"{path} holds no evaluation on tasks; make one with `cherry evaluate --tasks`")
    folder = path if folders == [path] else folders[-1].parent
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        if not {"model", "asked", "results"} <= results.keys() or "fewshot" not in results["asked"]:
            raise ValueError
    except (OSError, ValueError, AttributeError, TypeError):
        raise CherryError(f"{folder / RESULTS} is no record of an evaluation; make it anew") from None
    if not (folder / SAMPLES).is_file():
        raise CherryError(f"{folder} has no {SAMPLES}; evaluate again")
    return Evaluated(folder, results)


def table(found: Harness) -> str:
    """The scores as the harness prints them, groups after tasks."""
    from lm_eval.utils import make_table

    tables = [make_table(found)]
    if found.get("groups"):
        tables.append(make_table(found, "groups"))
    return "\n".join(tables).strip()


def _lines(samples: dict[str, list[dict[str, Any]]]) -> Iterable[dict[str, Any]]:
    for task, items in samples.items():
        for item in items:
            given = item["arguments"]
            yield {
                "task": task,
                "item": item["doc_id"],
                "filter": item["filter"],
                "doc_hash": item["doc_hash"],
                "doc": item["doc"],
                "prompt": given[0][0],
                "asked": [further for _, *further in given],
                "target": item["target"],
                "answers": item["filtered_resps"],
                "metrics": {name: item[name] for name in item["metrics"]},
            }


def _json(value: Any, indent: int | None = None) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, ensure_ascii=False, indent=indent, default=handle_non_serializable)
