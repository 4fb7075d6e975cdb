"""An experiment's file -> its tasks, one for each stage and seed::

    about: Does the recurrent model recover?   # the question asked
    config: ../tiny_recover.yaml               # base configuration, relative to this file
    seeds: [1, 2, 3]
    stages:                                    # the first that is ready runs first
      parent:
        verb: pretrain
        set: {recurrence.pattern: "(*-)x48"}   # as --set
      averaged:
        verb: compress-depth
        args: {load: "{parent}"}               # flags of the verb
      recovered:
        label: plain average                   # for the report; default the stage's name
        verb: pretrain
        seeds: [1]                             # fewer than all, optional
        config: other.yaml                     # another base, optional
        set: {megatron.load: "{averaged}", megatron.finetune: true}

`{parent}` is that stage's folder, of the same seed. A flag that takes several values has a list.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from cherry_megatron.beginning import hint
from cherry_megatron.cli import options_of
from cherry_megatron.errors import CherryError
from cherry_megatron.flags import nearest
from cherry_megatron.yaml_files import read_file

FOLDER = Path("configs/experiments")
# verb: what names its output, a flag or the key `run`.
OUTPUTS = {
    "pretrain": "run", "evaluate": "run", "compress-depth": "save", "assemble-moee": "save", "calibrate": "output",
}  # fmt: skip
_KEYS = ("about", "config", "seeds", "stages")
_STAGE_KEYS = ("label", "verb", "seeds", "config", "args", "set")
_REFERENCE = re.compile(r"\{([^{}]*)\}")
_SEED = "seed"  # {seed} is the task's
_AT_START = "evaluation.at_start"  # every training's, so that what it gains is known


@dataclass(frozen=True)
class Stage:
    """One step of an experiment, for all of its seeds.

    Attributes:
        name: also its folder's.
        label: for the report.
        verb: of `cherry`.
        seeds: those it is run with.
        config: its base configuration.
        args: flags of the verb -> values, without dashes.
        set: keys of the configuration -> values.
    """

    name: str
    label: str
    verb: str
    seeds: tuple[int, ...]
    config: Path
    args: dict[str, Any]
    set: dict[str, Any]

    @property
    def needs(self) -> list[str]:
        """The stages that it refers to, each once."""
        texts = _texts([*self.args.values(), *self.set.values()])
        return list(dict.fromkeys(name for text in texts for name in _REFERENCE.findall(text) if name != _SEED))


@dataclass(frozen=True)
class Task:
    """A stage with one seed: one `cherry VERB`."""

    stage: Stage
    seed: int

    @property
    def name(self) -> str:
        """Its folder in the experiment's."""
        return f"{self.stage.name}/seed-{self.seed}"

    @property
    def needs(self) -> list[str]:
        """The tasks that must be done before."""
        return [f"{name}/seed-{self.seed}" for name in self.stage.needs]

    def overrides(self, out: Path) -> list[str]:
        """The values of --set, in an experiment that is kept in `out`."""
        values = {key: self._filled(value, out) for key, value in self.stage.set.items()}
        if OUTPUTS[self.stage.verb] == "run":
            values |= {"run": str(out / self.name), "megatron.seed": self.seed}
        elif "plan" in self.stage.args:  # a search trains nothing, but has logs and indices
            values |= {"run": str(out / f"{self.name}.run")}
        return [f"{key}={_yaml(value)}" for key, value in sorted(values.items())]

    def flags(self, out: Path) -> list[str]:
        """The verb's own flags, likewise."""
        values = {key: self._filled(value, out) for key, value in self.stage.args.items()}
        output = OUTPUTS[self.stage.verb]
        if output != "run":
            values[output] = str(out / self.name)
        return [text for key, value in sorted(values.items()) for text in _flag(key, value)]

    def arguments(self, out: Path) -> list[str]:
        """All that follows the verb on the command line."""
        # Not among the overrides: it changes nothing that is trained, so no definition either.
        at_start = [f"{_AT_START}=true"] if self.stage.verb == "pretrain" else []
        sets = [text for override in (*self.overrides(out), *at_start) for text in ("--set", override)]
        return ["--config", str(self.stage.config), *self.flags(out), *sets]

    def _filled(self, value: Any, out: Path) -> Any:
        def text(match: re.Match[str]) -> str:
            return str(self.seed) if match[1] == _SEED else str(out / match[1] / f"seed-{self.seed}")

        return _replaced(value, text)


@dataclass(frozen=True)
class Experiment:
    """What a file asks for.

    Attributes:
        source: the file.
        about: the question.
        stages: in the file's order, by name.
    """

    source: Path
    about: str
    stages: dict[str, Stage]

    def tasks(self, only: Sequence[str] | None = None) -> list[Task]:
        """The tasks in order: stages as in the file, seeds within; of some stages, with those that they need.

        Raises:
            CherryError: if there is no such stage.
        """
        wanted = list(self.stages if only is None else only)
        for name in wanted:  # which grows meanwhile
            wanted += [need for need in self.stage(name).needs if need not in wanted]
        return [Task(stage, seed) for stage in self.stages.values() if stage.name in wanted for seed in stage.seeds]

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            CherryError: if there is none.
        """
        if name not in self.stages:
            raise CherryError(f"{self.source}: there is no stage {name!r}{nearest(name, self.stages)}")
        return self.stages[name]

    def definitions(self) -> dict[str, str]:
        """Task -> twelve hex digits, others when its command, its base configuration or a task before it is."""
        tasks = {task.name: task for task in self.tasks()}
        found: dict[str, str] = {}
        for name in TopologicalSorter({name: task.needs for name, task in tasks.items()}).static_order():
            task = tasks[name]
            config = {key: value for key, value in read_file(task.stage.config).items() if key != "run"}
            before = [found[need] for need in task.needs]
            what = [task.stage.verb, task.flags(Path()), task.overrides(Path()), config, before]
            found[name] = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:12]
        return found


def find(name: str) -> Path:
    """The file of an experiment that is given by name or as a file.

    Raises:
        CherryError: if there is none.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        # What experiments take their configuration from lies there too.
        known = [found.stem for found in FOLDER.glob("*.yaml") if "\nstages:" in found.read_text()]
        raise CherryError(f"there is no experiment {path}{nearest(name, known) if known else hint(path)}")
    return path


def read(path: Path) -> Experiment:
    """Read an experiment.

    Raises:
        CherryError: one sentence that names file and key, with the nearest valid name.
    """
    data = read_file(path)
    _check_keys(path, "", data, _KEYS)
    about, base = (_text(path, key, data.get(key)) for key in ("about", "config"))
    seeds, stages = _seeds(path, "seeds", data.get("seeds")), data.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise CherryError(f"{path}: `stages` must hold stages by name")
    found = {name: _stage(path, name, values, base, seeds) for name, values in stages.items()}
    for stage in found.values():
        _check_references(path, stage, found)
    try:
        TopologicalSorter({stage.name: stage.needs for stage in found.values()}).prepare()
    except CycleError as error:
        raise CherryError(f"{path}: the stages {' <- '.join(error.args[1])} need each other") from None
    return Experiment(path, about, found)


def _stage(path: Path, name: Any, values: Any, base: str, seeds: tuple[int, ...]) -> Stage:
    where = f"stages.{name}"
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise CherryError(f"{path}: the stage {name!r} is a folder's name too; use letters, digits, - and _")
    if not isinstance(values, dict):
        raise CherryError(f"{path}: {where} must hold keys and values, at least `verb`")
    _check_keys(path, f"{where}.", values, _STAGE_KEYS)
    verb = _text(path, f"{where}.verb", values.get("verb"))
    if verb not in OUTPUTS:
        raise CherryError(f"{path}: {where}.verb {verb!r} is none of an experiment{nearest(verb, OUTPUTS)}")
    stage = Stage(
        name=name,
        label=_text(path, f"{where}.label", values.get("label", name)),
        verb=verb,
        seeds=_seeds(path, f"{where}.seeds", values.get("seeds", list(seeds))),
        config=_beside(path, _text(path, f"{where}.config", values.get("config", base))),
        args=_section(path, f"{where}.args", values.get("args")),
        set=_section(path, f"{where}.set", values.get("set")),
    )
    for seed in stage.seeds:
        if seed not in seeds:
            raise CherryError(f"{path}: {where}.seeds has {seed}, which `seeds` has not")
    _check_flags(path, stage)
    return stage


def _check_flags(path: Path, stage: Stage) -> None:
    """Flags that the verb has, and neither flag nor key that the experiment itself gives."""
    options, output = options_of(stage.verb), OUTPUTS[stage.verb]
    for flag in stage.args:
        if flag not in options:
            unknown = f"{path}: stages.{stage.name}.args: cherry {stage.verb} has no flag --{flag}"
            raise CherryError(unknown + nearest(flag, options))
    for key in ("config", "set", output, "help", "dry-run"):
        if key in stage.args:
            raise CherryError(
                f"{path}: stages.{stage.name}.args.{key} is not for an experiment's stage; take it out"
            )
    # `flags` come after all else: a seed among them would be that of every seed.
    for key in ("run", "megatron.seed", _AT_START, "flags") if output == "run" else ():
        if key in stage.set:
            raise CherryError(f"{path}: stages.{stage.name}.set.{key} is given by the experiment; take it out")


def _check_references(path: Path, stage: Stage, stages: dict[str, Stage]) -> None:
    for name in stage.needs:
        if name not in stages:
            raise CherryError(
                f"{path}: stages.{stage.name} refers to {{{name}}}, which is no stage{nearest(name, stages)}"
            )
        for seed in stage.seeds:
            if seed not in stages[name].seeds:
                raise CherryError(f"{path}: stages.{stage.name} needs {{{name}}} with seed {seed}, which it lacks")


def _check_keys(path: Path, where: str, values: dict[Any, Any], known: Iterable[str]) -> None:
    for key in values:
        if key not in known:
            raise CherryError(f"{path}: unknown key {where}{key}{nearest(str(key), known)}")


def _text(path: Path, where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise CherryError(f"{path}: `{where}` must be a text (it is {value!r})")
    return value


def _seeds(path: Path, where: str, value: Any) -> tuple[int, ...]:
    numbers = isinstance(value, list) and all(type(seed) is int and seed > 0 for seed in value)
    if not numbers or not value or len(set(value)) != len(value):
        raise CherryError(f"{path}: `{where}` must be a list of different positive numbers (it is {value!r})")
    return tuple(value)


def _section(path: Path, where: str, value: Any) -> dict[str, Any]:
    if value is not None and not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
        raise CherryError(f"{path}: {where} must hold keys and values")
    return value or {}


def _beside(path: Path, name: str) -> Path:
    """A file named in another one, without the detours on the way."""
    return Path(os.path.normpath(path.parent / name))


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _replaced(value: Any, by: Callable[[re.Match[str]], str]) -> Any:
    """A value with the references in its texts replaced."""
    if isinstance(value, str):
        return _REFERENCE.sub(by, value)
    if isinstance(value, dict):
        return {key: _replaced(inner, by) for key, inner in value.items()}
    return [_replaced(inner, by) for inner in value] if isinstance(value, list) else value


def _flag(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}"] if value else []
    return [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]


def _yaml(value: Any) -> str:
    """A value as --set reads it again."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").strip()
