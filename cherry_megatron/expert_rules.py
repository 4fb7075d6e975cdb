"""What a configuration may say of experts inside layers (`E` in recurrence.pattern)."""

import math
from typing import TYPE_CHECKING, Any

from cherry_megatron.errors import CherryError
from cherry_megatron.flags import action_of, flags_starting
from cherry_megatron.model.pattern import MOE

if TYPE_CHECKING:
    from cherry_megatron.config import Config

EXPERT_DEFAULTS: dict[str, Any] = {
    "moe-aux-loss-coeff": 0.01,
    "moe-router-load-balancing-type": "global_aux_loss",
    "moe-router-dtype": "fp32",
    "moe-token-dispatcher-type": "alltoall",
}
FORCED = "moe-router-force-load-balancing"  # for benchmarks
# What else Megatron has of them is not built in.
_KNOWN = {
    "num-experts", "moe-ffn-hidden-size", "moe-router-topk", "moe-router-pre-softmax", "moe-router-dtype",
    "moe-router-load-balancing-type", "moe-aux-loss-coeff", "moe-token-dispatcher-type", "moe-permute-fusion",
    "moe-router-padding-for-fp8", "moe-router-padding-for-quantization", FORCED,
}  # fmt: skip


def check_layer_experts(config: "Config") -> None:
    """Refuse what does not go with layers `E`, or what goes with them alone.

    Raises:
        CherryError: naming the key.
    """
    given = _given(config)
    if not config.has_experts:
        if given:
            raise CherryError(
                f"megatron.{given[0]} is of experts inside layers, and recurrence.pattern has no layer 'E'; take "
                "it out (experts that are whole models are set by moee)"
            )
        return
    if config.moee is not None:
        raise CherryError("moee.experts are whole models, and a layer 'E' has experts too; take one of them out")
    experts, chosen = config.positive("num-experts"), config.positive("moe-router-topk")
    if chosen > experts:
        raise CherryError(f"megatron.moe-router-topk {chosen} is more than num-experts {experts}")
    if chosen == 1 and not config.value("moe-router-pre-softmax"):
        raise CherryError(
            "megatron.moe-router-topk 1 gives the only expert a gate of 1 and the router no gradient; set "
            "moe-router-pre-softmax"
        )
    if config.value("moe-router-load-balancing-type") != ["global_aux_loss"]:
        raise CherryError(
            "megatron.moe-router-load-balancing-type must be global_aux_loss: the others depend on the split into "
            "micro-batches; moe-aux-loss-coeff 0 switches it off"
        )
    coefficients = config.value("moe-aux-loss-coeff")
    if len(coefficients) != 1 or not 0 <= coefficients[0] < math.inf:
        raise CherryError(f"megatron.moe-aux-loss-coeff {coefficients} must be one number that is not negative")
    if config.value("moe-token-dispatcher-type") != "alltoall":
        raise CherryError("megatron.moe-token-dispatcher-type must be alltoall: the others are not tried")
    _check_expert_layout(config, experts)
    _check_stages(config)
    refused = {
        "sgt.probe_interval": (config.sgt and config.sgt.probe_interval, "experts lie on different ranks"),
        "megatron.overlap-moe-expert-parallel-comm": (
            config.value("overlap-moe-expert-parallel-comm"),
            "its schedule knows no loops",
        ),
        "megatron.cuda-graph-impl": (
            config.value("cuda-graph-impl") != "none",
            "the number of tokens of an expert varies",
        ),
        "megatron.num-distributed-optimizer-instances": (
            config.value("num-distributed-optimizer-instances") > 1,
            "it has not been tried with experts",
        ),
        "megatron.fp8-recipe delayed": (
            config.value("fp8-format") and config.value("fp8-recipe") == "delayed",
            "its scales are shared by data-parallel ranks, which hold different experts; use tensorwise, so",
        ),
    }
    for key, (found, why) in refused.items():
        if found:
            raise CherryError(f"{key} does not go with a layer 'E': {why}; take it out")
    for flag in given:
        if flag not in _KNOWN:
            raise CherryError(f"megatron.{flag} is not built into the layer 'E'; take it out")


def _given(config: "Config") -> list[str]:
    """The flags of experts inside layers that have another value than Megatron's default."""
    named = ["num-experts", *flags_starting("moe-")]
    if config.moee is not None and config.moee.routes:
        named.remove(FORCED)  # it is also of sequences that choose
    return [flag for flag in named if config.value(flag) != action_of(flag).default]


def _check_expert_layout(config: "Config", experts: int) -> None:
    """How experts are shared out and cut."""
    tensor, over = config.value("tensor-model-parallel-size"), config.positive("expert-model-parallel-size")
    within = config.value("expert-tensor-parallel-size") or tensor
    if experts % over:
        raise CherryError(
            f"megatron.num-experts {experts} cannot be shared out evenly over expert-model-parallel-size {over}"
        )
    if within not in (1, tensor):
        raise CherryError(
            f"megatron.expert-tensor-parallel-size {within} must be 1 or tensor-model-parallel-size {tensor}"
        )
    if within * over % tensor and tensor % (within * over):
        raise CherryError(
            f"megatron.expert-model-parallel-size {over} with experts cut in {within} and "
            f"tensor-model-parallel-size {tensor}: the ranks that share out the experts must be whole "
            "tensor-parallel groups, or the other way round"
        )
    if config.shape.expert_ffn % within:
        raise CherryError(
            f"megatron.moe-ffn-hidden-size {config.shape.expert_ffn} is not a multiple of "
            f"expert-tensor-parallel-size {within}"
        )
    if tensor > 1 and not config.value("sequence-parallel"):
        raise CherryError(
            "megatron.tensor-model-parallel-size: a layer 'E' shares out tokens, not only weights; set "
            "sequence-parallel"
        )


def _check_stages(config: "Config") -> None:
    """Megatron has an optimizer of experts where there are some; a resume needs as many on every rank."""
    plan = config.plan()
    for stage, held in enumerate(plan.held):
        if not any(MOE in plan.pattern.layers[layer] for layer in held):
            raise CherryError(
                f"pipeline stage {stage} of {len(plan.held)} would hold no layer 'E', and its optimizer state "
                "would resume under no other layout; set recurrence.stages so that each holds one, or fewer stages"
            )
