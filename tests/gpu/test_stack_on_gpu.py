"""Looped equals hand-unrolled with Transformer Engine's layers, against the plain PyTorch reference."""

from pathlib import Path

import pytest

from tests.conftest import HAS_GPU, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("order", ["cycle", "sequence"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_looped_equals_hand_unrolled(implementation, order, recompute, tmp_path: Path):
    from cherry_megatron.model.options import Recurrence
    from tests.model.test_stack import compare

    looped = {"loop_scales": True, "loop_rank": 3} if order == "cycle" else {}
    recurrence = Recurrence("*-[*-*-]x4*-", order=order, **looped)
    (errors,) = run_ranks(tmp_path, 1, compare, recurrence, recompute, None, implementation)
    worst = max(errors, key=errors.get)
    print(f"{implementation} {order}: {worst} {errors[worst]:.2e}")
    # Transformer Engine multiplies FP32 matrices in TF32 (10 bits of mantissa); torch here does not.
    tolerance = 5e-3 if implementation == "transformer_engine" else 2e-6
    assert errors[worst] <= tolerance, (worst, errors[worst])


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_kept_keys_and_values_give_the_logits_of_one_pass(implementation, tmp_path: Path):
    from tests.model.test_cache import CASES, compare

    (found,) = run_ranks(tmp_path, 1, compare, CASES[:2], 2, implementation)
    tolerance = 2e-2 if implementation == "transformer_engine" else 1e-4  # of logits of about 2; TF32 as above
    for tried, (error, _) in found.items():
        assert error <= tolerance, tried
