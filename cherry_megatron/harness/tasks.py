"""The harness' tasks with their data from a local folder; nothing is asked of the network.

A task names its data as a hub does, `HAERAE-HUB/KMMLU` and `Accounting`: a path in the folder of --task-dir.
"""

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.api.registry import metric_registry
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from cherry_megatron.errors import CherryError

SHIPPED = Path(lm_eval.__file__).parent / "tasks"
# Ending of a file -> the builder of `datasets` that reads it; the first there is is taken.
READERS = {"jsonl": "json", "json": "json", "parquet": "parquet", "csv": "csv"}
SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")
type Loaded = dict[str, Any]  #: what TaskManager.load gives: tasks, groups, group_map


def load_tasks(names: Sequence[str], folder: Path, fewshot: int | None, cache: Path) -> Loaded:
    """Tasks, ready to be put to a model.

    Args:
        names: of tasks, groups or tags, from the YAML files of `folder`, or else from those that the harness ships.
        folder: of --task-dir.
        fewshot: examples before each question; None for what a task says, or none. As in the harness, a task that
            says 0 stays at it.
        cache: a folder for what `datasets` makes of the data.

    Raises:
        CherryError: if a task is unknown, its data are not there or unreadable, or there are too few examples.
    """
    if not folder.is_dir():
        raise CherryError(f"--task-dir {folder} is no folder; name the one with the tasks' YAML files and data")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    manager = _manager(names, folder, cache)
    try:
        loaded: Loaded = manager.load(list(names))
    except CherryError:
        raise
    except Exception as error:
        raise CherryError(
            f"--tasks {','.join(names)}: the harness cannot load them: {_first_line(error)}"
        ) from None
    for name, task in loaded["tasks"].items():
        _give_examples(name, task, fewshot)
    return loaded


def _manager(names: Sequence[str], folder: Path, cache: Path) -> TaskManager:
    """One that knows all names. Reading every file that the harness ships takes ten seconds; mostly a few do."""
    near = sorted({SHIPPED / name.split("_")[0] for name in names if (SHIPPED / name.split("_")[0]).is_dir()})
    for shipped in (near, [SHIPPED]):
        manager = LocalTasks(folder, shipped, cache)
        unknown = [name for name in names if name not in manager.task_index]
        if not unknown:
            return manager
    raise CherryError(
        f"--tasks: {unknown[0]} is neither in {folder} nor among the harness' own tasks; "
        f"{_instead(unknown[0], manager, folder)}"
    )


def _instead(unknown: str, manager: TaskManager, folder: Path) -> str:
    """What may be meant by a name, else the folder's own tasks; the harness' are thousands."""
    if near := difflib.get_close_matches(unknown, manager.all_tasks, n=3):
        return f"did you mean {', '.join(map(repr, near))}? `lm-eval ls tasks` lists the harness' own"
    files = {name: entry.yaml_path for name, entry in manager.task_index.items() if entry.yaml_path}
    own = sorted(name for name, file in files.items() if folder in file.parents)
    return f"{folder} has {', '.join(own) or 'none'}, and `lm-eval ls tasks` lists the harness' own"


def _give_examples(name: str, task: Any, fewshot: int | None) -> None:
    stated = task.get_config("num_fewshot")
    if fewshot is not None and stated != 0:
        task.set_config(key="num_fewshot", value=fewshot)
        there = len(task.fewshot_docs() or [])
        # Where examples come from the questions themselves, a question is no example of its own.
        usable = there - (task.config.fewshot_split in (None, task.config.test_split))
        if fewshot > usable:
            raise CherryError(f"--fewshot {fewshot}: the task {name} has {there} examples; use fewer")
    elif stated is None:
        task.set_config(key="num_fewshot", value=0)


class LocalTasks(TaskManager):
    """Knows the tasks of a folder, and of those that the harness ships; their data are the folder's.

    Args:
        folder: of --task-dir, which goes before what is shipped.
        shipped: folders of the harness.
        cache: for `datasets`.
    """

    def __init__(self, folder: Path, shipped: Sequence[Path], cache: Path) -> None:
        super().__init__(include_path=[*shipped, folder], include_defaults=False)
        self._factory = _LocalFactory(folder, cache)


class _LocalFactory(TaskFactory):
    def __init__(self, folder: Path, cache: Path) -> None:
        super().__init__()
        self._folder, self._cache = folder, cache

    def _build_task(self, entry: Any, overrides: Any) -> Any:
        name = (overrides or {}).get("task", entry.name)
        try:
            return super()._build_task(entry, overrides)
        except CherryError:
            raise
        except Exception as error:
            raise CherryError(f"the task {name} cannot be read: {_first_line(error)}") from None

    def _load_full_config(self, entry: Any, overrides: Any = None) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        for metric in config.get("metric_list") or []:
            if metric.get("metric") in metric_registry:
                metric.pop("hf_evaluate", None)  # which would fetch it from the hub
        if isinstance(config.get("dataset_path"), str) and not config.get("custom_dataset"):
            config |= local_data(config, entry.yaml_path, self._folder)
            config["dataset_kwargs"]["cache_dir"] = str(self._cache)
        return config


def local_data(task: dict[str, Any], written_in: Path | None, folder: Path) -> dict[str, Any]:
    """Where the data of a task lie, as the keys of its configuration that say so.

    Args:
        task: its configuration, with `dataset_path`.
        written_in: its YAML file.
        folder: of --task-dir.

    Raises:
        CherryError: if they are not there, with where to put them.
    """
    path, name = task["dataset_path"], task.get("dataset_name")
    further = {key: value for key, value in (task.get("dataset_kwargs") or {}).items() if key != "data_files"}
    further.pop("trust_remote_code", None)
    files = (task.get("dataset_kwargs") or {}).get("data_files")
    if path in READERS.values() and files is not None:
        found = _own_files(task, files, written_in or folder / "task.yaml")
        return {"dataset_path": path, "dataset_kwargs": {**further, "data_files": found}}
    whole = folder / path
    beside = whole / name if name else whole
    splits = list(dict.fromkeys(task[key] for key in SPLITS if task.get(key)))
    for ending, reader in READERS.items():
        files = {split: beside / f"{split}.{ending}" for split in splits}
        if files and all(file.is_file() for file in files.values()):
            named = {split: str(file) for split, file in files.items()}
            return {
                "dataset_path": reader,
                "dataset_name": None,
                "dataset_kwargs": {**further, "data_files": named},
            }
    # A copy of a data set's repository says in its README.md what its files are.
    if (whole / "README.md").is_file():
        return {"dataset_path": str(whole), "dataset_kwargs": further}
    wanted = ", ".join(f"{split}.jsonl" for split in splits)
    raise CherryError(
        f"the data of the task {task.get('task')} are not in {folder}: put {wanted} (or .parquet, .csv) of "
        f"{path}{f', {name},' if name else ''} into {beside}, or a copy of the data set with its README.md into "
        f"{whole}"
    )


def _own_files(task: dict[str, Any], files: Any, written_in: Path) -> Any:
    """The same files, by their paths beside the YAML file that names them."""
    if isinstance(files, dict):
        return {split: _own_files(task, of_split, written_in) for split, of_split in files.items()}
    if isinstance(files, list):
        return [_own_files(task, file, written_in) for file in files]
    path = written_in.parent / str(files)
    if not path.is_file():
        raise CherryError(f"the data of the task {task.get('task')} are not there: {written_in} names {path}")
    return str(path)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
