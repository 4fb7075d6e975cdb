"""Depth compression and its reverse: which tensors a new checkpoint holds, and what each is made of."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cherry_megatron.errors import CherryError
from cherry_megatron.model.options import Recurrence
from cherry_megatron.model.pattern import AHEAD, MOE, Pattern, unroll
from cherry_megatron.storage.checkpoint import Checkpoint, Tensor
from cherry_megatron.storage.fits import check_layers
from cherry_megatron.storage.layers import (
    DEPTH_EXTRA_STATES,
    DEPTHS,
    EMBEDDING,
    EXTRA_STATES,
    LOOP_SCALES,
    ROLES,
    Source,
    member,
    sublayer_prefixes,
)
from cherry_megatron.storage.records import DTYPES, StandIn
from cherry_megatron.surgery.activations import file_name
from cherry_megatron.surgery.align import Alignment
from cherry_megatron.surgery.corrections import Correct, factors
from cherry_megatron.surgery.grouping import Mix
from cherry_megatron.surgery.jobs import Constant, Copy, Merge, Recut, Stack, Unroll
from cherry_megatron.surgery.writing import Job, Spec

MOMENTS = "optimizer.state."


def compression(
    source: Checkpoint,
    layers: Source,
    recurrence: Recurrence,
    mixes: Sequence[Mix],
    alignment: Alignment | None,
    with_moments: bool,
    gated: bool,
    draw: Callable[[tuple[Spec, ...]], Job] | None = None,
) -> list[Job]:
    """The jobs that compress a checkpoint.

    Args:
        source: it.
        layers: its layers.
        recurrence: the compressed model.
        mixes: what each of its layers is made of.
        alignment: see Merge.
        with_moments: carry averaged moments of the optimizer.
        gated: whether the FFN has a gate.
        draw: makes the job that draws a sublayer anew instead.

    Raises:
        CherryError: if layers that are to be averaged differ, or moments are missing.
    """
    moments = moment_kinds(source) if with_moments else ()
    core = range(len(recurrence.parsed.prelude), len(recurrence.parsed.prelude) + len(recurrence.parsed.core))
    jobs: list[Job] = [copy_top(source, layers, name, moments) for name in layers.top]
    for layer, (mixed, sublayers) in enumerate(zip(mixes, sublayer_prefixes(recurrence.parsed), strict=True)):
        for place, (symbol, prefix) in enumerate(sublayers):
            symbols = recurrence.parsed.layers[layer]
            members = [member(source, layers, number, place, symbols) for number in mixed.members]
            writes = []
            for before in ("", *moments):
                for role in ROLES[symbol]:
                    tensor = same(source, [before + names[role] for names in members])
                    writes.append(Spec(f"{before}{prefix}{role}", tensor.dtype, tensor.shape))
            recorded = tuple(file_name(number, place, symbol) for number in mixed.members)
            merge = Merge(symbol, tuple(members), mixed.weights, tuple(writes), alignment, moments, recorded)
            jobs.append(merge if draw is None else draw(merge.writes))
            if layer in core and recurrence.loop_scales:
                jobs += _scales(source, merge, prefix, recurrence.parsed.loops)
            if layer in core and recurrence.loop_rank:
                group = tuple(member(source, layers, number, place, symbols) for number in mixed.group)
                for role in ROLES[symbol]:
                    same(source, [names[role] for names in group])
                specs = factors(prefix, merge, recurrence.parsed.loops, recurrence.loop_rank, gated)
                jobs.append(Correct(merge, group, specs))
    return jobs


def same(checkpoint: Checkpoint, names: list[str]) -> Tensor:
    """One of several tensors that must have one shape and one type.

    Raises:
        CherryError: naming one that differs.
    """
    first = checkpoint.tensors[names[0]]
    for name in names[1:]:
        other = checkpoint.tensors[name]
        if (other.shape, other.dtype) != (first.shape, first.dtype):
            raise CherryError(
                f"{checkpoint.folder}: {name} is {other.dtype} {list(other.shape)}, but {first.name}, which it is "
                f"averaged with, is {first.dtype} {list(first.shape)}"
            )
    return first


def _scales(source: Checkpoint, merge: Merge, prefix: str, loops: int) -> Iterator[Constant]:
    """The per-loop vectors of a core layer's sublayer, and what the optimizer keeps of them."""
    norm = merge.writes[0]
    shape = (loops * norm.shape[0],)
    names = [prefix + role for role in LOOP_SCALES[merge.symbol]]
    yield Constant(tuple(Spec(name, norm.dtype, shape) for name in names), 1.0)
    for specs, value in _moments_of(source, names, shape, merge.moments):
        yield Constant(specs, value)


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


def expansion(
    source: Checkpoint, layers: Source, recurrence: Recurrence, config: Path
) -> tuple[Pattern, list[Job]]:
    """The pattern and the jobs of the unrolled, dense equivalent, which stock Megatron runs.

    Args:
        source: the checkpoint.
        layers: its layers.
        recurrence: of the configuration that it was trained with.
        config: its file, for messages.

    Raises:
        CherryError: if there is none, or the checkpoint is not that of `recurrence`.
    """
    pattern = recurrence.parsed
    if recurrence.injection != "none":
        raise CherryError(
            f"recurrence.injection {recurrence.injection} adds the prelude's output in every loop, which a dense "
            "model cannot do; only injection none can be expanded"
        )
    check_layers(source, layers, recurrence, config)
    visits = unroll(pattern, recurrence.loops, recurrence.order)
    dense = Pattern((), tuple(pattern.layers[visit.layer] for visit in visits), (), 1)
    jobs: list[Job] = [copy_top(source, layers, name) for name in layers.top]
    for visit, sublayers in zip(visits, sublayer_prefixes(dense), strict=True):
        for place, (symbol, prefix) in enumerate(sublayers):
            names = member(source, layers, visit.layer, place, pattern.layers[visit.layer])
            tensors = {role: source.tensors[names[role]] for role in ROLES[symbol]}
            writes = tuple(Spec(prefix + role, t.dtype, t.shape) for role, t in tensors.items())
            loop = None if visit.loop is None else min(visit.loop, pattern.loops - 1)
            jobs.append(Unroll(symbol, names, loop, writes))
    return dense, jobs


def objects(
    source: Checkpoint, pattern: Pattern, with_optimizer: bool, depths: int = 0, experts: int = 0
) -> dict[str, Any]:
    """What a checkpoint holds besides tensors: empty extra states, and Megatron's common state at iteration 0.

    Args:
        source: the checkpoint that it is made of.
        pattern: its layers.
        with_optimizer: whether it holds the optimizer's state.
        depths: of multi-token prediction.
        experts: of each layer `E`.
    """
    modules = [
        (prefix + module, experts if symbol == MOE else 1)
        for sublayers in sublayer_prefixes(pattern)
        for symbol, prefix in sublayers
        for module in EXTRA_STATES[symbol]
    ]
    # Megatron looks for these, also where the head is the embedding; the norm's is that of Transformer Engine.
    modules += [("output_layer", 1), ("decoder.final_norm", 1)]
    modules += [(f"{DEPTHS}{number}.{module}", 1) for number in range(depths) for module in DEPTH_EXTRA_STATES]
    found: dict[str, Any] = {
        f"{module}._extra_state/shard_{shard}_{shards}": [None]
        for module, shards in modules
        for shard in range(shards)
    }
    return found | {"common_state/shard_0_1": [_common_state(source, pattern, with_optimizer, depths, experts)]}


def _common_state(
    source: Checkpoint, pattern: Pattern, with_optimizer: bool, depths: int, experts: int
) -> dict[str, Any]:
    source.arguments()  # which says so if there are none
    state: dict[str, Any] = source.object("common_state")[0]
    kept = {"args", "checkpoint_version", "content_metadata"}
    kept |= {"optimizer", "opt_param_scheduler"} if with_optimizer else set()
    arguments: StandIn = state["args"]
    arguments.state |= {
        "num_layers": len(pattern.symbols),
        "hybrid_layer_pattern": pattern.symbols + f"/{AHEAD}" * depths,
        "mtp_num_layers": depths or None,
        "num_experts": experts or None,
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
        if isinstance(job, Copy | Stack):
            return int(largest) * itemsize
        if isinstance(job, Recut):
            return 2 * max(sum(spec.nbytes for spec in step.writes) for step in job.steps)  # what is read too
        if isinstance(job, Correct):
            # In doubles: what is missing, the original, the square and its vectors.
            inner = max(job.merge.writes, key=lambda spec: spec.nbytes)
            own = 8 * (3 * int(np.prod(inner.shape)) + 3 * min(inner.shape) ** 2)
            return max(own + sum(spec.nbytes for spec in job.writes), job_peak(job.merge))
        # The doubles, a source tensor and the result; rounding to bfloat16 takes some more.
        peak = int(largest) * (34 if itemsize == 2 else 24)
        if isinstance(job, Merge) and job.alignment is not None:
            width = max(spec.shape[-1] for spec in job.writes)
            if (calibration := job.alignment.calibration) is None:
                compared = 3 * 8 * sum(int(np.prod(spec.shape, dtype=np.int64)) for spec in job.writes)
            else:  # two layers' activations in single precision, and one more while it is brought to length one
                compared = 3 * 4 * calibration.tokens * width
            peak = max(peak, compared + 8 * width**2)
        return peak

    return sum(sorted((job_peak(job) for job in jobs), reverse=True)[:workers])
