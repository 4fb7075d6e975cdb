"""The unrolled model over pipeline stages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cherry_megatron.errors import CherryError
from cherry_megatron.model.options import Recurrence
from cherry_megatron.model.plan import make_plan
from cherry_megatron.model.shape import Shape

SHAPE = Shape(hidden=1280, ffn=3200, heads=10, groups=10, head_size=128, vocabulary=44544)


def test_the_head_costs_about_three_layers():
    plan = make_plan(Recurrence("*-[(*-)x4]x8*-"), SHAPE, 1, 2)
    assert [len(s) for s in plan.stages] == [18, 16]  # 18.1 against 16 + 3.0 layers
    assert SHAPE.head_flops / SHAPE.forward_flops("*-", 1) == pytest.approx(3.03, abs=0.01)


def test_a_boundary_inside_a_loop_replicates_the_core():
    plan = make_plan(Recurrence("*-[*-*-]x3*-", stages=(4, 4)), SHAPE, 1, 2)
    assert plan.held == ((0, 1, 2), (1, 2, 3))
    assert plan.megatron_pattern == "*-*-*-|*-*-*-"
    assert plan.stored_index == (0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7)
    assert [plan.holders(layer) for layer in range(4)] == [(0,), (0, 1), (0, 1), (1,)]


def test_prediction_ahead_is_on_the_last_stage_and_costs_there():
    without, ahead = (make_plan(Recurrence("*-[(*-)x4]x8*-"), SHAPE, 1, 2, depths) for depths in (0, 2))
    assert ahead.megatron_pattern == without.megatron_pattern + "/*-/*-"
    # Two depths of 4.2 layers each: their own, the joining of two states, the output layer.
    assert [len(s) for s in ahead.stages] == [23, 11]
    assert SHAPE.depth_flops(1) / SHAPE.forward_flops("*-", 1) == pytest.approx(4.2, abs=0.01)


def test_sequence_order_replicates_only_the_layer_that_is_cut():
    plan = make_plan(Recurrence("*-[*-*-]x3*-", order="sequence", stages=(5, 3)), SHAPE, 1, 2)
    assert plan.held == ((0, 1, 2), (2, 3))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 8), st.sampled_from(["cycle", "sequence"]))
def test_every_effective_layer_is_on_one_stage_and_its_layer_there(core, loops, stages, order):
    recurrence = Recurrence(f"*-[(*-)x{core}]x{loops}*-", order=order)
    total = 2 + core * loops
    if stages > total:
        with pytest.raises(CherryError, match="pipeline-model-parallel-size"):
            make_plan(recurrence, SHAPE, 128, stages)
        return
    plan = make_plan(recurrence, SHAPE, 128, stages)
    assert len(plan.visits) == total
    assert len(plan.stages) == stages
    for visits, held in zip(plan.stages, plan.held, strict=True):
        assert {v.layer for v in visits} == set(held)
    assert len(plan.stored_index) == sum(2 * len(held) for held in plan.held)


def test_stages_must_add_up():
    with pytest.raises(CherryError, match="add up to 8"):
        make_plan(Recurrence("*-[*-*-]x3*-", stages=(4, 5)), SHAPE, 1, 2)
