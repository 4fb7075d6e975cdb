"""Parameters, FLOPs and memory: the published sizes, hand-computed cases, and the model itself."""

from dataclasses import replace
from pathlib import Path

import pytest

from cherry_megatron.model.options import Mixture, Recurrence
from cherry_megatron.model.plan import make_plan
from cherry_megatron.model.shape import Shape
from cherry_megatron.monitor.accounting import Layout, account, memory, most_walked, together, training_flops
from tests.conftest import run_ranks

SHAPE = Shape(hidden=1280, ffn=3200, heads=10, groups=10, head_size=128, vocabulary=44544)
SMALL = Shape(hidden=32, ffn=48, heads=4, groups=2, head_size=8, vocabulary=64)
SIZES = {"cherry_227m": (227.1, 754.7), "dense_566m": (566.3, 566.3), "base_1b": (1018.6, 1018.6)}


def load_all():
    from cherry_megatron.config import load
    from cherry_megatron.platform.machine import prepare

    prepare()
    result = {}
    for name in SIZES:
        config = load(Path(__file__).parents[2] / f"configs/{name}.yaml")
        rows = together(account(config.recurrence, config.shape, config.value("seq-length")))
        result[name] = (rows.stored, rows.effective, rows.flops)
    return result


def test_shipped_configurations_have_the_papers_sizes(tmp_path: Path):
    (sizes,) = run_ranks(tmp_path, 1, load_all)
    for name, (stored, effective) in SIZES.items():
        assert round(sizes[name][0] / 1e6, 1) == stored
        assert round(sizes[name][1] / 1e6, 1) == effective
    assert sizes["base_1b"][0] == pytest.approx(1019e6, rel=1e-3)
    assert sizes["cherry_227m"][2] == pytest.approx(5.255e9, rel=1e-3)


def test_the_untied_twin_costs_the_same_flops():
    looped = training_flops(Recurrence("*-[(*-)x4]x8*-"), SHAPE, 4096)
    assert looped == training_flops(Recurrence("(*-)x34"), SHAPE, 4096)
    # 6 for each of 34 layers' 18.84M weights and of the head's 57M, 6*h*s for attention in each layer
    by_hand = 6 * (34 * (4 * 1280**2 + 3 * 1280 * 3200) + 1280 * 44544) + 34 * 6 * 1280 * 4096
    assert looped == by_hand


def test_fewer_loops_cost_less():
    recurrence = Recurrence("*-[(*-)x4]x8*-", loops=1)
    assert training_flops(recurrence, SHAPE, 4096) == training_flops(Recurrence("(*-)x6"), SHAPE, 4096)


def test_corrections_cost_a_product_a_walk():
    plain, corrected = Recurrence("*-[(*-)x4]x8*-"), Recurrence("*-[(*-)x4]x8*-", loop_rank=4, loops=2)
    more = training_flops(corrected, SHAPE, 4096) - training_flops(Recurrence("*-[(*-)x4]x2*-"), SHAPE, 4096)
    # (in + out) of qkv, proj, fc1, fc2
    once = 4 * 4 * (4 * 1280 + 2 * 1280 + 1280 + 6400 + 3200 + 1280)
    assert more == 6 * 2 * once
    stored = together(account(corrected, SHAPE, 4096)).stored - together(account(plain, SHAPE, 4096)).stored
    assert stored == 8 * once


@pytest.mark.parametrize(("scales", "rank"), [(False, 0), (True, 3)])
def test_account_is_the_models_own_count(scales, rank, tmp_path: Path):
    recurrence = Recurrence("*-[*-*-]x3*-", loop_scales=scales, loop_rank=rank)
    (counted,) = run_ranks(tmp_path, 1, count_parameters, recurrence)
    assert together(account(recurrence, SMALL, 16)).stored == counted


@pytest.mark.parametrize("depths", [1, 2])
def test_account_of_prediction_ahead_is_the_models_own_count(depths, tmp_path: Path):
    recurrence = Recurrence("*-[*-*-]x3*-")
    (counted,) = run_ranks(tmp_path, 1, count_parameters, recurrence, depths)
    rows = {row.name: row for row in account(recurrence, SMALL, 16, depths=depths)}
    assert together(list(rows.values())).stored == counted
    # qkv, proj, fc1, fc2, what joins two states to one, and the output layer once more; causal attention
    matmuls = 32 * (32 + 2 * 16) + 32 * 32 + 32 * 96 + 48 * 32 + 64 * 32
    assert rows["MTP layers"].flops == depths * (6 * matmuls + 6 * 32 * 16)
    assert rows["MTP output"].flops == depths * 6 * 32 * 64


@pytest.mark.parametrize("of_loops", [False, True])
def test_account_of_experts_is_the_models_own_count(of_loops, tmp_path: Path):
    recurrence = Recurrence("*E[*E*-]x3*-", loop_routers=of_loops)
    shape = replace(SMALL, experts=4, top_k=2, expert_ffn=24)
    extra = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
    (counted,) = run_ranks(tmp_path, 1, count_parameters, recurrence, 0, extra)
    rows = {row.name: row for row in account(recurrence, shape, 16)}
    assert together(list(rows.values())).stored == counted
    one = 3 * 32 * 24
    assert (rows["experts"].stored, rows["experts"].active, rows["experts"].effective) == (
        8 * one,
        4 * one,
        16 * one,
    )
    assert rows["experts"].flops == 6 * 2 * 4 * one
    routers = 32 * 4
    assert (rows["routers"].stored, rows["routers"].effective) == (routers * (4 if of_loops else 2), 4 * routers)


def test_one_expert_costs_what_an_mlp_does():
    """But for its router: one expert of which one is met."""
    plain, routed = Recurrence("*-[(*-)x4]x8*-"), Recurrence("*E[(*E)x4]x8*E")
    shape = replace(SHAPE, experts=1, top_k=1, expert_ffn=3200)
    more = training_flops(routed, shape, 4096) - training_flops(plain, SHAPE, 4096)
    assert more == 6 * 34 * 1280
    layout = Layout(1, 1, 1, 4096, True, 1, False, False)
    found, plain_found = (
        memory(make_plan(r, shape, 4096, 1), shape, layout, r)[0]["weights"] for r in (routed, plain)
    )
    assert found - plain_found == 2 * 6 * 1280


def test_experts_are_shared_out_over_ranks():
    recurrence, shape = Recurrence("[(*E)x2]x2"), replace(SHAPE, experts=8, top_k=2, expert_ffn=3200)
    plan = make_plan(recurrence, shape, 4096, 1)
    one = Layout(1, 4, 1, 4096, True, 1, False, False)
    (whole,), (shared,) = (memory(plan, shape, layout, recurrence) for layout in (one, replace(one, expert=4)))
    experts = 2 * 8 * 3 * 1280 * 3200
    assert whole["weights"] - shared["weights"] == pytest.approx(2 * experts * 3 / 4)
    assert whole["optimizer"] == pytest.approx(shared["optimizer"])  # over all four ranks either way


def count_parameters(recurrence, depths=0, further=None):
    from tests.model.test_stack import build

    model, _, _ = build(recurrence, depths=depths, further=further)
    return sum(p.numel() for p in model.parameters())


def test_a_mixture_holds_all_experts_and_walks_its_top_k():
    recurrence, mixture = Recurrence("*-[(*-)x4]x8*-"), Mixture(experts=8, top_k=2, router_hidden=64)
    one, all_ = (together(account(recurrence, SHAPE, 4096, options)) for options in (None, mixture))
    inner = 64 * 128 + 8 * 64
    router = 44544 * 64 + inner
    assert all_.stored == 8 * one.stored + router
    assert all_.active == 2 * one.active + router
    assert all_.flops == 2 * one.flops + 6 * inner
    plan, layout = make_plan(recurrence, SHAPE, 4096, 1), Layout(1, 16, 1, 4096, True, 1, False, False)
    (alone,) = memory(plan, SHAPE, layout, recurrence)
    (rank,) = memory(plan, SHAPE, replace(layout, expert=4), recurrence, mixture)
    assert rank["weights"] == 2 * (alone["weights"] + router)  # which is on every rank
    assert rank["optimizer"] == 2 * 4 * alone["optimizer"] + 12 * router / 16
    assert rank["activations"] == 2 * alone["activations"]


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks", "micro", "batch", "most"),
    [
        (8, 2, 8, 4, 512, (32, 32)),  # every sequence of the group
        (8, 2, 8, 4, 64, (20, 20)),  # room: 1.25 x 2 x 64 / 8
        (8, 2, 2, 4, 512, (18, 8)),  # four experts on a rank, of which two see all; the others walk one each
        (8, 4, 4, 2, 512, (16, 8)),
        (4, 4, 2, 2, 8, (8, 4)),  # all experts see all
        (8, 2, 8, 4, None, (32, 32)),
    ],
)
def test_sequences_of_a_rank_at_worst(experts, top_k, ranks, micro, batch, most):
    layout = Layout(1, 16, micro, 4096, True, 1, False, False, expert=ranks)
    assert most_walked(Mixture(experts=experts, top_k=top_k), layout, batch) == most


def test_the_shipped_mixture_fits_at_worst(tmp_path: Path):
    ((*lines,),) = run_ranks(tmp_path, 1, params_of_the_mixture)
    (said,) = [line for line in lines if "at worst" in line]
    assert "of 2 sequences" in said
    assert "at worst it is 8" in said
    assert float(said.rsplit("with ")[1].split()[0]) < 80e9 / 2**30 * 0.8


def params_of_the_mixture():
    from cherry_megatron.config import load
    from cherry_megatron.monitor.tables import params_table
    from cherry_megatron.platform.machine import prepare

    prepare()
    return params_table(load(Path(__file__).parents[2] / "configs/cherry_1p8b.yaml")).splitlines()


def count_mixture():
    from tests.model.test_mixture import build

    return sum(p.numel() for p in build(Mixture(experts=3, router_hidden=8)).parameters())


def test_account_of_a_mixture_is_the_models_own_count(tmp_path: Path):
    (counted,) = run_ranks(tmp_path, 1, count_mixture)
    shape = Shape(hidden=16, ffn=24, heads=2, groups=2, head_size=8, vocabulary=32)
    mixture = Mixture(experts=3, router_hidden=8)
    assert together(account(Recurrence("*-[*-]x2"), shape, 16, mixture)).stored == counted


def test_memory_counts_copies_of_the_core_on_each_stage():
    recurrence = Recurrence("*-[(*-)x4]x8*-")
    plan = make_plan(recurrence, SHAPE, 4096, 2)
    layout = Layout(1, 4, 1, 4096, True, 1, False, False)
    first, last = memory(plan, SHAPE, layout, recurrence)
    layer = 4 * 1280**2 + 3 * 1280 * 3200 + 2 * 1280
    assert first["weights"] == 2 * (5 * layer + 1280 * 44544)
    assert last["weights"] == 2 * (5 * layer + 1280 + 1280 * 44544)
    assert first["optimizer"] == first["weights"] / 2 * 12 / 4


@pytest.mark.parametrize(("instances", "ranks"), [(1, 4), (2, 2), (4, 1)])
def test_optimizer_state_is_shared_out_within_an_instance(instances, ranks):
    recurrence = Recurrence("*-[(*-)x4]x8*-")
    plan, layout = make_plan(recurrence, SHAPE, 4096, 1), Layout(1, 4, 1, 4096, True, instances, False, False)
    (rank,) = memory(plan, SHAPE, layout, recurrence)
    assert rank["optimizer"] == rank["weights"] / 2 * 12 / ranks
