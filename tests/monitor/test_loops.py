"""Loop statistics against direct formulas."""

from pathlib import Path

import pytest

from tests.conftest import run_ranks


def statistics():
    from cherry_megatron.model.options import Recurrence
    from cherry_megatron.monitor.loops import LoopTrace
    from tests.model.test_stack import build

    build(Recurrence("*-[*-*-]x3*-"))
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection

    torch.manual_seed(0)
    before, after = torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    trace = LoopTrace(3, None)
    trace.add(0, before, after)
    trace.add(1, None, after)
    found = trace.reduce(ProcessGroupCollection.use_mpu_process_groups())
    cosines = []
    for b in range(2):
        matrix = torch.nn.functional.cosine_similarity(after[:, b, None], after[None, :, b], dim=-1)
        cosines.append((matrix.sum() - 6) / 30)
    expected = {
        "residual_norm": float(after.square().mean().sqrt()),
        "relative_change": float((after - before).norm() / before.norm()),
        "token_correlation": float(sum(cosines) / 2),
    }
    return found, expected


def test_statistics_by_their_definitions(tmp_path: Path):
    ((found, expected),) = run_ranks(tmp_path, 1, statistics)
    for name, value in expected.items():
        assert len(found[name]) == 2, "loops that no rank walked are left out"
        assert found[name][0] == pytest.approx(value, rel=1e-5)
    change = found["relative_change"][1]
    assert change != change, "a loop that began on another stage has no relative change"
