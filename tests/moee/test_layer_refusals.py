"""What a configuration of experts inside layers may not say: one clear line, and nothing written."""

from pathlib import Path

import pytest

from tests.conftest import run_ranks
from tests.test_bad_input import check_configuration

EXPERTS = {"recurrence": {"pattern": "*E[*E]x2*-"}, "megatron": {"num-experts": 4}}
# name: (sections of the configuration, overrides and flags after the verb, what the line says)
CONFIGS = {
    "layers-without-experts": (
        {"recurrence": {"pattern": "*E[*-]x2*E"}},
        [],
        "num-experts to a positive number",
    ),
    "experts-without-a-layer": ({"megatron": {"num-experts": 4}}, [], "recurrence.pattern has no layer 'E'"),
    "experts-of-a-flag-and-another-balance": (
        {"recurrence": EXPERTS["recurrence"]},
        ["--", "--num-experts", "4", "--moe-router-load-balancing-type", "seq_aux_loss"],
        "must be global_aux_loss",
    ),
    "coefficient-without-a-layer": ({}, ["--", "--moe-aux-loss-coeff", "0.1"], "has no layer 'E'"),
    "experts-of-experts": (EXPERTS | {"moee": {"experts": 2, "prefix": 8}}, [], "take one of them out"),
    "more-than-all-experts-of-a-layer": (
        EXPERTS,
        ["--set", "megatron.moe-router-topk=5"],
        "more than num-experts 4",
    ),
    "no-gradient-for-the-router": (EXPERTS, ["--set", "megatron.moe-router-topk=1"], "set moe-router-pre-softmax"),
    "balance-of-micro-batches": (
        EXPERTS,
        ["--", "--moe-router-load-balancing-type", "seq_aux_loss"],
        "must be global_aux_loss",
    ),
    "two-coefficients": (EXPERTS, ["--", "--moe-aux-loss-coeff", "0.1", "0.2"], "must be one number"),
    "other-dispatcher": (EXPERTS, ["--set", "megatron.moe-token-dispatcher-type=flex"], "must be alltoall"),
    "shared-expert": (
        EXPERTS,
        ["--set", "megatron.moe-shared-expert-intermediate-size=8"],
        "moe-shared-expert-intermediate-size is not built into the layer 'E'",
    ),
    "experts-of-a-layer-that-cannot-be-shared-out": (
        EXPERTS,
        ["--set", "megatron.expert-model-parallel-size=3"],
        "num-experts 4 cannot be shared out evenly",
    ),
    "tokens-not-shared-out": (EXPERTS, ["--set", "megatron.tensor-model-parallel-size=2"], "set sequence-parallel"),
    "stage-without-experts": (
        EXPERTS,
        ["--set", "megatron.pipeline-model-parallel-size=2", "--set", "recurrence.pattern=*E[*-]x2*-"],
        "stage 1 of 2 would hold no layer 'E'",
    ),
    "graph-of-experts": (
        EXPERTS,
        ["--set", "megatron.cuda-graph-impl=full_iteration"],
        "the number of tokens of an expert varies",
    ),
    "corrections-of-experts": (
        EXPERTS,
        ["--set", "recurrence.loop_rank=2"],
        "corrections of experts are not built",
    ),
    "routers-without-experts": ({"recurrence": {"loop_routers": True}}, [], "no layer of the core"),
    "recomputed-experts": (
        EXPERTS
        | {"megatron": {"num-experts": 4, "recompute-granularity": "selective", "recompute-modules": ["moe"]}},
        [],
        "would use the last loop's vectors, corrections and routers",
    ),
    "probe-of-experts": (
        EXPERTS | {"sgt": {"top_loss": 0.1, "probe_interval": 5}},
        [],
        "sgt.probe_interval does not go with a layer 'E'",
    ),
    "overlapping-experts": (
        EXPERTS,
        ["--", "--overlap-moe-expert-parallel-comm"],
        "megatron.overlap-moe-expert-parallel-comm does not go with a layer 'E'",
    ),
    "ranks-that-cross": (
        {
            "recurrence": {"pattern": "*E[*E]x2*-"},
            "megatron": {
                "num-experts": 3,
                "expert-model-parallel-size": 3,
                "expert-tensor-parallel-size": 1,
                "tensor-model-parallel-size": 2,
                "sequence-parallel": True,
            },
        },
        [],
        "must be whole tensor-parallel groups, or the other way round",
    ),
    "delayed-scales-of-experts": (
        EXPERTS,
        ["--", "--fp8-format", "hybrid", "--bf16"],
        "fp8-recipe delayed does not go with a layer 'E'",
    ),
}


def _flagged(path: Path) -> tuple[dict, dict]:
    """The sections of a file that names the experts, and of one to which a flag adds them."""
    from cherry_megatron.config import load
    from cherry_megatron.platform.machine import prepare

    prepare()
    inside, beside = load(path, ("megatron.num-experts=4",)), load(path, (), ("--num-experts", "4"))
    return inside.megatron, {**beside.megatron, "num-experts": beside.value("num-experts")}


def test_the_number_of_experts_may_be_a_flag(tmp_path: Path, write_config):
    path = write_config(tmp_path, recurrence=EXPERTS["recurrence"])
    ((inside, beside),) = run_ranks(tmp_path / "output", 1, _flagged, path)
    assert beside == inside


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration(name, tmp_path: Path, write_config):
    check_configuration(tmp_path, write_config, *CONFIGS[name])
