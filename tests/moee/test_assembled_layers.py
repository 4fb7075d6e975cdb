"""Experts inside layers that are copies of one model compute what it does, are shared out over ranks, and train."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from cherry_megatron.cli import main
from cherry_megatron.storage.checkpoint import open_checkpoint
from tests.conftest import run_ranks
from tests.moee.test_training import refused

TOLERANCE = 1e-5
INSIDE = {"num_moe_experts": 3, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}
MODEL = {
    "hidden-size": 32, "ffn-hidden-size": 48, "num-attention-heads": 4, "kv-channels": 8, "swiglu": True,
    "group-query-attention": True, "num-query-groups": 2, "padded-vocab-size": 64,
    "untie-embeddings-and-output-weights": True,
}  # fmt: skip


def _logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(tokens.cuda(), torch.arange(tokens.shape[1]).expand_as(tokens).cuda(), None).cpu().numpy()


def a_model(folder: Path, pattern: str):
    """Save a model with vectors of each loop as a checkpoint; returns its logits."""
    import torch

    from cherry_megatron.model.options import Recurrence
    from cherry_megatron.shares import shares
    from tests.model.test_stack import build
    from tests.surgery.conftest import save

    model, _, tokens = build(Recurrence(pattern, loop_scales=True))
    whole: dict[str, torch.Tensor] = {}
    for share in shares(model):
        values = whole.setdefault(share.key, torch.zeros(share.shape))
        values[share.cut] = share.data.detach().cpu()
    save(folder, whole)
    record = {"operation": "pretrain", "identity": "it", "path": str(folder), "parents": []}
    (folder / "iter_0000007" / "lineage.json").write_text(json.dumps(record))
    return _logits(model.eval(), tokens)


def assembled(folder: Path, pattern: str, of_loops: bool):
    """The logits of an assembled checkpoint."""
    from cherry_megatron.model.options import Recurrence
    from cherry_megatron.shares import shares
    from tests.model.test_stack import build

    recurrence = Recurrence(pattern, loop_scales=True, loop_routers=of_loops)
    model, _, tokens = build(recurrence, seed=9, further=INSIDE)
    checkpoint = open_checkpoint(folder)
    filled = set()
    for share in shares(model):
        share.fill(checkpoint.tensors[share.key].dtype, checkpoint.read(share.key)[share.cut])
        filled.add(share.key)
    assert filled == checkpoint.model.keys()
    return _logits(model.eval(), tokens)


@pytest.mark.parametrize("of_loops", [False, True])
def test_copies_have_the_logits_of_the_model(of_loops, tmp_path: Path):
    (wanted,) = run_ranks(tmp_path / "logs", 1, a_model, tmp_path / "run", "*-[*-*-]x2*-")
    recurrence = {"pattern": "*-[*E*-]x2*E", "loop_scales": True, "loop_routers": of_loops}
    content = {"run": "run", "recurrence": recurrence, "megatron": {**MODEL, "num-experts": 3}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    verb = ["assemble-moee", "--config", str(tmp_path / "config.yaml"), "--save", str(tmp_path / "made")]
    assert main([*verb, "--load", *[str(tmp_path / "run")] * 3]) == 0
    (found,) = run_ranks(tmp_path / "logs", 1, assembled, tmp_path / "made", "*-[*E*-]x2*E", of_loops)
    assert np.abs(wanted).max() > 0.5
    assert np.abs(found - wanted).max() <= TOLERANCE


def test_it_loads_over_expert_parallel_ranks_and_trains(tmp_path: Path, write_config, train):
    from cherry_megatron.runs import read_evaluations, read_steps

    path = write_config(tmp_path / "one", recurrence={"pattern": "*-[*-*-]x2*-"})
    train(path, 1, "--train-iters 3 --lr 0.01 --lr-warmup-iters 0")
    wanted = read_evaluations(tmp_path / "one" / "run")[-1]["losses"]
    start = {"load": str(tmp_path / "made"), "finetune": True, "num-experts": 4}
    path = write_config(tmp_path / "many", recurrence={"pattern": "*-[*E*-]x2*E"}, megatron=start)
    verb = ["assemble-moee", "--config", str(path), "--save", str(tmp_path / "made")]
    assert main([*verb, "--load", *[str(tmp_path / "one" / "run")] * 4]) == 0
    for load, experts, says in (
        ("one/run", 4, "makes them of 4 such models"),
        ("made", 2, "has 4 experts in each layer 'E', and the configuration 2"),
    ):
        overrides = [f"megatron.load={tmp_path / load}", f"megatron.num-experts={experts}"]
        ((found,),) = run_ranks(tmp_path / "refused", 1, refused, path, overrides)
        assert says in found
    flags = "--expert-model-parallel-size 2 --train-iters 3 --lr 0.01 --lr-warmup-iters 0"
    train(path, 2, flags, ("evaluation.at_start=true",))
    before, *_, after = read_evaluations(tmp_path / "many" / "run")
    assert before["losses"] == pytest.approx(wanted, rel=1e-6)
    assert after["losses"]["2"] < before["losses"]["2"]
    assert len(read_steps(tmp_path / "many" / "run")) == 3
    made, trained = (open_checkpoint(tmp_path / place) for place in ("made", "many/run"))
    assert made.model.keys() == trained.model.keys()
    name = "decoder.layers.3.mlp.experts.experts.linear_fc1.weight"
    experts = trained.read(name)
    assert all(not np.array_equal(experts[0], other) for other in experts[1:]), "experts do not grow apart"
