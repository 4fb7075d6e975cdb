"""What a report is made from: folders of runs, and records of experiments."""

import itertools
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cherry_megatron.errors import CherryError, naming
from cherry_megatron.experiments.records import RECORDS, Record, read_records
from cherry_megatron.experiments.report import Row, runs_of, trained_alike
from cherry_megatron.files import read_lines
from cherry_megatron.jobs.attempts import ATTEMPTS
from cherry_megatron.monitor.alarms import read_alarms
from cherry_megatron.runs import read_steps
from cherry_megatron.sgt.pairs import Pair, read_run
from cherry_megatron.sgt.report import Compared, compare
from cherry_megatron.storage.lineage import chain, read_lineage
from cherry_megatron.storage.tracker import newest, saved_folder

# What a surgery writes of itself that its trainings are told apart by.
_OPTIONS = ("method", "align", "groups")
Facts = dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """What a run's folder has besides its record.

    Attributes:
        name: as the report calls it.
        steps, alarms, starts, attempts, generations: the lines of its files.
        lineage: of its newest checkpoint, or of the one that it starts from; None if neither tells.
        text: what its held-out losses are of: runs that differ in it do not compare.
    """

    name: str
    steps: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    attempts: list[dict[str, Any]]
    generations: list[dict[str, Any]]
    lineage: dict[str, Any] | None
    text: str


@dataclass(frozen=True)
class Source:
    """Trainings that were meant to be compared: those of an experiment, or the runs that a report was given.

    Attributes:
        name: of it.
        records: of all stages, by task; a run counts as a stage with a seed.
        rows: the trainings, over seeds.
        facts: of each row, by its name: what it starts from and how it is trained; see `claims.py`. Its `ancestors`
            are other rows.
        compared: what its selective trainings recover.
        folders: of runs, by task.
    """

    name: str
    records: dict[str, Record]
    rows: list[Row]
    facts: dict[str, Facts]
    compared: Compared
    folders: dict[str, Folder] = field(default_factory=dict)

    def pairs(self, row: Row) -> list[Pair]:
        """The selective trainings of a row with their full ones; none if one has none."""
        known = {pair.run.name: pair for found in self.compared.rows for pair in found.pairs}
        found = [known.get(record.get("run", task_of(record))) for record in row.records]
        pairs = [pair for pair in found if pair is not None]
        return pairs if len(pairs) == len(found) else []


def task_of(record: Record) -> str:
    """The name of a stage with a seed."""
    return f"{record['stage']}/seed-{record['seed']}"


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """Read what a report is made from.

    Args:
        paths: folders of runs, records of experiments (`records.jsonl`), folders of experiments; in any order.

    Raises:
        CherryError: if one is none of these, or nothing has trained there.
    """
    runs, experiments = [], []
    for path in dict.fromkeys(paths):
        if path.is_dir() and (path / RECORDS).is_file():
            experiments.append(path / RECORDS)
        elif path.is_dir():
            runs.append(path)
        elif path.is_file():
            experiments.append(path)
        else:
            raise CherryError(f"there is no {path}; name the folder of a run, or records.jsonl of an experiment")
    experiments = list({path.resolve(): path for path in experiments}.values())  # by its folder and by its file
    found = [_experiment(path, name) for path, name in zip(experiments, _names(experiments), strict=True)]
    return [*found, *([_runs(runs)] if runs else [])]


def _names(paths: Sequence[Path]) -> list[str]:
    """Of records what a report calls them: their folders, with as much before and behind as tells them apart."""
    names = [path.absolute().parent.name for path in paths]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath([path.absolute().parent.parent for path in paths])
    places = [path.absolute().relative_to(shared) for path in paths]
    return [str(place.parent if place.name == RECORDS else place.with_suffix("")) for place in places]


def _experiment(path: Path, name: str) -> Source:
    records = read_records(path)
    stages: dict[str, list[Record]] = {}
    for record in records.values():
        if record["verb"] == "pretrain" and record["finished"]:
            stages.setdefault(record["stage"], []).append(record)
    if not stages:
        raise CherryError(f"{path} has no finished training; let the experiment go on")
    rows = [Row(name, found[0].get("label", name), found) for name, found in stages.items()]
    rows = trained_alike(rows, path)
    facts = {row.name: _facts_of_record(row, records) for row in rows}
    return Source(name, records, rows, facts, compare(runs_of(rows)))


def _facts_of_record(row: Row, records: dict[str, Record]) -> Facts:
    """What a record's command says; its base configuration is not in it."""
    record = row.records[0]
    said = keys_of(record)
    parent = records.get(said.get("megatron.load", ""))
    start: Facts = {"start": "none" if "megatron.load" not in said else "unknown"}
    if parent is not None:
        start = {"start": parent["verb"], **{key: parent.get("options", {}).get(key) for key in _OPTIONS}}
    return {
        **start,
        **_supervision(record.get("sgt")),
        "parameters": row.parameters,
        "text": None,
        "ancestors": {records[task]["stage"] for task in before(record, records)},
        "looped": row.loops > 1,
        "distilled": "distillation.load" in said,
        "shuffle": said.get("data.shuffle", "none"),
        "experts": len(row.experts(row.steps)) or int(said.get("megatron.num-experts", 0)),
    }


def needs(record: Record, records: dict[str, Record]) -> list[str]:
    """The tasks that a recorded command names, without its own."""
    words = [word.split("=")[-1] for word in words_of(record)]
    return [task for task in dict.fromkeys(words) if task in records and task != task_of(record)]


def before(record: Record, records: dict[str, Record]) -> set[str]:
    """The tasks that a recorded one comes from or learns from, however far back."""
    found: set[str] = set()
    left = needs(record, records)
    while left:
        if (task := left.pop()) not in found:
            found.add(task)
            left += needs(records[task], records)
    return found


def words_of(record: Record) -> list[str]:
    """A recorded command; none if it cannot be read."""
    try:
        return shlex.split(record.get("command", ""))
    except ValueError:
        return []


def keys_of(record: Record) -> dict[str, str]:
    """The keys that a recorded command sets, and its flags of the form --flag=value."""
    words = words_of(record)
    keys = [word for before, word in itertools.pairwise(words) if before == "--set"]
    keys += [word.removeprefix("--") for word in words if re.match(r"--[\w-]+=", word)]
    return dict(key.split("=", 1) for key in keys if "=" in key)


def _supervision(sgt: dict[str, Any] | None) -> Facts:
    if sgt is None:
        return {"marks": None, "alpha": None}
    return {"marks": sgt["marks"] or "top loss online", "alpha": sgt["alpha"]}


def _runs(folders: Sequence[Path]) -> Source:
    shared = Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    known = {str(folder.absolute().relative_to(shared)): folder for folder in folders}
    records: dict[str, Record] = {}
    kept: dict[str, Folder] = {}
    facts: dict[str, Facts] = {}
    rows: dict[tuple[Any, ...], list[Record]] = {}
    selective = []
    for name, folder in known.items():
        record, kept[name], of_it, alike = _run(name, folder)
        records[name] = record
        if record["evaluations"]:
            selective.append(read_run(folder))
            alike = (selective[-1].row, *alike)
        rows.setdefault(alike, []).append(record)
        facts[record["stage"]] = of_it
    named = [Row(found[0]["stage"], found[0]["label"], found) for found in rows.values()]
    rows_of = {record["stage"]: row.name for row in named for record in row.records}
    places = {str(folder.resolve()): rows_of[name] for name, folder in known.items()}
    for name, of_it in facts.items():
        of_it["ancestors"] = {places[place] for place in _places(kept[name].lineage) if place in places}
    title = next(iter(known)) if len(known) == 1 else f"{len(known)} runs"
    return Source(title, records, named, facts, compare(selective), kept)


def _places(lineage: dict[str, Any] | None) -> Iterator[str]:
    """The folders of runs that a checkpoint comes from."""
    for _, entry in chain(lineage) if lineage else ():
        path = Path(entry.get("path", ""))
        yield str(path.parents[1] if path.parent.name == "checkpoints" else path)


def _run(name: str, folder: Path) -> tuple[Record, Folder, Facts, tuple[Any, ...]]:
    """A run's record, its folder, what tells it apart, and what its seeds have in common."""
    for file, what in (
        ("config.yaml", "so it is no run's folder; name the `run` of a configuration, or records.jsonl"),
        ("starts.jsonl", "so no training has begun there"),
        ("steps.jsonl", "so no training has made a step there"),
    ):
        if not (folder / file).is_file():
            raise CherryError(f"{folder} has no {file}, {what}")
    from cherry_megatron.config import load  # with Megatron's parser, which records do without
    from cherry_megatron.experiments.records import measured, wanted_steps

    config = load(folder / "config.yaml")
    try:
        kept = _folder(name, folder, config)
        if not kept.steps:
            raise CherryError(f"{folder}/steps.jsonl has no step; let the training go on")
        done, wanted = int(kept.steps[-1]["iteration"]), wanted_steps(config)
        start = kept.starts[-1]
        label = re.sub(r"/seed-\d+$", "", name)
        record: Record = {
            "stage": name, "label": label, "seed": config.value("seed"), "verb": "pretrain", "run": str(folder),
            "finished": done >= wanted, "command": start["command"], "commit": start["git"].get("commit"),
            "modified": start["git"].get("modified", False), "device": start.get("device", "an unknown device"),
            "devices": start["world_size"], "seconds": sum(step["seconds"] for step in kept.steps),
            **measured(folder, config, done),
        }  # fmt: skip
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise CherryError(
            f"{folder} does not hold what a run writes ({type(error).__name__}: {error}); name folders of "
            "`cherry pretrain`"
        ) from None
    experts = config.moee.experts if config.moee else 0
    facts = {
        **_start(kept.lineage, "load" in config.megatron),
        **_supervision(record.get("sgt")),
        "parameters": record["parameters"],
        "text": kept.text,
        "ancestors": set(),
        "looped": config.recurrence.loops > 1,
        "distilled": config.distillation is not None,
        "shuffle": config.data.shuffle,
        "experts": experts or (config.shape.experts if config.has_experts else 0),
    }
    same = ("parameters", "flops_per_token", "tokens_per_step", "steps", "loops")
    return record, kept, facts, (label if not record["evaluations"] else "", *(record[key] for key in same))


def _folder(name: str, folder: Path, config: Any) -> Folder:
    def lines(file: str) -> list[dict[str, Any]]:
        return list(read_lines(folder / file)) if (folder / file).exists() else []

    text = ("data-path", "split", "tokenizer-model", "seq-length")
    return Folder(
        name,
        read_steps(folder),
        read_alarms(folder),
        lines("starts.jsonl"),
        lines(ATTEMPTS),
        lines("generations.jsonl"),
        _lineage(folder, config),
        str(
            [*(config.value(flag) for flag in text), config.data.shuffle, config.prefix, config.evaluation.batches]
        ),
    )


def _lineage(folder: Path, config: Any) -> dict[str, Any] | None:
    """Of the run's newest checkpoint; of a run without one a record that has what it starts from as its parent."""
    with naming(folder):
        if (saved := saved_folder(folder / "checkpoints")) is not None:
            return read_lineage(newest(saved))
        named = config.megatron.get("load")
        saved = None if named is None else saved_folder(Path(str(named)))
        before = None if saved is None else read_lineage(newest(saved))
    if before is None:
        return None
    return {"operation": "pretrain, not saved yet", "identity": "", "parents": [{**before, "path": str(named)}]}


def _start(lineage: dict[str, Any] | None, loads: bool) -> Facts:
    if lineage is None:
        return {"start": "unknown" if loads else "none"}
    parents = [entry for entry in lineage["parents"] if entry.get("role") != "teacher"]
    if not parents:
        return {"start": "none"}
    options = parents[0].get("options", {})
    return {"start": parents[0]["operation"], **{key: options.get(key) for key in _OPTIONS}}
