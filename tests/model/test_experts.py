"""The load-balancing loss of a router: that of all tokens, however they are cut into micro-batches."""

from functools import partial
from pathlib import Path

import pytest

from tests.conftest import run_ranks

TOKENS = 12


def error(kind, split, loops=1):
    """How far the gradient of the load-balancing loss alone is from that of all tokens, after such micro-batches.

    Args:
        kind: `ours`, or Megatron's.
        split: tokens of each micro-batch.
        loops: walk each so often.
    """
    from cherry_megatron.platform.machine import prepare

    prepare()
    import torch
    from megatron.core import mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.router import TopKRouter

    from cherry_megatron.model.experts import LoopRouter

    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, num_moe_experts=4, moe_router_topk=2,
        moe_aux_loss_coeff=1.0, moe_router_load_balancing_type="none" if kind == "ours" else "global_aux_loss",
        moe_ffn_hidden_size=8, calculate_per_token_loss=True, use_cpu_initialization=True, add_bias_linear=False,
    )  # fmt: skip
    groups = ProcessGroupCollection.use_mpu_process_groups()
    torch.manual_seed(4)
    ours = partial(LoopRouter, loops=1, walks=loops)
    router = (ours if kind == "ours" else TopKRouter)(config=config, pg_collection=groups)
    router.weight.data.normal_()
    router.set_layer_number(1)
    tokens = torch.randn(TOKENS, 1, 8)
    # Walks differ, as hidden states of a loop do.
    parts = [[part * (loop + 1) - loop for loop in range(loops)] for part in tokens.split(split)]
    if kind == "ours" and len(split) > 1:
        router.start_counting()
        for walks in parts:
            for router.loop, part in enumerate(walks):
                router(part)
        router.end_counting()
    for walks in parts:
        for loop, part in enumerate(walks):
            if kind == "ours":
                router.loop = loop
            gates, _ = router(part)
            (gates * 0).sum().backward()
    wanted = expected(router.weight.data.double(), tokens.double(), loops)
    return float((router.weight.grad / TOKENS - wanted).norm() / wanted.norm())


def expected(weight, tokens, loops):
    """The gradient of coefficient * E * sum f P over all tokens, summed over walks."""
    import torch

    weight = weight.clone().requires_grad_()
    for loop in range(loops):
        scores = ((tokens * (loop + 1) - loop).flatten(0, 1) @ weight.T).softmax(-1)
        count = torch.zeros(4)
        for row in scores.tolist():
            for e in sorted(range(4), key=lambda e, row=row: -row[e])[:2]:
                count[e] += 1
        (4 * (count / count.sum() * scores.mean(0)).sum()).backward()
    return weight.grad


@pytest.mark.parametrize("split", [[12], [6, 6], [3, 9], [1, 4, 7]], ids=str)
def test_no_split_changes_the_loss(split, tmp_path: Path):
    (found,) = run_ranks(tmp_path, 1, error, "ours", split, 2)
    assert found <= 1e-5


def test_megatrons_own_depends_on_the_split(tmp_path: Path):
    """What it is replaced for: with one micro-batch the two agree, with more they do not, nor with walks."""
    assert run_ranks(tmp_path / "one", 1, error, "megatron", [12])[0] <= 1e-5
    for name, split, loops in (("even", [6, 6], 1), ("uneven", [3, 9], 1), ("walks", [12], 2)):
        (found,) = run_ranks(tmp_path / name, 1, error, "megatron", split, loops)
        assert found > 0.01, name
