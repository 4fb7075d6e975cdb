"""Arithmetic in double precision on stored types, rounded once."""

import numpy as np

from cherry_megatron.errors import CherryError
from cherry_megatron.storage.records import DTYPES, Array

FLOATS = ("float64", "float32", "float16", "bfloat16")


def to_float(dtype: str, values: Array) -> Array:
    """Values as floating-point numbers that numpy computes with, of 32 bits or more; exact.

    Args:
        dtype: torch's name of the stored type, one of FLOATS.
        values: as stored.
    """
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32) if dtype == "float16" else values


def from_double(dtype: str, values: Array) -> Array:
    """Doubles rounded once to a stored type, to the nearest, ties to even."""
    if dtype != "bfloat16":
        return values.astype(DTYPES[dtype][1], copy=False)
    # Rounding to float32 first would round twice. Rounded to odd instead, the second rounding sees on which
    # side of a tie the double was (Boldo & Melquiond 2008).
    with np.errstate(over="ignore"):  # too large for the type: infinity
        single = values.astype(np.float32)
    bits = single.view(np.uint32)
    away = np.abs(single.astype(np.float64)) > np.abs(values)
    inexact = single != values
    bits = np.where(away, bits - 1, bits) | inexact
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Mean:
    """A weighted mean, accumulated in double precision in the order in which the values come."""

    def __init__(self, name: str, dtype: str) -> None:
        if dtype not in FLOATS:
            raise CherryError(f"{name} is of the type {dtype}, which cannot be averaged")
        self._name, self._dtype = name, dtype
        self._sum: Array | None = None
        self._weights = 0.0

    def add(self, values: Array, weight: float = 1.0) -> None:
        """Add values as `to_float` gives them."""
        if self._sum is None:
            self._sum = values.astype(np.float64)
            if weight != 1.0:
                self._sum *= weight
        elif weight == 1.0:
            self._sum += values
        else:
            self._sum += values.astype(np.float64) * weight
        self._weights += weight

    def result(self) -> Array:
        """The mean in the stored type.

        Raises:
            CherryError: if it is not finite.
        """
        assert self._sum is not None
        self._sum /= self._weights
        if not np.isfinite(self._sum.sum()) and not np.isfinite(self._sum).all():
            raise CherryError(f"{self._name}: the mean is not finite; the checkpoint holds infinities or NaN")
        return from_double(self._dtype, self._sum)
