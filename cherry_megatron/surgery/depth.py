"""Depth compression and its reverse: which tensors a new checkpoint holds, and what each is made of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cherry_megatron.errors import CherryError
from cherry_megatron.model.options import Recurrence
from cherry_megatron.model.pattern import Pattern, unroll
from cherry_megatron.surgery.align import Alignment, Order, align
from cherry_megatron.surgery.checkpoint import Checkpoint
from cherry_megatron.surgery.grouping import Mix
from cherry_megatron.surgery.layers import (
    EMBEDDING,
    EXTRA_STATES,
    LOOP_SCALES,
    ROLES,
    Source,
    Sublayer,
    same,
    sublayer_prefixes,
)
from cherry_megatron.surgery.numbers import Mean, from_double, to_float
from cherry_megatron.surgery.records import DTYPES, Array, StandIn
from cherry_megatron.surgery.writing import Job, Spec

MOMENTS = "optimizer.state."


@dataclass(frozen=True)
class Copy:
    """Tensors taken over as they are, perhaps under another name."""

    reads: tuple[str, ...]
    writes: tuple[Spec, ...]

    def make(self, source: Checkpoint) -> Iterator[Array]:
        return (source.read(name) for name in self.reads)


@dataclass(frozen=True)
class Constant:
    """Tensors that the source does not have, of one value throughout: per-loop vectors begin at one."""

    writes: tuple[Spec, ...]
    value: float
    reads: tuple[str, ...] = ()

    def make(self, source: Checkpoint) -> Iterator[Array]:
        for spec in self.writes:
            yield from_double(spec.dtype, np.full(spec.shape, self.value))


@dataclass(frozen=True)
class Merge:
    """A sublayer that is the weighted mean of several.

    Attributes:
        symbol: attention or MLP.
        members: for each source sublayer the names of its tensors, by role.
        weights: one a member.
        writes: the new tensors, one a role.
        alignment: how heads or neurons are matched to the middle member's before, or None.
        moments: of the optimizer, which are averaged likewise: beginnings of names.
    """

    symbol: str
    members: tuple[dict[str, str], ...]
    weights: tuple[float, ...]
    writes: tuple[Spec, ...]
    alignment: Alignment | None = None
    moments: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(
            before + names[role] for before in ("", *self.moments) for names in self.members for role in names
        )

    def make(self, source: Checkpoint) -> Iterator[Array]:
        orders: list[Order | None] = [None] * len(self.members)
        if self.alignment is not None and len(self.members) > 1:
            orders = align(self.symbol, source, self.members, self.alignment)
        written = iter(self.writes)
        for before in ("", *self.moments):
            for role in ROLES[self.symbol]:
                spec = next(written)
                mean = Mean(spec.name, spec.dtype)
                for names, weight, order in zip(self.members, self.weights, orders, strict=True):
                    values = to_float(spec.dtype, source.read(before + names[role]))
                    mean.add(values if order is None else order.apply(role, values), weight)
                yield mean.result()


@dataclass(frozen=True)
class Unroll:
    """An effective layer's sublayer: the stored one with the vectors of its loop folded in."""

    symbol: str
    names: dict[str, str]
    loop: int | None
    writes: tuple[Spec, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(self.names.values())

    def make(self, source: Checkpoint) -> Iterator[Array]:
        norm_scale, output_scale = (self._scale(source, role) for role in LOOP_SCALES[self.symbol])
        scales = (norm_scale, None, None if output_scale is None else output_scale[:, None])
        for role, spec, scale in zip(ROLES[self.symbol], self.writes, scales, strict=True):
            values = source.read(self.names[role])
            if scale is not None:
                values = from_double(spec.dtype, to_float(spec.dtype, values).astype(np.float64) * scale)
            yield values

    def _scale(self, source: Checkpoint, role: str) -> Array | None:
        """The vector of this loop, [h]; None if the layer has none."""
        if role not in self.names or self.loop is None:
            return None
        hidden = self.writes[0].shape[0]
        vectors = to_float(source.tensors[self.names[role]].dtype, source.read(self.names[role]))
        return vectors.reshape(-1, hidden)[self.loop].astype(np.float64)


def compression(
    source: Checkpoint,
    layers: Source,
    recurrence: Recurrence,
    mixes: Sequence[Mix],
    alignment: Alignment | None,
    with_moments: bool,
) -> list[Job]:
    """The jobs that compress a checkpoint.

    Args:
        source: it.
        layers: its layers.
        recurrence: the compressed model.
        mixes: what each of its layers is made of.
        alignment: see Merge.
        with_moments: carry averaged moments of the optimizer.

    Raises:
        CherryError: if layers that are to be averaged differ, or moments are missing.
    """
    moments = moment_kinds(source) if with_moments else ()
    core = range(len(recurrence.parsed.prelude), len(recurrence.parsed.prelude) + len(recurrence.parsed.core))
    jobs: list[Job] = [copy_top(source, layers, name, moments) for name in layers.top]
    for layer, (mixed, sublayers) in enumerate(zip(mixes, sublayer_prefixes(recurrence.parsed), strict=True)):
        for place, (symbol, prefix) in enumerate(sublayers):
            symbols = recurrence.parsed.layers[layer]
            members = [_member(source, layers, number, place, symbols) for number in mixed.members]
            writes = []
            for before in ("", *moments):
                for role in ROLES[symbol]:
                    tensor = same(source, [before + names[role] for names in members])
                    writes.append(Spec(f"{before}{prefix}{role}", tensor.dtype, tensor.shape))
            jobs.append(Merge(symbol, tuple(members), mixed.weights, tuple(writes), alignment, moments))
            if recurrence.loop_scales and layer in core:
                norm = source.tensors[members[0][ROLES[symbol][0]]]
                shape = (recurrence.parsed.loops * norm.shape[0],)
                scales = [prefix + role for role in LOOP_SCALES[symbol]]
                jobs.append(Constant(tuple(Spec(name, norm.dtype, shape) for name in scales), 1.0))
                jobs += [Constant(specs, value) for specs, value in _moments_of(source, scales, shape, moments)]
    return jobs


def _moments_of(
    source: Checkpoint, names: Sequence[str], shape: tuple[int, ...], moments: Sequence[str]
) -> Iterator[tuple[tuple[Spec, ...], float]]:
    """What the optimizer keeps of new per-loop vectors, and its value: moments are zero, copies of weights one."""
    for before in moments:
        specs = tuple(Spec(before + name, _moment_type(source, before), shape) for name in names)
        yield specs, 0.0 if before.endswith((".exp_avg.", ".exp_avg_sq.")) else 1.0


def _moment_type(source: Checkpoint, before: str) -> str:
    return next(tensor.dtype for name, tensor in source.tensors.items() if name.startswith(before))


def moment_kinds(source: Checkpoint) -> tuple[str, ...]:
    """What the optimizer keeps of each parameter, as beginnings of names, e.g. optimizer.state.exp_avg.

    Raises:
        CherryError: if there is nothing.
    """
    ends = "." + EMBEDDING
    found = tuple(
        name.removesuffix(EMBEDDING) for name in source.tensors if name.startswith(MOMENTS) and name.endswith(ends)
    )
    if not found:
        raise CherryError(f"{source.folder} holds no optimizer state by parameter; use --optimizer drop")
    return found


def copy_top(source: Checkpoint, layers: Source, name: str, moments: Sequence[str] = ()) -> Copy:
    """The job that takes over a tensor outside the layers."""
    reads = tuple(before + layers.top[name] for before in ("", *moments))
    for read in reads:
        if read not in source.tensors:
            raise CherryError(f"{source.folder}: the tensor {read} is missing")
    tensors = [source.tensors[read] for read in reads]
    writes = [Spec(before + name, t.dtype, t.shape) for before, t in zip(("", *moments), tensors, strict=True)]
    return Copy(reads, tuple(writes))


def _member(source: Checkpoint, layers: Source, number: int, place: int, symbols: str) -> dict[str, str]:
    """The names of a source sublayer's tensors by role."""
    sublayers: tuple[Sublayer, ...] = layers.layers[number]
    kinds = "".join(sublayer.symbol for sublayer in sublayers)
    if kinds != symbols:
        raise CherryError(f"{source.folder}: layer {number} is {kinds!r}, but recurrence.pattern wants {symbols!r}")
    return sublayers[place].names


def expansion(source: Checkpoint, layers: Source, recurrence: Recurrence) -> tuple[Pattern, list[Job]]:
    """The pattern and the jobs of the unrolled, dense equivalent, which stock Megatron runs.

    Raises:
        CherryError: if there is none, or the checkpoint is not that of `recurrence`.
    """
    pattern = recurrence.parsed
    if recurrence.injection != "none":
        raise CherryError(
            f"recurrence.injection {recurrence.injection} adds the prelude's output in every loop, which a dense "
            "model cannot do; only injection none can be expanded"
        )
    if len(layers.layers) != len(pattern.layers):
        raise CherryError(
            f"{source.folder} holds {len(layers.layers)} layers, recurrence.pattern {len(pattern.layers)}; "
            "name the configuration that it was trained with"
        )
    visits = unroll(pattern, recurrence.loops, recurrence.order)
    dense = Pattern((), tuple(pattern.layers[visit.layer] for visit in visits), (), 1)
    jobs: list[Job] = [copy_top(source, layers, name) for name in layers.top]
    for visit, sublayers in zip(visits, sublayer_prefixes(dense), strict=True):
        for place, (symbol, prefix) in enumerate(sublayers):
            names = _member(source, layers, visit.layer, place, pattern.layers[visit.layer])
            _check_loops(source, names, symbol, recurrence)
            tensors = {role: source.tensors[names[role]] for role in ROLES[symbol]}
            writes = tuple(Spec(prefix + role, t.dtype, t.shape) for role, t in tensors.items())
            loop = None if visit.loop is None else min(visit.loop, pattern.loops - 1)
            jobs.append(Unroll(symbol, names, loop, writes))
    return dense, jobs


def _check_loops(source: Checkpoint, names: dict[str, str], symbol: str, recurrence: Recurrence) -> None:
    """Per-loop vectors are there if they should be, and one a loop."""
    hidden = source.tensors[names[ROLES[symbol][0]]].shape[0]
    for role in LOOP_SCALES[symbol]:
        found = source.tensors[names[role]].shape[0] // hidden if role in names else None
        if found is not None and found != recurrence.parsed.loops:
            raise CherryError(
                f"{source.folder}: {names[role]} has vectors of {found} loops, recurrence.pattern of "
                f"{recurrence.parsed.loops}; name the configuration that it was trained with"
            )


def objects(source: Checkpoint, pattern: Pattern, with_optimizer: bool) -> dict[str, Any]:
    """What a checkpoint holds besides tensors: empty extra states, and Megatron's common state at iteration 0."""
    modules = [
        prefix + module
        for sublayers in sublayer_prefixes(pattern)
        for symbol, prefix in sublayers
        for module in EXTRA_STATES[symbol]
    ]
    modules.append("output_layer")  # Megatron looks for it, also where the weight is the embedding's
    found: dict[str, Any] = {f"{module}._extra_state/shard_0_1": [None] for module in modules}
    return found | {"common_state/shard_0_1": [_common_state(source, pattern, with_optimizer)]}


def _common_state(source: Checkpoint, pattern: Pattern, with_optimizer: bool) -> dict[str, Any]:
    state: dict[str, Any] = source.object("common_state")[0]
    kept = {"args", "checkpoint_version", "content_metadata"}
    kept |= {"optimizer", "opt_param_scheduler"} if with_optimizer else set()
    arguments: StandIn = state["args"]
    arguments.state |= {
        "num_layers": len(pattern.symbols),
        "hybrid_layer_pattern": pattern.symbols,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "iteration": 0,
    }
    new = {name: value for name, value in state.items() if name in kept}
    if "opt_param_scheduler" in new:
        new["opt_param_scheduler"] |= {"num_steps": 0}
    return new | {"iteration": 0, "num_floating_point_operations_so_far": 0}


def written_bytes(jobs: Sequence[Job]) -> int:
    """The size of the tensors that jobs write."""
    return sum(spec.nbytes for job in jobs for spec in job.writes)


def peak_bytes(jobs: Sequence[Job], workers: int) -> int:
    """About the memory that the tensors in work take, for the largest job on every worker."""

    def job_peak(job: Job) -> int:
        largest = max(np.prod(spec.shape, dtype=np.int64) for spec in job.writes)
        itemsize = max(np.dtype(DTYPES[spec.dtype][1]).itemsize for spec in job.writes)
        if not isinstance(job, Merge | Unroll):
            return int(largest) * itemsize
        # The doubles, a source tensor and the result; rounding to bfloat16 takes some more.
        peak = int(largest) * (32 if itemsize == 2 else 24)
        if isinstance(job, Merge) and job.alignment is not None:
            whole = sum(int(np.prod(spec.shape, dtype=np.int64)) for spec in job.writes)
            peak = max(peak, 3 * 8 * whole + 8 * max(spec.shape[-1] for spec in job.writes) ** 2)
        return peak

    return sum(sorted((job_peak(job) for job in jobs), reverse=True)[:workers])
