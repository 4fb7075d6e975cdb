"""The highest losses of a global batch: those of a sort, whatever ranks and micro-batches they lie on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import run_ranks

SHAPE = (3, 2, 4)  # micro-batches, rows, tokens


def expected(scores: np.ndarray, masks: np.ndarray, share: float) -> np.ndarray:
    """[m, ranks, b, s]: a stable sort of the tokens that may be selected, in the order of the data."""
    order = sorted(np.flatnonzero(masks), key=lambda place: -scores.flat[place])
    chosen = np.zeros(scores.shape)
    chosen.flat[order[: max(round(share * len(order)), 1)]] = 1
    return chosen


def drawn(seed: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    shape = (SHAPE[0], ranks, *SHAPE[1:])
    return draw.integers(0, 5, shape).astype(np.float32), draw.integers(0, 2, shape).astype(np.float32)


def _highest(seed: int, share: float, ranks: int) -> tuple[list, float]:
    import os

    import torch

    from cherry_megatron.sgt.online import highest

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    scores, masks = (torch.from_numpy(values[:, rank].copy()) for values in drawn(seed, ranks))
    selected, rho = highest(scores, masks, share, torch.distributed.group.WORLD)
    return selected.tolist(), rho


def _many() -> int:
    """Property test on one rank; equal scores are the rule, as there are five values."""
    tried = []

    @given(st.integers(0, 10_000), st.floats(0.01, 1.0))
    def run(seed: int, share: float) -> None:
        scores, masks = drawn(seed, 1)
        selected, rho = _highest(seed, share, 1)
        wanted = expected(scores, masks, share) if masks.any() else np.zeros(scores.shape)
        assert np.array_equal(np.array(selected), wanted[:, 0])
        assert rho == (wanted.sum() / masks.sum() if masks.any() else 1.0)
        tried.append(seed)

    run()
    return len(tried)


def test_they_are_those_of_a_sort(tmp_path):
    assert run_ranks(tmp_path, 1, _many)[0] > 50


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_over_ranks(share, tmp_path):
    scores, masks = drawn(7, 2)
    wanted = expected(scores, masks, share)
    for rank, (selected, rho) in enumerate(run_ranks(tmp_path, 2, _highest, 7, share, 2)):
        assert np.array_equal(np.array(selected), wanted[:, rank])
        assert rho == wanted.sum() / masks.sum()
