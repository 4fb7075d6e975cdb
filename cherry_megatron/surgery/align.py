"""Matching the heads and neurons of a layer to those of another, before the two are averaged.

A layer computes the same function when its FFN neurons are permuted, or its attention heads (query heads
within the query group that shares a key and value head, and whole groups). Averaging layers whose units are
in different orders mixes what does not belong together (Entezari et al. 2022; Ainsworth et al. 2023, "Git
Re-Basin", whose weight matching this is). Heads are moved whole, so that rotary embeddings stay right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cherry_megatron.model.pattern import ATTENTION
from cherry_megatron.surgery.checkpoint import Checkpoint
from cherry_megatron.surgery.layers import FC1, FC2, PROJ, QKV
from cherry_megatron.surgery.numbers import to_float
from cherry_megatron.surgery.records import Array


@dataclass(frozen=True)
class Alignment:
    """How to match.

    Attributes:
        heads: query heads.
        groups: query groups, each with a key and a value head.
        gated: whether the FFN has a gate (SwiGLU), so that fc1 is two matrices.
    """

    heads: int
    groups: int
    gated: bool


@dataclass(frozen=True)
class Order:
    """Where the rows or columns of a role's tensor come from: new[k] = old[order[k]]."""

    rows: dict[str, Array]
    columns: dict[str, Array]

    def apply(self, role: str, values: Array) -> Array:
        if role in self.rows:
            return values[self.rows[role]]
        return values[:, self.columns[role]] if role in self.columns else values


def align(symbol: str, source: Checkpoint, members: Sequence[dict[str, str]], how: Alignment) -> list[Order | None]:
    """For each member of a group the order that matches it best to the middle one, whose own is None.

    Args:
        symbol: attention or MLP.
        source: the checkpoint.
        members: names of tensors by role.
        how: the heads and the FFN's kind.
    """
    middle = len(members) // 2
    match = match_heads if symbol == ATTENTION else match_neurons

    def load(names: dict[str, str]) -> dict[str, Array]:
        return {role: to_float(source.tensors[name].dtype, source.read(name)) for role, name in names.items()}

    reference = load(members[middle])
    return [None if k == middle else match(reference, load(names), how) for k, names in enumerate(members)]


def match_neurons(reference: dict[str, Array], other: dict[str, Array], how: Alignment) -> Order:
    """Match FFN neurons by the inner products of their gate, up and down weights.

    fc1 is [2f, h] with a gate (all gates, then all ups), else [f, h]; fc2 is [h, f].
    """
    ours, theirs = _neurons(reference, how), _neurons(other, how)
    likeness = np.zeros((len(ours[0]), len(theirs[0])))
    for a, b in zip(ours, theirs, strict=True):
        likeness += a @ b.T
    order = _assign(likeness)
    size = len(order)
    rows = np.concatenate((order, order + size)) if how.gated else order
    return Order({f"{FC1}.weight": rows}, {f"{FC2}.weight": order})


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
    queries = how.heads // how.groups
    score = np.empty((how.groups, how.groups))
    inner = np.empty((how.groups, how.groups, queries), dtype=np.int64)
    for a in range(how.groups):
        for b in range(how.groups):
            likeness = ours[0][a] @ theirs[0][b].T
            inner[a, b] = _assign(likeness)
            score[a, b] = likeness[np.arange(queries), inner[a, b]].sum() + ours[1][a] @ theirs[1][b]
    outer = _assign(score)
    size = other[f"{PROJ}.weight"].shape[1] // how.heads
    rows, columns = [], []
    for a, b in enumerate(outer):
        for unit in (*inner[a, b], queries, queries + 1):
            rows.append((b * (queries + 2) + unit) * size + np.arange(size))
        for unit in inner[a, b]:
            columns.append((b * queries + unit) * size + np.arange(size))
    return Order({f"{QKV}.weight": np.concatenate(rows)}, {f"{PROJ}.weight": np.concatenate(columns)})


def _heads(layer: dict[str, Array], how: Alignment) -> tuple[Array, Array]:
    """[groups, query heads of a group, weights] of queries and outputs, [groups, weights] of keys and values."""
    queries = how.heads // how.groups
    qkv = (layer[f"{QKV}.weight"] * layer[f"{QKV}.layer_norm_weight"]).reshape(how.groups, queries + 2, -1)
    proj = layer[f"{PROJ}.weight"].T.reshape(how.groups, queries, -1)
    return np.concatenate((qkv[:, :queries], proj), axis=2), qkv[:, queries:].reshape(how.groups, -1)


def _assign(likeness: Array) -> Array:
    """For each row the column that it is matched to, so that the sum is largest."""
    from scipy.optimize import linear_sum_assignment  # here: its import is longer than averaging a layer

    columns: Array = linear_sum_assignment(likeness, maximize=True)[1]
    return columns
