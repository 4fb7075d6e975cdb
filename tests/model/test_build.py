"""Which of Transformer Engine's kernels a configuration gets: those that compute what it asks for."""

import torch

from tests.conftest import run_ranks

ALL = {"loss", "rotation", "swiglu"}
CASES: list[tuple[dict, set]] = [
    ({}, ALL),
    ({"transformer_impl": "local"}, set()),
    ({"cross_entropy_loss_fusion": True}, ALL - {"loss"}),
    ({"fp16": True}, ALL - {"loss"}),
    ({"apply_rope_fusion": False}, ALL - {"rotation"}),
    ({"rotary_interleaved": True}, ALL - {"rotation"}),
    ({"qk_l2_norm": True}, ALL - {"rotation"}),
    ({"num_query_groups": 2, "tensor_model_parallel_size": 4}, ALL - {"rotation"}),
    ({"num_query_groups": 4, "tensor_model_parallel_size": 4}, ALL),
    ({"num_moe_experts": 4}, ALL - {"swiglu"}),
    ({"bias_activation_fusion": False}, ALL - {"swiglu"}),
    ({"activation_func_fp8_input_store": True}, ALL - {"swiglu"}),
]


def kernels() -> list[set]:
    """Of configurations with some fields of Megatron's."""
    from cherry_megatron.platform.machine import prepare

    prepare()
    from megatron.core.transformer import TransformerConfig

    from cherry_megatron.model.build import prepare_config
    from cherry_megatron.model.options import Recurrence

    found = []
    for fields, _ in CASES:
        config = TransformerConfig(
            num_layers=2, hidden_size=32, num_attention_heads=4, transformer_impl="transformer_engine",
            add_bias_linear=False, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        )  # fmt: skip
        for name, value in {"apply_rope_fusion": True, "bias_activation_fusion": True, **fields}.items():
            setattr(config, name, value)
        prepare_config(config, Recurrence("*-*-"))
        chosen = {
            "loss": config.cross_entropy_loss_fusion and config.cross_entropy_fusion_impl == "te",
            "rotation": config.fused_single_qkv_rope,
            "swiglu": config.use_te_activation_func,
        }
        found.append({name for name, is_chosen in chosen.items() if is_chosen})
    return found


def test_a_configuration_gets_what_it_asks_for(tmp_path):
    (found,) = run_ranks(tmp_path, 1, kernels)
    assert found == [expected for _, expected in CASES]
