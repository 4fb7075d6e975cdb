"""Variants are built and compared: equal weights and tokens, and a difference where there is one."""

import sys

from tests.benchmarks.conftest import FOLDER
from tests.conftest import run_ranks


def measured(path):
    sys.path.insert(0, str(FOLDER))
    import variants

    from cherry_megatron.config import load

    at = variants.bench(load(path, []), 2)
    first, again, other = (
        at.measure(variants.Variant(args, config))
        for args, config in (
            ({}, {}),
            ({}, {}),
            (
                {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"},
                {"bias_dropout_fusion": True},
            ),
        )
    )
    parts = {
        name: variants.row(name, found, first, 64).split(" | ")[-2:]
        for name, found in (("again", again), ("other", other))
    }
    return {name: [float(part.strip(" |")) for part in both] for name, both in parts.items()}


def test_variants_are_compared(tmp_path, write_config):
    (found,) = run_ranks(tmp_path, 1, measured, write_config(tmp_path))
    assert found["again"] == [0, 0]
    loss, gradient = found["other"]  # its gradient is rounded to BF16
    assert loss <= 1e-5
    assert 1e-4 < gradient < 1e-2
