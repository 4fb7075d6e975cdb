"""Gaps between losses are those by hand."""

import pytest


def test_row(benchmark_script):
    row = benchmark_script("precision").row
    first = [4.0] * 10 + [2.0] * 20
    found = row("FP8", [4.4] * 10 + [2.01] * 20, first).split(" | ")
    assert found[:4] == ["| FP8", "2.0100", "+0.0100", "+0.50%"]
    assert float(found[4]) == pytest.approx((10 * 0.4 + 20 * 0.01) / 30, abs=1e-4)
    assert found[5] == "1.0e-01 |"
