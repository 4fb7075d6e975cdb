"""What surgery's workers do: each job makes some tensors of the new checkpoint from some of the source's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cherry_megatron.storage.checkpoint import Checkpoint
from cherry_megatron.storage.layers import LINEARS, LOOP_A, LOOP_B, LOOP_SCALES, ROLES
from cherry_megatron.storage.numbers import Mean, from_double, to_float
from cherry_megatron.storage.records import DTYPES, Array
from cherry_megatron.surgery.align import Alignment, Order, align
from cherry_megatron.surgery.cuts import Cut
from cherry_megatron.surgery.writing import Spec


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
class Normal:
    """Tensors drawn anew.

    Attributes:
        writes: what is drawn.
        stds: standard deviation of each.
        seed: values depend on it and the tensor's name.
    """

    writes: tuple[Spec, ...]
    stds: tuple[float, ...]
    seed: int
    reads: tuple[str, ...] = ()

    def make(self, source: Checkpoint) -> Iterator[Array]:
        for spec, std in zip(self.writes, self.stds, strict=True):
            draw = np.random.default_rng([self.seed, *spec.name.encode()])
            yield from_double(spec.dtype, draw.normal(0.0, std, spec.shape))


@dataclass(frozen=True)
class Router:
    """The router of a layer of experts, drawn anew; one of each loop begins as all others do.

    Attributes:
        writes: its weight, [experts, h] or [loops, experts, h].
        std: standard deviation.
        seed: values depend on it and the tensor's name.
    """

    writes: tuple[Spec]
    std: float
    seed: int
    reads: tuple[str, ...] = ()

    def make(self, source: Checkpoint) -> Iterator[Array]:
        (spec,) = self.writes
        one = Spec(spec.name, spec.dtype, spec.shape[-2:])
        for values in Normal((one,), (self.std,), self.seed).make(source):
            yield np.ascontiguousarray(np.broadcast_to(values, spec.shape))


@dataclass(frozen=True)
class Average:
    """Tensors that are plain means of others of their shape.

    Attributes:
        members: the names that each new tensor is the mean of.
        writes: the new tensors.
    """

    members: tuple[tuple[str, ...], ...]
    writes: tuple[Spec, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(name for names in self.members for name in names)

    def make(self, source: Checkpoint) -> Iterator[Array]:
        for names, spec in zip(self.members, self.writes, strict=True):
            mean = Mean(spec.name, spec.dtype)
            for name in names:
                mean.add(to_float(spec.dtype, source.read(name)))
            yield mean.result()


@dataclass(frozen=True)
class Stack:
    """One tensor of several, as they are, along a new first dimension."""

    reads: tuple[str, ...]
    writes: tuple[Spec]

    def make(self, source: Checkpoint) -> Iterator[Array]:
        (spec,) = self.writes
        whole = np.empty(spec.shape, np.dtype(DTYPES[spec.dtype][1]))
        for place, name in enumerate(self.reads):
            whole[place] = source.read(name)
        yield whole


@dataclass(frozen=True)
class Drawn:
    """A sublayer drawn anew, as training draws initial weights: the control of what a mean is worth.

    Attributes:
        writes: norm, input weight and output weight.
        std: of the input weight.
        output_std: of the output weight.
        seed: weights depend on it and the tensor's name.
    """

    writes: tuple[Spec, ...]
    std: float
    output_std: float
    seed: int
    reads: tuple[str, ...] = ()

    def make(self, source: Checkpoint) -> Iterator[Array]:
        norm, *weights = self.writes
        yield from_double(norm.dtype, np.ones(norm.shape))
        yield from Normal(tuple(weights), (self.std, self.output_std), self.seed).make(source)


@dataclass(frozen=True)
class Merge:
    """A sublayer that is the weighted mean of several.

    Attributes:
        symbol: attention or MLP.
        members: for each source sublayer the names of its tensors, by role.
        weights: one a member.
        writes: the new tensors, one a role.
        alignment: how heads or neurons are matched to those of the reference before, or None.
        moments: of the optimizer, which are averaged likewise: beginnings of names.
        recorded: the members' files in the alignment's calibration, if it has one.
    """

    symbol: str
    members: tuple[dict[str, str], ...]
    weights: tuple[float, ...]
    writes: tuple[Spec, ...]
    alignment: Alignment | None = None
    moments: tuple[str, ...] = ()
    recorded: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(
            before + names[role] for before in ("", *self.moments) for names in self.members for role in names
        )

    def make(self, source: Checkpoint) -> Iterator[Array]:
        orders = self.orders(source)
        written = iter(self.writes)
        for before in ("", *self.moments):
            for role in ROLES[self.symbol]:
                yield self.mean(source, next(written), role, orders, before)

    def orders(self, source: Checkpoint) -> list[Order | None]:
        """How the heads or neurons of each member are put in order; None leaves them."""
        if self.alignment is None or len(self.members) == 1:
            return [None] * len(self.members)
        return align(self.symbol, source, self.members, self.alignment, self.recorded)

    def mean(
        self, source: Checkpoint, spec: Spec, role: str, orders: Sequence[Order | None], before: str = ""
    ) -> Array:
        """One of the new tensors, in its stored type."""
        mean = Mean(spec.name, spec.dtype)
        for names, weight, order in zip(self.members, self.weights, orders, strict=True):
            values = to_float(spec.dtype, source.read(before + names[role]))
            mean.add(values if order is None else order.apply(role, values), weight)
        return mean.result()


@dataclass(frozen=True)
class Unroll:
    """An effective layer's sublayer: the stored one with the vectors and corrections of its loop folded in."""

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
            stored = source.read(self.names[role])
            values = self._corrected(source, role, to_float(spec.dtype, stored))
            if scale is not None:
                values = values.astype(np.float64) * scale
            yield stored if scale is None and role not in self._factors else from_double(spec.dtype, values)

    @property
    def _factors(self) -> dict[str, tuple[str, str]]:
        """For each weight that has corrections the names of their factors."""
        if self.loop is None:
            return {}
        named = {
            f"{linear}.weight": tuple(self.names.get(f"{linear}.{factor}") for factor in (LOOP_A, LOOP_B))
            for linear in LINEARS[self.symbol]
        }
        return {role: (inner, outer) for role, (inner, outer) in named.items() if inner and outer}

    def _corrected(self, source: Checkpoint, role: str, values: Array) -> Array:
        """The weight of this loop, in double precision if there is a correction."""
        if role not in self._factors:
            return values
        assert self.loop is not None
        inner, outer = (
            to_float(source.tensors[name].dtype, source.read(name))[self.loop].astype(np.float64)
            for name in self._factors[role]
        )
        whole: Array = values.astype(np.float64) + outer.reshape(len(values), -1) @ inner
        return whole

    def _scale(self, source: Checkpoint, role: str) -> Array | None:
        """The vector of this loop, [h]; None if the layer has none."""
        if role not in self.names or self.loop is None:
            return None
        hidden = self.writes[0].shape[0]
        vectors = to_float(source.tensors[self.names[role]].dtype, source.read(self.names[role]))
        return vectors.reshape(-1, hidden)[self.loop].astype(np.float64)


@dataclass(frozen=True)
class Step:
    """What one tensor of ours has to do with those of another naming.

    Attributes:
        reads: one tensor to be cut, or the parts of one to be joined.
        writes: the reverse.
        cut: how.
    """

    reads: tuple[str, ...]
    writes: tuple[Spec, ...]
    cut: Cut


@dataclass(frozen=True)
class Recut:
    """Tensors taken over as they are, cut or joined.

    Attributes:
        steps: one a tensor of ours.
        joins: whether parts are read and ours written, or the reverse.
    """

    steps: tuple[Step, ...]
    joins: bool

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(name for step in self.steps for name in step.reads)

    @property
    def writes(self) -> tuple[Spec, ...]:
        return tuple(spec for step in self.steps for spec in step.writes)

    def make(self, source: Checkpoint) -> Iterator[Array]:
        for step in self.steps:
            values = [source.read(name) for name in step.reads]
            if self.joins:
                yield step.cut.join(values, step.writes[0].shape)
            else:
                yield from step.cut.split(values[0])
