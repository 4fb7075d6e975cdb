"""What a configuration of a mixture may not say: one clear line, and nothing written."""

from pathlib import Path

import pytest

from tests.test_bad_input import check_configuration

CONFIGS = {
    "one-expert": ({"moee": {"experts": 1}}, [], "moee.experts is 1; a mixture has 2 or more"),
    "more-than-all-experts": ({"moee": {"experts": 2, "top_k": 3}}, [], "moee.top_k 3 is not from 1 to the 2"),
    "no-prefix": ({"moee": {"experts": 2, "prefix": 0}}, [], "moee.prefix is 0; use a positive number"),
    "all-prefix": ({"moee": {"experts": 2, "prefix": 32}}, [], "moee.prefix 32 leaves no token of the 32"),
    "no-room": ({"moee": {"experts": 2, "capacity": 0.5}}, [], "moee.capacity 0.5 leaves no room"),
    "balance": ({"moee": {"experts": 2, "balance": -1.0}}, [], "moee.balance -1.0 must be"),
    "experts-over-stages": (
        {"moee": {"experts": 2, "prefix": 8}, "megatron": {"pipeline-model-parallel-size": 2}},
        [],
        "an expert lies whole on its tensor-parallel ranks; set pipeline-model-parallel-size to 1",
    ),
    "expert-ranks-without-experts": (
        {"megatron": {"expert-model-parallel-size": 2}},
        [],
        "needs experts: set moee.experts, or use 1",
    ),
    "too-few-ranks-for-the-experts": (
        {"moee": {"experts": 2, "prefix": 8}, "megatron": {"expert-model-parallel-size": 2}},
        [],
        "start a multiple of 2 processes, or set it to 1",
    ),
    "experts-that-cannot-be-shared-out": (
        {"moee": {"experts": 3, "prefix": 8}, "megatron": {"expert-model-parallel-size": 2}},
        [],
        "moee.experts 3 cannot be shared out evenly over expert-model-parallel-size 2",
    ),
    "probe-of-a-mixture": (
        {"moee": {"experts": 2, "prefix": 8}, "sgt": {"top_loss": 0.1, "probe_interval": 5}},
        [],
        "sgt.probe_interval does not go with moee.experts",
    ),
    "deterministic-mixture": (
        {"moee": {"experts": 2, "prefix": 8}, "megatron": {"deterministic-mode": True}},
        [],
        "megatron.deterministic-mode does not go with moee.experts",
    ),
    "graph-of-a-mixture-that-routes": (
        {
            "moee": {"experts": 3, "top_k": 2, "prefix": 8},
            "megatron": {"cuda-graph-impl": "full_iteration", "attention-backend": "unfused"},
        },
        [],
        "the number of sequences of an expert varies with moee.top_k 2",
    ),
    "delayed-scales-of-a-mixture": (
        {"moee": {"experts": 2, "prefix": 8}, "megatron": {"fp8-format": "hybrid", "bf16": True}},
        [],
        "set megatron.fp8-recipe to tensorwise",
    ),
    "balance-forced-where-nothing-is-chosen": (
        {"moee": {"experts": 2, "prefix": 8}, "megatron": {"moe-router-force-load-balancing": True}},
        [],
        "megatron.moe-router-force-load-balancing is of experts inside layers",
    ),
    **{
        f"megatron-{flag}": (
            {"moee": {"experts": 2, "prefix": 8}, "megatron": {flag: value}},
            [],
            f"megatron.{flag} is of experts inside layers",
        )
        for flag, value in (("moe-aux-loss-coeff", 0.3), ("moe-router-topk", 1), ("moe-grouped-gemm", True))
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration(name, tmp_path: Path, write_config):
    check_configuration(tmp_path, write_config, *CONFIGS[name])
