"""From dataclasses to the model: Megatron's HybridModel with the recurrent stack as its decoder."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.utils import init_method_normal
from torch import Tensor

from cherry_megatron.model.head import RecurrentModel
from cherry_megatron.model.mixture import MixtureModel
from cherry_megatron.model.options import Mixture, Recurrence
from cherry_megatron.model.plan import Plan
from cherry_megatron.model.router import Router
from cherry_megatron.model.seeding import seed_of, seeded
from cherry_megatron.model.shape import Shape
from cherry_megatron.model.specs import stack_submodules
from cherry_megatron.model.stack import RecurrentStack
from cherry_megatron.model.tying import tie_copies


def prepare_config(config: TransformerConfig, recurrence: Recurrence) -> TransformerConfig:
    """Set what depends on the recurrence and must not depend on the layout."""
    # Megatron scales output projections by its own layer count, which grows with pipeline copies.
    config.output_layer_init_method = init_method_normal(config.init_method_std * recurrence.output_scale)
    if recurrence.injection == "add" and config.pipeline_model_parallel_size > 1:
        # The prelude's output travels with the state, so stages exchange two shapes.
        config.variable_seq_lengths = True
    if config.transformer_impl == "transformer_engine":
        _use_fast_kernels(config)
    return config


def _use_fast_kernels(config: TransformerConfig) -> None:
    """Have Transformer Engine's and those of fused.py where they compute what the configuration asks for."""
    if not config.cross_entropy_loss_fusion and not config.fp16:  # of which it has none
        # One kernel each way over the logits as they are, instead of ten over a copy in float32. Megatron's
        # parser refuses it for errors that Transformer Engine no longer has (Megatron-LM's pull request 7339).
        config.cross_entropy_loss_fusion, config.cross_entropy_fusion_impl = True, "te"
    # Rotates queries and keys on their way out of the unsplit product, instead of copying values and joining three
    # gradients. Megatron calls it for halves of a head alone, whatever is asked for, refuses it in the other cases,
    # and forgets to choose a rank's queries where ranks share a group of heads.
    other = config.rotary_interleaved or config.qk_l2_norm or config.flash_decode or config.test_mode
    shared = (config.num_query_groups or config.num_attention_heads) < config.tensor_model_parallel_size
    config.fused_single_qkv_rope = config.apply_rope_fusion and not (other or shared)
    # Experts inside layers have a SwiGLU weighted by their gates, which is Megatron's.
    swiglu = config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
    kept_whole = not config.activation_func_fp8_input_store
    config.use_te_activation_func = (
        config.bias_activation_fusion and swiglu and kept_whole and not config.num_moe_experts
    )


def build_model(
    config: TransformerConfig,
    recurrence: Recurrence,
    shape: Shape,
    plan: Plan,
    groups: ProcessGroupCollection,
    *,
    sequence_length: int,
    rotary_base: int,
    seed: int,
    pre_process: bool,
    post_process: bool,
) -> RecurrentModel:
    """Build this rank's part of the model.

    Args:
        config: from `prepare_config`.
        recurrence: the recurrent stack.
        shape: its sizes.
        plan: the unrolled model over the pipeline stages.
        groups: process groups; the pipeline group says which stage this is.
        sequence_length: longest sequence.
        rotary_base: base of the rotary position embedding.
        seed: initial weights depend on it alone, not on the layout.
        pre_process, post_process: whether this stage embeds, whether it has the output head.
    """
    implementation = config.transformer_impl
    model = RecurrentModel(
        config=config,
        hybrid_stack_spec=ModuleSpec(
            module=RecurrentStack,
            params={"plan": plan, "recurrence": recurrence},
            submodules=stack_submodules(implementation, config, plan, seed, recurrence),
        ),
        vocab_size=shape.vocabulary,
        max_sequence_length=sequence_length,
        hybrid_layer_pattern=plan.megatron_pattern,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=rotary_base,
        pg_collection=groups,
    )
    if pre_process or model.mtp_process:
        _draw(model.embedding.word_embeddings.weight, "embedding", shape, config, groups, seed)
    if post_process and not (shape.tied and pre_process):
        name = "embedding" if shape.tied else "output_layer"
        _draw(model.output_layer.weight, name, shape, config, groups, seed)
    config.finalize_model_grads_func = tie_copies(model.decoder)
    return model


def build_mixture(
    mixture: Mixture,
    config: TransformerConfig,
    recurrence: Recurrence,
    shape: Shape,
    plan: Plan,
    groups: ProcessGroupCollection,
    *,
    seed: int,
    **others: Any,
) -> MixtureModel:
    """Build this rank's experts, and the router.

    Args:
        mixture: how many experts, and how they are chosen.
        config: from `prepare_config`, of one expert, which knows nothing of the others.
        seed: expert 0 starts as a model alone with it, the others from what `seed_of` makes of it and their number.
        Others: as in `build_model`, of each expert.
    """
    here = mixture.experts // groups.ep.size()
    numbers = range(groups.ep.rank() * here, (groups.ep.rank() + 1) * here)
    experts = {
        number: build_model(config, recurrence, shape, plan, groups, seed=_expert_seed(seed, number), **others)
        for number in numbers
    }
    router = Router(config, mixture, shape.vocabulary, seed)
    return MixtureModel(config, mixture, experts, router, groups)


def _expert_seed(seed: int, number: int) -> int:
    """Not `seed + number`, by which mixtures of neighbouring seeds would share experts."""
    return seed_of(seed, f"expert {number}") if number else seed


def _draw(
    weight: Tensor,
    name: str,
    shape: Shape,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    seed: int,
) -> None:
    """Initialize this rank's rows of a vocabulary matrix from (seed, name) alone."""
    with seeded(seed, name), torch.no_grad():
        full = torch.empty(shape.vocabulary, config.hidden_size)
        init: Any = config.embedding_init_method if name == "embedding" else config.init_method
        init(full)
        weight.copy_(full.chunk(groups.tp.size())[groups.tp.rank()])
