"""The search ends at the largest micro-batch that trains, and every row of it is allowed."""

from types import SimpleNamespace

import pytest


@pytest.mark.parametrize(
    ("fits", "start", "tried"),
    [(3, 3, [3, 4]), (3, 1, [1, 2, 3, 4]), (3, 5, [5, 4, 3]), (0, 2, [2, 1]), (40, 32, [32, 34, 36, 38, 40, 42])],
)
def test_search(fits, start, tried, benchmark_script, monkeypatch):
    script = benchmark_script("largest_batch")
    seen = []

    def train(configuration, overrides, flags, options):
        seen.append(int(flags[flags.index("--global-batch-size") + 1]))
        assert f"megatron.micro-batch-size={seen[-1]}" in overrides
        if seen[-1] > fits:
            raise RuntimeError("failed with status 1")
        return [{"seconds": float(seen[-1])}]

    monkeypatch.setattr(script, "train", train)
    size, steps = script.largest(script.ROWS[0], start, SimpleNamespace())
    assert seen == tried and size == fits and [step["seconds"] for step in steps] == [fits] * bool(fits)


def test_rows_are_allowed_and_more_fits_where_activations_are_recomputed(benchmark_script):
    script = benchmark_script("largest_batch")
    found = {(row.configuration, row.sequence, row.recompute): script.predicted(row, 79.2) for row in script.ROWS}
    assert found["cherry_227m", 4096, False] >= 8
    for (configuration, sequence, recompute), size in found.items():
        assert not recompute or size > 2 * found[configuration, sequence, False]
    assert script.ROWS[0].flops == pytest.approx(5.26e9, rel=0.02)
