"""Measurements -> the coefficients of `cherry plan`. For calibrate_planner.py."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from cherry_megatron.config import Config, load
from cherry_megatron.planner.choice import Candidate, weigh
from cherry_megatron.planner.coefficients import Coefficients
from cherry_megatron.planner.hardware import Gpu
from cherry_megatron.planner.job import job_of, setting_of
from cherry_megatron.planner.rates import Rates


@dataclass(frozen=True)
class Training:
    """A short training that is measured.

    Attributes:
        configuration: of configs/.
        overrides, flags: for it.
        ranks: GPUs.
        sequences: of a step.
    """

    configuration: str
    overrides: tuple[str, ...]
    flags: str = ""
    ranks: int = 1
    sequences: int = 8

    @property
    def config(self) -> Config:
        return _loaded(self)

    def predicted(self, gpu: Gpu, measured: Coefficients) -> Candidate:
        """What the planner says of it."""
        return weigh(job_of(self.config, self.sequences), setting_of(self.config, self.ranks), Rates(gpu, measured))

    def seconds(self, gpu: Gpu, measured: Coefficients) -> float:
        return self.predicted(gpu, measured).step.seconds

    def gib(self, gpu: Gpu, measured: Coefficients) -> float:
        """Of the rank that records its steps, which is of the last pipeline stage."""
        return sum(self.predicted(gpu, measured).memory[-1].values()) / 2**30


@cache
def _loaded(training: Training) -> Config:
    batch = f"megatron.global-batch-size={training.sequences}"
    path = Path(f"configs/{training.configuration}.yaml")
    return load(path, [*training.overrides, batch], training.flags.split())


def fit(
    start: Coefficients,
    gpu: Gpu,
    operations: dict[str, Any],
    trainings: dict[str, Training],
    found: dict[str, dict[str, float]],
) -> Coefficients:
    """Coefficients that meet what was measured.

    Single operations give their own; what is left is taken from trainings, each of which one coefficient decides
    more than all others. What was not measured stays as it was.

    Args:
        start: those of before.
        gpu: its datasheet.
        operations: of gpu_operations.py.
        trainings: by name, see `DECIDES`.
        found: their seconds and GiB, by name; those that failed are missing.
    """
    fitted = _attention(_products(start, gpu, operations), gpu, operations)
    fitted = replace(_links(fitted, gpu, operations), stream=operations["stream"] / gpu.bandwidth)
    for _ in range(3):  # each looks at the others a little
        for key, (name, low, high) in DECIDES.items():
            if name in found:
                error = partial(_error, trainings[name], gpu, found[name]["seconds"])
                fitted = solve(fitted, key, low, high, error)
    beside = [
        found[name]["gib"] - trainings[name].gib(gpu, replace(fitted, overhead=0.0))
        for name in found
        if found[name].get("gib")
    ]
    return replace(fitted, overhead=max(sum(beside) / len(beside), 0.0) * 2**30) if beside else fitted


# Coefficient -> the training that decides it, and bounds.
DECIDES = {
    "stream": ("graph", 0.1, 1.5),
    "host_forward": ("eager", 1e-6, 1e-1),
    "host_backward": ("micro-batches of 1", 1e-6, 1e-1),
    "host_unfused": ("loop scales", 0.0, 1e-1),
    "host_fp8": ("FP8", 1.0, 10.0),
    "skew": ("DP=2", 0.0, 1.0),
    "host_exchange": ("TP=2", 0.0, 1e-1),
}


def _error(training: Training, gpu: Gpu, seconds: float, measured: Coefficients) -> float:
    return training.seconds(gpu, measured) - seconds


def changed(start: Coefficients, key: str, value: float) -> Coefficients:
    """The same with one coefficient otherwise."""
    values: dict[str, Any] = {key: value}
    return replace(start, **values)


def solve(
    start: Coefficients, key: str, low: float, high: float, error: Callable[[Coefficients], float]
) -> Coefficients:
    """The coefficient at which an error vanishes, by bisection; at the nearer bound if it does not between them."""

    def at(value: float) -> float:
        return error(changed(start, key, value))

    first, last = at(low), at(high)
    if first * last > 0:
        return changed(start, key, low if abs(first) < abs(last) else high)
    for _ in range(40):
        middle = (low + high) / 2
        if at(middle) * first > 0:
            low = middle
        else:
            high = middle
    return changed(start, key, (low + high) / 2)


def _products(start: Coefficients, gpu: Gpu, operations: dict[str, Any]) -> Coefficients:
    """1 / share reached = (1 + small_products / smallest dimension) / products: a straight line.

    Where that of the measurements does not rise, shapes do not tell, and the best of them counts.
    """
    sizes = np.array([each[:3] for each in operations["products"]], dtype=float)
    reached = 2 * sizes.prod(axis=1) / np.array([each[3] for each in operations["products"]]) / gpu.bf16
    slope, intercept = np.polyfit(1 / sizes.min(axis=1), 1 / reached, 1)
    rises = slope > 0 and intercept > 0
    small = float(slope / intercept) if rises else 0.0
    fitted = replace(start, products=float(1 / intercept if rises else reached.max()), small_products=small)
    shares = [
        2 * rows * inner * columns / seconds / gpu.fp8 * (1 + small / min(rows, inner, columns))
        for rows, inner, columns, seconds in operations["fp8_products"]
    ]
    return replace(fitted, fp8_products=float(np.mean(shares))) if shares else fitted


def _attention(start: Coefficients, gpu: Gpu, operations: dict[str, Any]) -> Coefficients:
    """Two lengths give the length that halves the rate, two sizes of a head the rates."""
    shares = {
        (each["head_size"], number): 6 * each["width"] * each["sequence"] * each["tokens"] / each["both"] / gpu.bf16
        for number, each in enumerate(operations["attention"])
    }
    long, short, narrow = operations["attention"]
    ratio = shares[128, 0] / shares[128, 1]
    lengths = long["sequence"], short["sequence"]
    # share = rate * s / (s + half), of both lengths
    half = lengths[0] * (ratio - 1) / max(lengths[0] / lengths[1] - ratio, 1e-9)
    half = float(min(max(half, 0.0), lengths[0]))
    return replace(
        start,
        short_attention=half,
        attention_128=float(shares[128, 0] * (1 + half / long["sequence"])),
        attention_64=float(shares[64, 2] * (1 + half / narrow["sequence"])),
        attention_forward=float(min(long["forward"] / long["both"], 1.0)),
    )


def _links(start: Coefficients, gpu: Gpu, operations: dict[str, Any]) -> Coefficients:
    """The smallest messages give the latency, the largest the share of the link."""
    volume = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}
    found = operations["collectives"]
    if not found:
        return start
    least, most = min(each[1] for each in found), max(each[1] for each in found)
    latency = float(np.mean([seconds / np.log2(ranks) for _, size, ranks, seconds in found if size == least]))
    reached = [
        volume[kind] * size * (ranks - 1) / ranks / max(seconds - latency, 1e-9) / gpu.link
        for kind, size, ranks, seconds in found
        if size == most
    ]
    return replace(start, latency=latency, link=float(np.mean(reached)))
