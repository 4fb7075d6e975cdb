"""How one tensor of ours becomes several of another naming, and these one again; to the bit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cherry_megatron.storage.records import Array

Size = tuple[int, ...]


class Cut(Protocol):
    """What becomes of one tensor. Both ways keep every bit."""

    def shapes(self, shape: Size) -> list[Size]:
        """Of the parts of a tensor of this shape."""
        ...

    def split(self, whole: Array) -> list[Array]:
        """The parts."""
        ...

    def join(self, parts: Sequence[Array], shape: Size) -> Array:
        """The tensor of this shape that has these parts."""
        ...


@dataclass(frozen=True)
class Whole:
    """The same values in one tensor, perhaps of another shape.

    Attributes:
        shape: of the part; None: as it is.
    """

    shape: Size | None = None

    def shapes(self, shape: Size) -> list[Size]:
        return [self.shape or shape]

    def split(self, whole: Array) -> list[Array]:
        return [whole.reshape(self.shape or whole.shape)]

    def join(self, parts: Sequence[Array], shape: Size) -> Array:
        return parts[0].reshape(shape)


@dataclass(frozen=True)
class Halves:
    """Rows of a gate, then those of what it lets through."""

    def shapes(self, shape: Size) -> list[Size]:
        return [(shape[0] // 2, *shape[1:])] * 2

    def split(self, whole: Array) -> list[Array]:
        return np.split(whole, 2)

    def join(self, parts: Sequence[Array], shape: Size) -> Array:
        return np.concatenate(parts)


@dataclass(frozen=True)
class Heads:
    """Rows of queries, keys and values: Megatron's by groups (queries of the group, its key, its value), or three.

    Both rotate the halves of a head, so rows within a head keep their order.

    Attributes:
        heads: of queries.
        groups: of keys and values.
        size: rows of each.
    """

    heads: int
    groups: int
    size: int

    def shapes(self, shape: Size) -> list[Size]:
        return [(count * self.size, *shape[1:]) for count in (self.heads, self.groups, self.groups)]

    def split(self, whole: Array) -> list[Array]:
        grouped = whole.reshape(self.groups, -1, self.size, *whole.shape[1:])
        parts = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
        return [part.reshape(-1, *whole.shape[1:]) for part in parts]

    def join(self, parts: Sequence[Array], shape: Size) -> Array:
        grouped = [part.reshape(self.groups, -1, self.size, *shape[1:]) for part in parts]
        return np.concatenate(grouped, axis=1).reshape(shape)


@dataclass(frozen=True)
class Padded:
    """Rows of a vocabulary, behind which ours may have more, of zeros.

    Attributes:
        rows: of theirs.
    """

    rows: int

    def shapes(self, shape: Size) -> list[Size]:
        return [(self.rows, *shape[1:])]

    def split(self, whole: Array) -> list[Array]:
        return [whole[: self.rows]]

    def join(self, parts: Sequence[Array], shape: Size) -> Array:
        (part,) = parts
        if part.shape == shape:
            return part
        padded: Array = np.zeros(shape, part.dtype)
        padded[: self.rows] = part
        return padded
