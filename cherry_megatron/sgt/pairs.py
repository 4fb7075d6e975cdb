"""Runs of selective training, and the runs that differ from them in nothing but the supervision of every token.

    recovered = (L0 - L_sel(t_sel)) / (L0 - L_full(t_full))        efficiency = recovered / rho

L is the held-out mean loss over all output tokens with all loops, L0 that before the first step, t the step of each
run's own minimum, rho the selected share of the training split.
"""

import argparse
import hashlib
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cherry_megatron.config import Data
from cherry_megatron.errors import CherryError
from cherry_megatron.runs import read_evaluations, read_probes, read_rho
from cherry_megatron.yaml_files import read_file

UNPAIRED = ("run", "sgt", "generation")  # sections in which a selective run and its full one may differ
TOLERANCE = 1e-3  # nats; the loss before the first step varies by less with the device that computes it
# Flags that change no number, and whether they stand without a value.
_LAYOUT = {
    "tensor-model-parallel-size": False, "pipeline-model-parallel-size": False, "micro-batch-size": False,
    "expert-model-parallel-size": False, "eval-micro-batch-size": False,
    "num-distributed-optimizer-instances": False, "sequence-parallel": True, "overlap-grad-reduce": True,
    "overlap-param-gather": True,
}  # fmt: skip
_DEFAULT_SEED = 1234  # Megatron's
# What is another one for another seed, if a run's parent had the same seed.
_OF_A_SEED = ("megatron.seed", "megatron.load", "distillation.load", "distillation.config")


@dataclass(frozen=True)
class Run:
    """A training, as its folder or its record in an experiment tells of it.

    Attributes:
        name: for messages: the folder, or the experiment's task.
        label: of the table's row, without alpha.
        row: the same for runs that differ in their seed alone.
        seed: of weights and order of the text.
        settings: what a pair has in common, by key.
        sgt: the section of the configuration; None is full supervision.
        rho: selected share of the training split.
        loops: of the model.
        evaluations, probes: as runs.py reads them.
    """

    name: str
    label: str
    row: str
    seed: int
    settings: dict[str, Any]
    sgt: dict[str, Any] | None
    rho: float | None
    loops: int
    evaluations: list[dict[str, Any]]
    probes: list[dict[str, Any]]

    @property
    def is_full(self) -> bool:
        """Whether every token counts the same: without selection, or with an alpha that stays 0."""
        return self.sgt is None or not (self.sgt["alpha"] or self.sgt["alpha_start"])

    @property
    def losses(self) -> dict[int, float]:
        """Step -> held-out loss with all loops."""
        return dict(self._at_all_loops("losses"))

    @property
    def parts(self) -> dict[int, dict[str, float]]:
        """Step -> held-out losses of selected and unselected tokens with all loops."""
        return dict(self._at_all_loops("parts"))

    @property
    def optimum(self) -> int:
        """The step with the lowest held-out loss, which may be 0; the first of equal ones."""
        losses = {step: loss for step, loss in self.losses.items() if not math.isnan(loss)}
        return min(losses, key=lambda step: (losses[step], step))

    def last_loss_of(self, part: str) -> float | None:
        """The held-out loss of the `selected` or `unselected` tokens at the last evaluation."""
        parts = self.parts
        return parts[max(parts)].get(part) if parts else None

    def couplings(self, name: str) -> dict[int, float]:
        """Step -> `cos` or `ratio` over all parameters, of each probe that found it."""
        found = {probe["iteration"]: probe["coupling"].get("all") for probe in self.probes}
        return {step: values[name] for step, values in found.items() if values is not None}

    def coupling_to_optimum(self, name: str) -> float | None:
        """The mean of `cos` or `ratio` over the probes in the steps up to the lowest held-out loss."""
        found = [value for step, value in self.couplings(name).items() if step <= self.optimum]
        return statistics.mean(found) if found else None

    def last_coupling(self, name: str) -> float | None:
        """`cos` or `ratio` of the last probe."""
        found = self.couplings(name)
        return found[max(found)] if found else None

    def _at_all_loops(self, key: str) -> Iterator[tuple[int, Any]]:
        for evaluation in self.evaluations:
            if str(self.loops) in evaluation.get(key, {}):
                yield evaluation["iteration"], evaluation[key][str(self.loops)]


@dataclass(frozen=True)
class Pair:
    """A run and the full run that it is compared with; a full run may be its own."""

    run: Run
    full: Run

    @property
    def recovered(self) -> float:
        """The share of the full run's gain, each at the step of its own lowest loss."""
        return self._recovered(self.run.optimum, self.full.optimum)

    @property
    def last_step(self) -> int:
        """The last step at which both were evaluated."""
        return max(self.run.losses.keys() & self.full.losses.keys())

    @property
    def recovered_at_last_step(self) -> float | None:
        """The same at the last step that both have; None if the full run has gained nothing there."""
        step = self.last_step
        return self._recovered(step, step) if self.full.losses[step] < self.full.losses[0] else None

    @property
    def efficiency(self) -> float | None:
        """Recovered for each supervised share of the tokens."""
        return self._for_each_share(self.recovered)

    @property
    def efficiency_at_last_step(self) -> float | None:
        """The same at the last step that both have."""
        return self._for_each_share(self.recovered_at_last_step)

    def _for_each_share(self, recovered: float | None) -> float | None:
        return recovered / self.run.rho if recovered is not None and self.run.rho else None

    def _recovered(self, step: int, full_step: int) -> float:
        start = self.full.losses[0]
        return (start - self.run.losses[step]) / (start - self.full.losses[full_step])


def base_hash(settings: dict[str, Any], folder: Path) -> str:
    """Twelve hex digits that are the same for configurations whose runs pair.

    Args:
        settings: a resolved configuration, as plain values.
        folder: of the experiment; paths in it count relative to it.
    """
    shared = {key: value for key, value in settings.items() if key not in UNPAIRED}
    text = json.dumps(shared, sort_keys=True, ensure_ascii=False).replace(f'"{folder}/', '"')
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_run(folder: Path) -> Run:
    """A run from its folder.

    Raises:
        CherryError: if it is none, or has not been evaluated.
    """
    for name, what in (
        ("config.yaml", "so it is no run's folder"),
        ("starts.jsonl", "so no training has begun there"),
        ("evaluations.jsonl", "so there is nothing to compare; set megatron.eval-interval and train it again"),
    ):
        if not (folder / name).is_file():
            raise CherryError(f"{folder} has no {name}, {what}")
    try:
        return _read(folder)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CherryError(
            f"{folder} does not hold what a run writes ({type(error).__name__}: {error}); name folders of "
            "`cherry pretrain`"
        ) from None


def _read(folder: Path) -> Run:
    config = read_file(folder / "config.yaml")
    reading = {**asdict(Data()), **config.get("data", {})}
    del reading["loader"]  # which changes no number
    config = {**config, "data": reading}
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    known.add_argument("--seed", type=int, default=config["megatron"].get("seed", _DEFAULT_SEED))
    for flag, switch in _LAYOUT.items():
        known.add_argument(f"--{flag}", action="store_true" if switch else "store")
    given, flags = known.parse_known_args(config["flags"])
    settings = {**_by_key(config), "megatron.seed": given.seed, "flags": flags}
    settings = {key: value for key, value in settings.items() if key.removeprefix("megatron.") not in _LAYOUT}
    sgt, shuffle = config.get("sgt"), reading["shuffle"]
    selection = "full" if sgt is None else sgt["marks"] or f"top loss online, {sgt['top_loss']:g}"
    row = {key: value for key, value in settings.items() if key not in _OF_A_SEED}
    return Run(
        name=str(folder),
        label=f"{selection}, {shuffle} shuffled" if shuffle != "none" else selection,
        row=json.dumps([sgt, row], sort_keys=True),
        seed=given.seed,
        settings=settings,
        sgt=sgt,
        rho=read_rho(folder),
        loops=config["recurrence"]["loops"],
        evaluations=read_evaluations(folder),
        probes=read_probes(folder),
    )


def _by_key(config: dict[str, Any]) -> dict[str, Any]:
    """`section.key` -> value, of what a pair has in common."""
    shared = {name: values for name, values in config.items() if name not in UNPAIRED}
    sections = {name: values for name, values in shared.items() if isinstance(values, dict)}
    found = {f"{name}.{key}": value for name, values in sections.items() for key, value in values.items()}
    return found | {name: value for name, value in shared.items() if name not in sections}


def pair(run: Run, runs: Sequence[Run]) -> Pair:
    """A run with its full one.

    Args:
        run: selective, or a full run, which is its own.
        runs: those to look among; of several full ones that pair, one without selection is taken.

    Raises:
        CherryError: why the two cannot be compared.
    """
    full = run if run.is_full else _full_of(run, [other for other in runs if other.is_full])
    for which in (run, full):
        if 0 not in which.losses:
            raise CherryError(f"{which.name} has no evaluation at step 0; train it with evaluation.at_start: true")
    start, its_start = run.losses[0], full.losses[0]
    if not abs(start - its_start) <= TOLERANCE:
        raise CherryError(
            f"{run.name} and {full.name} have losses of {start:.4f} and {its_start:.4f} at step 0: they were "
            "evaluated on other texts or began with other weights; compare runs of one text and one beginning"
        )
    if full.optimum == 0:
        raise CherryError(
            f"{full.name}, which has full supervision, never fell below its loss of {its_start:.4f} at step 0, so "
            "there is nothing to recover; train it longer or with another learning rate"
        )
    if not run.is_full and not run.rho:
        raise CherryError(f"{run.name} tells of no rho, the selected share; train it again")
    return Pair(run, full)


def _full_of(run: Run, fulls: list[Run]) -> Run:
    if not fulls:
        raise CherryError(f"{run.name} pairs with no run: none of them has full supervision; name one without sgt")
    nearest = min(fulls, key=lambda full: (len(differing(run, full)), full.sgt is not None))
    keys = differing(run, nearest)
    if keys:
        raise CherryError(
            f"{run.name} pairs with no run of full supervision: the nearest, {nearest.name}, differs in "
            f"{', '.join(keys)}; train one that does not"
        )
    return nearest


def differing(run: Run, other: Run) -> list[str]:
    """The keys of the settings in which two runs differ."""
    keys, missing = run.settings.keys() | other.settings.keys(), object()
    return sorted(key for key in keys if run.settings.get(key, missing) != other.settings.get(key, missing))
