"""Loop statistics against direct formulas."""

import math
from pathlib import Path

import pytest

from cherry_megatron.monitor.loops import alarms
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


HEALTHY = {"token_correlation": [0.3, 0.5, 0.6], "relative_change": [0.9, math.nan, 0.2]}


def test_healthy_loops_raise_no_alarm():
    assert alarms(HEALTHY, {1: 3.9, 2: 3.6, 3: 3.5}) == []
    assert alarms({name: values[:1] for name, values in HEALTHY.items()}, {1: 3.9}) == []


def test_each_way_to_collapse_raises_an_alarm():
    statistics = {"token_correlation": [0.3, 0.995, 0.999], "relative_change": [0.9, math.nan, 0.0002]}
    alike, still, ignored = alarms(statistics, {1: 3.5001, 2: 3.5, 3: 3.4999})
    assert alike.startswith("loops [2, 3] have made all tokens alike")
    assert still.startswith("loops [3] do nothing")
    assert ignored.startswith("the model ignores its loops: their number is 1 or 3, its loss 3.5001 or 3.4999")
