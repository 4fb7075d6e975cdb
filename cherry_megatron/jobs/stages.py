"""The stages that the launchers run: what each starts from, what it makes, and whether that is finished.

A stage's records (logs, attempts, copies of code and environment) are kept in the run of its configuration, also
where the stage writes elsewhere: depth compression to what `megatron.load` names, assembly to `assembled` of the
run.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cherry_megatron.config import Outline, outline
from cherry_megatron.errors import CherryError
from cherry_megatron.flags import outline_values
from cherry_megatron.jobs.attempts import evaluated
from cherry_megatron.model.pattern import MOE
from cherry_megatron.storage.tracker import saved_folder, step_saved

ASSEMBLED = "assembled"
BRANCH = "CHERRY_BRANCH"  # the variable by which one configuration stands for several runs
# Flags by which a training ends before its last step because it was asked to.
_ENDS_EARLY = ("exit-interval", "exit-duration-in-mins")


@dataclass(frozen=True)
class Stage:
    """One stage with one configuration.

    Attributes:
        verb: pretrain, compress-depth, assemble-moee or evaluate.
        run: the folder of its records.
        output: the folder that it makes.
        arguments: what its command is given besides the configuration.
        start: what it starts from, in words.
        last: a training's last step.
        ends_early: whether a training may end before it without having been told to by a signal.
        settings: the configuration's sections.
    """

    verb: str
    run: Path
    output: Path
    arguments: tuple[str, ...]
    start: str
    last: int | None
    ends_early: bool
    settings: dict[str, Any]

    @property
    def saved(self) -> int:
        """The step of a training's newest checkpoint, 0 if it has none; of another stage 1 once it is finished."""
        if self.verb in ("pretrain", "evaluate"):
            return step_saved(self.run)
        return int(saved_folder(self.output) is not None)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        if self.verb == "evaluate":
            return evaluated(self.run, self.saved)
        return self.saved >= (1 if self.last is None else self.last)


def stage_of(
    verb: str,
    config: Path,
    overrides: Sequence[str] = (),
    flags: Sequence[str] = (),
    load: Sequence[str] = (),
    parent: Path | None = None,
) -> Stage:
    """A stage, as its launcher describes it.

    Args:
        verb: see `Stage`.
        config: its configuration.
        overrides: of the configuration, as after --set.
        flags: Megatron's, as after `--`.
        load: runs or folders of checkpoints to start from.
        parent: the configuration whose run is started from if `load` is empty; for an assembly all its branches.

    Raises:
        CherryError: what a configuration lacks.
    """
    found = outline(config, overrides)
    run = _run_of(config, found.settings)
    last: int | None = None
    output, early, values = run, False, outline_values(found.megatron, flags)
    if verb == "pretrain":
        if parent is not None and not load:
            load = [str(_run_of(*_read(parent)))]
        arguments, start = _of_training(found, run, load)
        last, early = _last_step(config, values), any(values.get(flag) for flag in _ENDS_EARLY)
    elif verb == "compress-depth":
        output, sources = _to_compress_to(config, values), list(load) or [str(_run_of(*_read(parent)))]
        if len(sources) > 1:
            raise CherryError(f"depth compression takes one run, not {', '.join(sources)}")
        arguments, start = ("--load", *sources, "--save", str(output)), sources[0]
    elif verb == "assemble-moee":
        if not experts(found):
            raise CherryError(f"{config} is no mixture: it has neither moee.experts nor experts inside layers")
        output, sources = run / ASSEMBLED, list(load) or [str(found) for found in _branches(found, parent)]
        arguments, start = ("--load", *sources, "--save", str(output)), ", ".join(sources)
    else:
        arguments, start = (), f"the newest checkpoint of {run}"
    return Stage(verb, run, output, arguments, start, last, early, found.settings)


def _last_step(config: Path, values: dict[str, Any]) -> int:
    steps, samples, batch = (values.get(flag) for flag in ("train-iters", "train-samples", "global-batch-size"))
    if samples is not None and batch and values.get("rampup-batch-size") is None:
        return int(samples) // int(batch)
    if not isinstance(steps, int):
        raise CherryError(f"{config}: set megatron.train-iters, by which a job knows whether the run is finished")
    return steps


def _of_training(config: Outline, run: Path, load: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """What a first start loads; later ones go on from the run's own checkpoint."""
    assembled = run / ASSEMBLED
    source = load[0] if load else str(assembled) if saved_folder(assembled) else None
    arguments: tuple[str, ...] = ()
    if source is not None:
        arguments = ("--set", f"megatron.load={source}", "--set", "megatron.finetune=true")
    if step := step_saved(run):
        return arguments, f"the run's own step {step}"
    source = source or config.megatron.get("load")
    if source is not None:
        return arguments, str(source)
    count = experts(config)
    return arguments, f"scratch, with {count} experts" if count else "scratch"


def _to_compress_to(config: Path, values: dict[str, Any]) -> Path:
    if not isinstance(found := values.get("load"), str):
        raise CherryError(f"{config}: set megatron.load to the folder that depth compression is to write")
    return Path(found)


def _branches(config: Outline, parent: Path | None) -> list[Path]:
    return [_run_of(*read) for read in each_branch(parent, experts(config))]


def each_branch(config: Path | None, count: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """One configuration, read as that of each branch.

    Raises:
        CherryError: if all are one run.
    """
    runs = set()
    for number in range(count):
        with branch(number):
            path, settings = _read(config)
        runs.add(settings["run"])
        if len(runs) <= number:
            raise CherryError(f"{path}: its `run` is the same for all branches; let it contain ${{{BRANCH}}}")
        yield path, settings


@contextmanager
def branch(number: int) -> Iterator[None]:
    """Read configurations as those of a branch."""
    before = os.environ.get(BRANCH)
    os.environ[BRANCH] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ[BRANCH]
        else:
            os.environ[BRANCH] = before


def experts(config: Outline) -> int:
    """How many models a configuration is assembled from; 0 if it is a single model."""
    if config.moee is not None:
        return config.moee.experts
    return config.megatron.get("num-experts", 0) if MOE in config.recurrence.parsed.symbols else 0


def _read(config: Path | None) -> tuple[Path, dict[str, Any]]:
    if config is None:
        raise CherryError("name what to start from, a run (LOAD=) or a configuration (FROM=)")
    return config, outline(config).settings


def _run_of(config: Path, settings: dict[str, Any]) -> Path:
    if not isinstance(run := settings.get("run"), str) or not run:
        raise CherryError(f"{config}: `run` must name the run's folder, e.g. run: runs/{config.stem}")
    return Path(run)
