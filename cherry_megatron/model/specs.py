"""The modules a stack is made of: one set from Transformer Engine, one from Megatron's local layers.

Both write the same checkpoint keys, so a model saved with one loads with the other.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayerSubmodules

from cherry_megatron.model.cache import cached
from cherry_megatron.model.corrections import corrected_column, corrected_row
from cherry_megatron.model.experts import LoopRouter, draw_experts
from cherry_megatron.model.fused import SwiGLU
from cherry_megatron.model.loops import LoopNorm, LoopResidual, ResidualNorm
from cherry_megatron.model.multi_token import depths_spec
from cherry_megatron.model.options import Recurrence
from cherry_megatron.model.plan import Plan
from cherry_megatron.model.seeding import seeded

# Where Megatron's layers of Transformer Engine, whose norm is fused into the next linear one, keep its weight.
_NORM_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class _StoredLayer:
    """Numbers a layer by its place among the stored ones, whichever stages hold copies of it."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int,
        *,
        plan: Plan,
        seed: int,
        looped: Callable[[TransformerLayerSubmodules], TransformerLayerSubmodules],
        **kwargs: Any,
    ) -> None:
        stored = plan.stored_index[layer_number - 1]
        if plan.is_core_symbol(stored):
            submodules = looped(submodules)
        with seeded(seed, f"layers.{stored}"):
            super().__init__(config=config, submodules=submodules, layer_number=stored + 1, **kwargs)  # type: ignore[call-arg]


class StoredAttention(_StoredLayer, TransformerLayer):
    """The attention sublayer `*`."""


class StoredMLP(_StoredLayer, MLPLayer):
    """The MLP sublayer `-`."""


class StoredExperts(_StoredLayer, MoETransformerLayer):
    """The sublayer of experts `E`."""

    mlp: MoELayer

    def __init__(self, *, plan: Plan, seed: int, layer_number: int, pg_collection: Any, **kwargs: Any) -> None:
        super().__init__(plan=plan, seed=seed, layer_number=layer_number, pg_collection=pg_collection, **kwargs)
        name = f"layers.{plan.stored_index[layer_number - 1]}"
        for parameter in self.mlp.experts.parameters():
            # Where each rank has all experts Megatron would count them among the other weights, in an optimizer
            # state of another form, which does not go on over expert-parallel ranks.
            parameter.allreduce = False
        draw_experts(self.mlp.experts, self.config, pg_collection, seed, name, self.mlp.local_expert_indices)


def stack_submodules(
    implementation: str, config: TransformerConfig, plan: Plan, seed: int, recurrence: Recurrence
) -> HybridStackSubmodules:
    """The specs of the sublayers `*`, `-` and `E`, and of multi-token prediction.

    Args:
        implementation: `transformer_engine` or `local`, as in --transformer-impl.
        config: Megatron's model configuration.
        plan: the unrolled model.
        seed: initial weights are drawn from it and a layer's number.
        recurrence: what the core layers have of each loop.
    """
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TEDotProductAttention,
            TERowParallelLinear,
        )
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        experts = TESpecProvider().grouped_mlp_modules(True)
        column, row, attention = TEColumnParallelLinear, TERowParallelLinear, TEDotProductAttention
    else:
        column, row, attention = ColumnParallelLinear, RowParallelLinear, DotProductAttention
        experts = LocalSpecProvider().grouped_mlp_modules(False)

    def mlp(fc1: Any = column, fc2: Any = row) -> Any:
        parts = MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2, activation_func=SwiGLU)
        return partial(MLP.as_mlp_submodule, submodules=parts)

    def attend(qkv: Any = column, proj: Any = row) -> ModuleSpec:
        return ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(linear_qkv=qkv, core_attention=cached(attention), linear_proj=proj),
        )

    loops, scales, rank = plan.pattern.loops, recurrence.loop_scales, recurrence.loop_rank

    def correct(linear: type, parts: int = 1) -> Any:
        if not rank:
            return linear
        corrected = corrected_row if linear is row else corrected_column
        return partial(corrected(linear), loops=loops, rank=rank, parts=parts)

    loop_norm = partial(LoopNorm, loops=loops) if scales else ResidualNorm
    loop_add: Any = get_bias_dropout_add
    if scales:
        loop_add = ModuleSpec(module=LoopResidual, params={"config": config, "loops": loops})

    def looped_attention(submodules: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
        return replace(
            submodules, input_layernorm=loop_norm, self_attention=attend(correct(column), correct(row)),
            self_attn_bda=loop_add,
        )  # fmt: skip

    def looped_mlp(submodules: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
        gate_and_up = 2 if config.gated_linear_unit else 1
        return replace(
            submodules, pre_mlp_layernorm=loop_norm, mlp=mlp(correct(column, gate_and_up), correct(row)),
            mlp_bda=loop_add,
        )  # fmt: skip

    def routed(loops: int, walks: int) -> Any:
        router = partial(LoopRouter, loops=loops, walks=walks)
        return partial(MoELayer, submodules=MoESubmodules(experts=experts, router=router))

    def looped_experts(submodules: TransformerLayerSubmodules) -> TransformerLayerSubmodules:
        return replace(
            submodules, pre_mlp_layernorm=loop_norm, mlp_bda=loop_add,
            mlp=routed(loops if recurrence.loop_routers else 1, recurrence.loops),
        )  # fmt: skip

    def layer(cls: type, submodules: TransformerLayerSubmodules, looped: Callable[..., Any]) -> ModuleSpec:
        return ModuleSpec(cls, params={"plan": plan, "seed": seed, "looped": looped}, submodules=submodules)

    attention_parts = TransformerLayerSubmodules(
        input_layernorm=ResidualNorm,
        self_attention=attend(),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=_NORM_KEYS,
    )
    mlp_parts = TransformerLayerSubmodules(
        pre_mlp_layernorm=ResidualNorm,
        mlp=mlp(),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=_NORM_KEYS,
    )
    expert_parts = TransformerLayerSubmodules(
        pre_mlp_layernorm=ResidualNorm, mlp=routed(loops=1, walks=1), mlp_bda=get_bias_dropout_add
    )
    ahead = HybridStackSubmodules(
        attention_layer=ModuleSpec(TransformerLayer, submodules=attention_parts),
        mlp_layer=ModuleSpec(MLPLayer, submodules=mlp_parts),
    )
    return HybridStackSubmodules(
        attention_layer=layer(StoredAttention, attention_parts, looped_attention),
        mlp_layer=layer(StoredMLP, mlp_parts, looped_mlp),
        moe_layer=layer(StoredExperts, expert_parts, looped_experts),
        mtp_block_spec=depths_spec(ahead, column, seed),
    )
