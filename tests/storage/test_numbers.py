"""Means and rounding against exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cherry_megatron.errors import CherryError
from cherry_megatron.storage.numbers import Mean, from_double, to_float


def nearest_bfloat16(value: float) -> float:
    """Rounded by exact fractions: 8 significant bits, ties to even."""
    if value == 0 or math.isinf(value):
        return value
    exponent = max(math.frexp(value)[1], -125)
    unit = Fraction(2) ** (exponent - 8)
    below, rest = divmod(Fraction(value) / unit, 1)
    rounded = (below + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2))) * unit
    return math.copysign(math.inf, value) if abs(rounded) >= Fraction(2) ** 128 else float(rounded)


near_ties = st.builds(
    lambda high, low, exponent, sign: sign * (1 + high / 128 + low) * 2.0**exponent,
    st.integers(0, 127), st.sampled_from([2**-8, 2**-8 + 2**-40, 2**-8 - 2**-40]), st.integers(-140, 126),
    st.sampled_from([1, -1]),
)  # fmt: skip


@given(st.lists(st.floats(allow_nan=False) | near_ties, min_size=1))
def test_doubles_are_rounded_to_bfloat16_once(values):
    stored = from_double("bfloat16", np.array(values))
    assert to_float("bfloat16", stored).tolist() == [nearest_bfloat16(value) for value in values]


@given(st.integers(0, 2**16 - 1))
def test_bfloat16_bits_are_what_torch_takes_them_for(bits):
    ours = to_float("bfloat16", np.array([bits], np.uint16))
    theirs = torch.tensor([bits], dtype=torch.uint16).view(torch.bfloat16).float().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_a_mean_that_is_not_finite_is_refused():
    mean = Mean("weight", "float32")
    mean.add(np.array([1.0, np.nan], np.float32))
    with pytest.raises(CherryError, match="weight: the mean is not finite"):
        mean.result()


def test_whole_numbers_are_not_averaged():
    with pytest.raises(CherryError, match="counts is of the type int64"):
        Mean("counts", "int64")
