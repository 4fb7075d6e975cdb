"""The low-rank corrections with which a compressed model starts: what each loop lacks of its original layer.

A core layer's weight W is shared by its loops; loop l computes with W + B_l A_l (see model/corrections.py). The
best B_l A_l of a rank is the truncated singular value decomposition of what is missing, the original layer less
the shared one (Eckart & Young 1936; used so by Bae et al. 2025, "Relaxed Recursive Transformers").
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cherry_megatron.errors import CherryError
from cherry_megatron.storage.checkpoint import Checkpoint
from cherry_megatron.storage.layers import FC1, LINEARS, LOOP_A, LOOP_B, ROLES
from cherry_megatron.storage.numbers import from_double, to_float
from cherry_megatron.storage.records import Array
from cherry_megatron.surgery.align import Order
from cherry_megatron.surgery.jobs import Merge
from cherry_megatron.surgery.writing import Spec


@dataclass(frozen=True)
class Correct:
    """The corrections of a core layer's sublayer.

    Attributes:
        merge: what makes the shared weights. They are made once more here: all sublayers are independent jobs.
        originals: the tensors, by role, of all sublayers that it stands in for, in the order of the loops: the
            members of the mean, unless one of the group was selected.
        writes: A [loops, rank, in] and B [loops, parts, out/parts, rank] of each linear layer; see `factors`.
    """

    merge: Merge
    originals: tuple[dict[str, str], ...]
    writes: tuple[Spec, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        originals = [name for names in self.originals for name in names.values()]
        return tuple(dict.fromkeys((*self.merge.reads, *originals)))

    def make(self, source: Checkpoint) -> Iterator[Array]:
        orders = self.merge.orders(source)
        norm, *weights = (
            _Shared(spec.dtype, role, to_float(spec.dtype, self.merge.mean(source, spec, role, orders)))
            for spec, role in zip(self.merge.writes, ROLES[self.merge.symbol], strict=True)
        )
        if len(orders) != len(self.originals):
            orders = [None] * len(self.originals)
        for weight, inner, outer in zip(weights, self.writes[::2], self.writes[1::2], strict=True):
            loops, rank, _ = inner.shape
            pairs = [
                truncated(self._missing(source, weight, norm, orders, loop, loops), rank) for loop in range(loops)
            ]
            yield from_double(inner.dtype, np.stack([a for _, a in pairs]))
            yield from_double(outer.dtype, np.stack([b for b, _ in pairs]).reshape(outer.shape))

    def _missing(
        self,
        source: Checkpoint,
        weight: "_Shared",
        norm: "_Shared",
        orders: Sequence[Order | None],
        loop: int,
        loops: int,
    ) -> Array:
        """The original weight of a loop less the shared one, [out, in]; of several originals their mean."""
        count = len(self.originals)
        first, last = loop * count // loops, (loop + 1) * count // loops
        missing = -weight.values.astype(np.float64)
        for member in range(first, max(last, first + 1)):
            names, order = self.originals[member], orders[member]
            original = to_float(weight.dtype, source.read(names[weight.role])).astype(np.float64)
            if order is not None:
                original = order.apply(weight.role, original)
            if norm.role.startswith(weight.role.removesuffix("weight")):
                # Its norm is shared too: what the original's differs by goes into the matrix behind it.
                ratio = to_float(norm.dtype, source.read(names[norm.role])).astype(np.float64)
                original *= np.divide(ratio, norm.values, out=np.ones_like(ratio), where=norm.values != 0)
            missing += original / max(last - first, 1)
        return missing


@dataclass(frozen=True)
class _Shared:
    """A tensor that all loops use, as `to_float` gives it."""

    dtype: str
    role: str
    values: Array


def factors(prefix: str, merge: Merge, loops: int, rank: int, gated: bool) -> tuple[Spec, ...]:
    """The tensors of a sublayer's corrections.

    Args:
        prefix: of its names.
        merge: what makes its weights.
        loops, rank: how many corrections, and of what rank.
        gated: whether fc1 is two matrices, which ranks cut one by one.

    Raises:
        CherryError: if the rank is larger than a weight's.
    """
    found = []
    for linear, weight in zip(LINEARS[merge.symbol], merge.writes[1:], strict=False):
        outputs, inputs = weight.shape
        if rank > min(outputs, inputs):
            raise CherryError(
                f"recurrence.loop_rank is {rank}, but {linear} of {outputs} x {inputs} has no larger rank than "
                f"{min(outputs, inputs)}; use that or less"
            )
        parts = 2 if linear == FC1 and gated else 1
        found.append(Spec(f"{prefix}{linear}.{LOOP_A}", weight.dtype, (loops, rank, inputs)))
        found.append(Spec(f"{prefix}{linear}.{LOOP_B}", weight.dtype, (loops, parts, outputs // parts, rank)))
    return tuple(found)


def truncated(matrix: Array, rank: int) -> tuple[Array, Array]:
    """B [out, rank] and A [rank, in] whose product is nearest to a matrix [out, in].

    The one at the matrix's shorter side is orthonormal, so that both get a gradient where the matrix is zero.
    """
    from scipy.linalg import eigh  # here: its import is longer than averaging a layer

    tall = matrix.shape[0] > matrix.shape[1]
    square = matrix.T @ matrix if tall else matrix @ matrix.T
    vectors = eigh(square, subset_by_index=(len(square) - rank, len(square) - 1))[1][:, ::-1]
    return (matrix @ vectors, vectors.T) if tall else (vectors, vectors.T @ matrix)
