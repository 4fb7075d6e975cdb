"""The dense equivalent of a recurrent checkpoint computes the same, and is what stock Megatron expects."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cherry_megatron.errors import CherryError
from cherry_megatron.surgery import compress
from cherry_megatron.surgery.jobs import Unroll
from tests.conftest import run_ranks
from tests.surgery.conftest import model_tensors, save


def _stock(config: Any) -> Any:
    """Makes Megatron's own model of its own layers (local ones), with the names that its TE layers save under."""
    from functools import partial

    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import ModuleSpec, TransformerLayer
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    hybrid_block.TENorm = WrappedTorchNorm  # the one module that no spec chooses
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=DotProductAttention, linear_proj=RowParallelLinear
        ),
    )
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layers = HybridStackSubmodules(
        attention_layer=ModuleSpec(
            TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=WrappedTorchNorm,
                self_attention=attention,
                self_attn_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
            ),
        ),
        mlp_layer=ModuleSpec(
            MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                mlp=partial(MLP.as_mlp_submodule, submodules=linears),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
            ),
        ),
    )

    def provide(pre_process: bool = True, post_process: bool = True, **_: Any) -> Any:
        args = get_args()
        return HybridModel(
            core_transformer_config_from_args(args),
            ModuleSpec(HybridStack, submodules=layers),
            args.padded_vocab_size,
            args.max_position_embeddings,
            hybrid_layer_pattern=config.recurrence.parsed.symbols,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type="rope",
        )

    return provide


def _logits(path: Path, stock: bool = False) -> np.ndarray:
    """Of the checkpoint that a configuration starts from, on fixed tokens; with Megatron's own model if asked."""
    import torch
    from megatron.core.enums import ModelType
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import get_model

    from cherry_megatron.config import load
    from cherry_megatron.platform.machine import prepare
    from cherry_megatron.pretrain import initialize, model_provider

    machine = prepare()
    config = load(path)
    initialize(config, machine, {"no-load-optim": True, "no-load-rng": True})
    initialize_megatron(allow_no_cuda=True)
    provider = _stock(config) if stock else model_provider(config)
    model = get_model(provider, ModelType.encoder_or_decoder, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    model[0].eval()
    tokens = torch.arange(64).view(2, 32) * 7 % 500
    with torch.no_grad():
        return model[0](tokens, torch.arange(32).repeat(2, 1), None).float().numpy()


@pytest.mark.parametrize("order", ["cycle", pytest.param("sequence", marks=pytest.mark.full)])
def test_the_dense_model_gives_the_same_logits(order, tmp_path, write_config, train):
    recurrence = {"pattern": "*-[*-*-]x3*-", "order": order, "loop_scales": True, "loop_rank": 2}
    looped = write_config(tmp_path / "looped", recurrence=recurrence)
    # A large learning rate moves the loops' vectors and corrections well away from one and zero.
    train(looped, flags="--train-iters 12 --lr 0.03 --lr-decay-iters 20")
    compress.plan_expansion(tmp_path / "looped/run", looped, ()).run(tmp_path / "expanded", 2)
    dense = write_config(
        tmp_path / "dense",
        recurrence={"pattern": "(*-)x8", "loop_scales": False},
        megatron={"load": str(tmp_path / "expanded"), "finetune": True},
    )
    unfolded = write_config(
        tmp_path / "unfolded",
        recurrence={**recurrence, "loop_scales": False, "loop_rank": 0},
        megatron={"load": str(tmp_path / "looped/run"), "finetune": True},
    )
    (ours,), (theirs,), (without,) = (
        run_ranks(path.parent / "out", 1, _logits, path) for path in (dense, looped, unfolded)
    )
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-5
    assert np.linalg.norm(without - theirs) / np.linalg.norm(theirs) > 1e-3, "what loops learned did nothing"
    (stock,) = run_ranks(tmp_path / "stock", 1, _logits, dense, True)
    assert np.linalg.norm(stock - theirs) / np.linalg.norm(theirs) < 1e-5


def test_with_corrections_of_full_rank_the_loops_are_the_parent(tmp_path, write_config, train):
    """Slots in the loops' order, norms and all: nothing of the parent is lost."""
    deep = write_config(tmp_path / "deep", recurrence={"pattern": "(*-)x8", "loop_scales": False})
    train(deep, flags="--train-iters 12 --lr 0.03 --lr-decay-iters 20")
    found = {"deep": deep}
    for name, rank in (("whole", 32), ("mean", 0)):
        found[name] = path = write_config(
            tmp_path / name,
            recurrence={"pattern": "[*-*-]x4", "loop_scales": False, "loop_rank": rank},
            megatron={"load": str(tmp_path / f"{name}-start"), "finetune": True},
        )
        options = compress.Options(groups="slots")
        compress.plan_compression(tmp_path / "deep/run", path, (), options).run(tmp_path / f"{name}-start", 2)
    parent, whole, mean = (run_ranks(path.parent / "out", 1, _logits, path)[0] for path in found.values())
    assert np.linalg.norm(whole - parent) / np.linalg.norm(parent) < 1e-5
    assert np.linalg.norm(mean - parent) / np.linalg.norm(parent) > 0.1


def test_keys_are_those_of_a_stock_hybrid_model(tmp_path, config):
    save(tmp_path / "deep", model_tensors(4))
    path = config(recurrence={"pattern": "*-[*-]x2*-"})
    surgery = compress.plan_compression(tmp_path / "deep", path, (), compress.Options())
    surgery.run(tmp_path / "small", 2)
    expansion = compress.plan_expansion(tmp_path / "small", path, ())
    names = {spec.name for job in expansion.jobs for spec in job.writes}
    assert names == set(model_tensors(4))


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("*-[*-]x3*-", "config.yaml: .*small/.* has vectors of 2 loops, recurrence.pattern of 3"),
        ("*-[**-]x2*-", "config.yaml: .*small/iter_0000000 holds 3 layers, recurrence.pattern 4"),
        ("*-[*--]x2*-", "layer 1 is '[*]-', but recurrence.pattern wants '[*]--'"),
    ],
)
def test_a_configuration_of_another_model_is_refused(pattern, says, tmp_path, config):
    save(tmp_path / "deep", model_tensors(3))
    path = config(recurrence={"pattern": "*-[*-]x2*-", "loop_scales": True})
    compress.plan_compression(tmp_path / "deep", path, (), compress.Options()).run(tmp_path / "small", 2)
    with pytest.raises(CherryError, match=says):
        compress.plan_expansion(
            tmp_path / "small", config(recurrence={"pattern": pattern, "loop_scales": True}), ()
        )


@pytest.mark.parametrize(
    ("key", "held", "asked"), [("loop_scales", False, True), ("loop_scales", True, False), ("loop_rank", 0, 2)]
)
def test_what_the_loops_have_is_what_the_configuration_says(key, held, asked, tmp_path, config):
    """Vectors that are not there would leave no trace, and those that are not asked for would be folded in."""
    save(tmp_path / "deep", model_tensors(3))
    recurrence = {"pattern": "*-[*-]x2*-"}
    path = config(recurrence={**recurrence, key: held})
    compress.plan_compression(tmp_path / "deep", path, (), compress.Options()).run(tmp_path / "small", 2)
    has = "holds decoder" if held else "has a layer without"
    with pytest.raises(CherryError, match=rf"config.yaml: recurrence.{key} is {asked}, but .*small/.* {has}"):
        compress.plan_expansion(tmp_path / "small", path, (f"recurrence.{key}={asked}",))


def test_loops_above_those_of_the_pattern_take_the_last_ones_vectors(tmp_path, config):
    save(tmp_path / "deep", model_tensors(4))
    path = config(recurrence={"pattern": "*-[*-]x2*-", "loop_scales": True})
    compress.plan_compression(tmp_path / "deep", path, (), compress.Options()).run(tmp_path / "small", 2)
    for loops, says in ((2, False), (5, True)):
        surgery = compress.plan_expansion(tmp_path / "small", path, (f"recurrence.loops={loops}",))
        core = [job.loop for job in surgery.jobs if isinstance(job, Unroll) and job.symbol == "*"][1:-1]
        assert core == [min(loop, 1) for loop in range(loops)]
        assert ("note        loops above 2 use the vectors of loop 2" in surgery.lines) == says


def test_injection_cannot_be_expanded(tmp_path, config):
    save(tmp_path / "deep", model_tensors(4))
    path = config(recurrence={"pattern": "*-[*-]x2*-", "injection": "add"})
    with pytest.raises(CherryError, match=r"recurrence\.injection add .* only injection none can be expanded"):
        compress.plan_expansion(tmp_path / "deep", path, ())
