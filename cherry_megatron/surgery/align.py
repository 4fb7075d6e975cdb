"""Matching the heads and neurons of a layer to those of another, before the two are averaged.

A layer computes the same function when its FFN neurons are permuted, or its attention heads (query heads
within the query group that shares a key and value head, and whole groups). Averaging layers whose units are
in different orders mixes what does not belong together (Entezari et al. 2022). Units are matched by their
weights or by their activations on the same text (Ainsworth et al. 2023, "Git Re-Basin"; Li et al. 2015): these
see no direction that text never takes. Heads are moved whole, so that rotary embeddings stay right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cherry_megatron.model.pattern import ATTENTION
from cherry_megatron.storage.checkpoint import Checkpoint
from cherry_megatron.storage.layers import FC1, FC2, PROJ, QKV
from cherry_megatron.storage.numbers import to_float
from cherry_megatron.storage.records import Array
from cherry_megatron.surgery.activations import Calibration

ACTIVATIONS = "activations"  # beside the roles of a layer's tensors


@dataclass(frozen=True)
class Alignment:
    """How to match.

    Attributes:
        heads: query heads.
        groups: query groups, each with a key and a value head.
        gated: whether the FFN has a gate (SwiGLU), so that fc1 is two matrices.
        calibration: where activations lie; None matches by weights.
        to_first: match to the first member instead of the middle one.
    """

    heads: int
    groups: int
    gated: bool
    calibration: Calibration | None = None
    to_first: bool = False


@dataclass(frozen=True)
class Order:
    """Where the rows or columns of a role's tensor come from: new[k] = old[order[k]]."""

    rows: dict[str, Array]
    columns: dict[str, Array]

    def apply(self, role: str, values: Array) -> Array:
        if role in self.rows:
            return values[self.rows[role]]
        return values[:, self.columns[role]] if role in self.columns else values


def align(
    symbol: str,
    source: Checkpoint,
    members: Sequence[dict[str, str]],
    how: Alignment,
    recorded: Sequence[str],
) -> list[Order | None]:
    """For each member of a group the order that matches it best to the reference, whose own is None.

    Args:
        symbol: attention or MLP.
        source: the checkpoint.
        members: names of tensors by role.
        how: the heads and the FFN's kind, and by what they are matched.
        recorded: the members' files in the calibration, if there is one.
    """
    place = 0 if how.to_first else len(members) // 2
    if how.calibration is None:
        match = match_heads if symbol == ATTENTION else match_neurons
    else:
        match = match_heads_by_activations if symbol == ATTENTION else match_neurons_by_activations

    def load(k: int) -> dict[str, Array]:
        wanted = members[k] if how.calibration is None else members[k].keys() & {f"{PROJ}.weight"}
        names = {role: members[k][role] for role in wanted}
        layer = {role: to_float(source.tensors[name].dtype, source.read(name)) for role, name in names.items()}
        return layer if how.calibration is None else {**layer, ACTIVATIONS: how.calibration.read(recorded[k])}

    reference = load(place)
    return [None if k == place else match(reference, load(k), how) for k in range(len(members))]


def match_neurons(reference: dict[str, Array], other: dict[str, Array], how: Alignment) -> Order:
    """Match FFN neurons by the inner products of their gate, up and down weights.

    fc1 is [2f, h] with a gate (all gates, then all ups), else [f, h]; fc2 is [h, f].
    """
    ours, theirs = _neurons(reference, how), _neurons(other, how)
    likeness = np.zeros((len(ours[0]), len(theirs[0])))
    for a, b in zip(ours, theirs, strict=True):
        likeness += a @ b.T
    return _order_neurons(likeness, how)


def _neurons(layer: dict[str, Array], how: Alignment) -> list[Array]:
    """Matrices of a row a neuron: gate and up with the norm folded in, and down."""
    inner = layer[f"{FC1}.weight"] * layer[f"{FC1}.layer_norm_weight"]
    return [*np.split(inner, 2 if how.gated else 1), layer[f"{FC2}.weight"].T]


def match_heads(reference: dict[str, Array], other: dict[str, Array], how: Alignment) -> Order:
    """Match query groups, and query heads within matched groups, by the inner products of their weights.

    Megatron's qkv is [groups, heads a group + 2, d, h]: the queries, the key, the value of each group;
    proj is [h, heads, d].
    """
    ours, theirs = _heads(reference, how), _heads(other, how)
    size = other[f"{PROJ}.weight"].shape[1] // how.heads
    return _order_heads(ours[0] @ theirs[0].T, ours[1] @ theirs[1].T, how, size)


def _heads(layer: dict[str, Array], how: Alignment) -> tuple[Array, Array]:
    """[heads, weights] of queries and outputs, [groups, weights] of keys and values."""
    queries = how.heads // how.groups
    qkv = (layer[f"{QKV}.weight"] * layer[f"{QKV}.layer_norm_weight"]).reshape(how.groups, queries + 2, -1)
    proj = layer[f"{PROJ}.weight"].T.reshape(how.heads, -1)
    return (
        np.concatenate((qkv[:, :queries].reshape(how.heads, -1), proj), axis=1),
        qkv[:, queries:].reshape(how.groups, -1),
    )


def match_neurons_by_activations(reference: dict[str, Array], other: dict[str, Array], how: Alignment) -> Order:
    """Match FFN neurons by the cosines of their activations over the tokens, [tokens, f].

    A neuron computes the same when its up weights are multiplied and its down weights divided by a number; the
    cosine does not see how large that is, and neither do large neurons decide where small ones go.
    """
    ours, theirs = (_of_length_one(layer[ACTIVATIONS]) for layer in (reference, other))
    return _order_neurons(ours.T @ theirs, how)


def _of_length_one(values: Array) -> Array:
    """Columns divided by their lengths; one of zeros, a neuron that never fires, stays and is like no other."""
    lengths: Array = np.linalg.norm(values, axis=0)
    return values / np.where(lengths > 0, lengths, 1)


def match_heads_by_activations(reference: dict[str, Array], other: dict[str, Array], how: Alignment) -> Order:
    """Match query groups, and query heads within matched groups, by what the heads add to the residual stream.

    Two heads are as like as the cosine of what they add, taken over all tokens. Plain inner products would pair
    those that add most in their layers, by chance likeness, where a head adds much in one and little in the other.
    What a group's key and value do is seen in what its heads add.
    """
    likeness = _products(reference, other, how.heads)
    squares = [np.diagonal(_products(layer, layer, how.heads)).clip(min=0) for layer in (reference, other)]
    lengths = np.sqrt(np.outer(*squares))
    likeness /= np.where(lengths > 0, lengths, 1)
    size = other[f"{PROJ}.weight"].shape[1] // how.heads
    return _order_heads(likeness, np.zeros((how.groups, how.groups)), how, size)


def _products(ours: dict[str, Array], theirs: dict[str, Array], heads: int) -> Array:
    """sum_t <C_a(t) W_a, C_b(t) W_b> of all pairs of heads, [heads, heads].

    C_a is what head a puts out, [tokens, d], and W_a its slice of the output projection, [d, h]. The sum is that of
    the products of the entries of C_a^T C_b and W_a W_b^T, both [d, d]: [tokens, heads, h] is never made.
    """
    weights = f"{PROJ}.weight"
    grams = (ours[ACTIVATIONS].T @ theirs[ACTIVATIONS]) * (ours[weights].T @ theirs[weights])
    size = len(grams) // heads
    products: Array = grams.reshape(heads, size, heads, size).sum(axis=(1, 3), dtype=np.float64)
    return products


def _order_neurons(likeness: Array, how: Alignment) -> Order:
    """The best order by the likeness of all pairs, [f, f]."""
    order = _assign(likeness)
    rows = np.concatenate((order, order + len(order))) if how.gated else order
    return Order({f"{FC1}.weight": rows}, {f"{FC2}.weight": order})


def _order_heads(heads: Array, groups: Array, how: Alignment, size: int) -> Order:
    """The best order of groups and of heads within them.

    Args:
        heads: likeness of all pairs of query heads, [heads, heads].
        groups: likeness of all pairs of groups beside that of their heads, [groups, groups].
        how: their numbers.
        size: of a head.
    """
    queries = how.heads // how.groups
    score = groups.astype(np.float64)
    inner = np.empty((how.groups, how.groups, queries), dtype=np.int64)
    for a in range(how.groups):
        for b in range(how.groups):
            likeness = heads[a * queries : (a + 1) * queries, b * queries : (b + 1) * queries]
            inner[a, b] = _assign(likeness)
            score[a, b] += likeness[np.arange(queries), inner[a, b]].sum()
    rows, columns = [], []
    for a, b in enumerate(_assign(score)):
        for unit in (*inner[a, b], queries, queries + 1):
            rows.append((b * (queries + 2) + unit) * size + np.arange(size))
        for unit in inner[a, b]:
            columns.append((b * queries + unit) * size + np.arange(size))
    return Order({f"{QKV}.weight": np.concatenate(rows)}, {f"{PROJ}.weight": np.concatenate(columns)})


def _assign(likeness: Array) -> Array:
    """For each row the column that it is matched to, so that the sum is largest."""
    from scipy.optimize import linear_sum_assignment  # here: its import is longer than averaging a layer

    columns: Array = linear_sum_assignment(likeness, maximize=True)[1]
    return columns
