"""Gaps between losses are those by hand, and FP32 is what it says."""

import os
import sys

import pytest


def test_row(benchmark_script):
    row = benchmark_script("precision").row
    first = [4.0] * 10 + [2.0] * 20
    found = row("FP8", [4.4] * 10 + [2.01] * 20, first).split(" | ")
    assert found[:4] == ["| FP8", "2.0100", "+0.0100", "+0.50%"]
    assert float(found[4]) == pytest.approx((10 * 0.4 + 20 * 0.01) / 30, abs=1e-4)
    assert found[5] == "1.0e-01 |"


def test_float32_is_not_tf32(benchmark_script, tmp_path, monkeypatch):
    """Transformer Engine asks for TF32 wherever all is FP32; trainings inherit that cuBLAS must not."""
    script = benchmark_script("precision")
    seen = []

    def train(configuration, overrides, flags, options):
        seen.append(os.environ.get("NVIDIA_TF32_OVERRIDE"))
        return [{"loss": 2.0}] * 20

    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setattr(script, "train", train)
    given = ["--tokenizer", "t", "--data", "d", "--output", str(tmp_path / "r.md"), "--only", "reduced"]
    monkeypatch.setattr(sys, "argv", ["precision.py", *given])
    script.main()
    assert seen == ["0"] * len(script.GROUPS["reduced"])
