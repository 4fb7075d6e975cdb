"""What the sections of a configuration do not go together with: mtp, sgt, generation, moee, and CUDA graphs."""

from typing import TYPE_CHECKING

from cherry_megatron.errors import CherryError
from cherry_megatron.expert_rules import check_layer_experts
from cherry_megatron.flags import action_of

if TYPE_CHECKING:
    from cherry_megatron.config import Config

# What attention does in training and does not over a cache of keys and values.
_NOT_CACHED = {
    "window-size": "it looks at all earlier tokens",
    "window-attn-skip-freq": "it looks at all earlier tokens",
    "softmax-type": "its softmax is the plain one",
    "no-rope-freq": "it rotates in all layers",
}

_SHORTEST_IN_GRAPH = 128
GRAPH = "full_iteration"  # of --cuda-graph-impl: forward and backward pass of a step as one CUDA graph


def check_sections(config: "Config") -> None:
    """Refuse what a section cannot be trained with.

    Raises:
        CherryError: the first of it.
    """
    _check_ahead(config)
    _check_data(config)
    check_layer_experts(config)
    _check_graph(config)
    _check_selective(config)
    if config.generation is not None:
        check_generation(config)
    _check_mixture(config)


def _check_ahead(config: "Config") -> None:
    depths = config.mtp.depths
    if not depths:
        return
    if depths >= config.value("seq-length"):
        raise CherryError(
            f"mtp.depths {depths} is not less than seq-length {config.value('seq-length')}; use fewer"
        )
    stages = config.value("pipeline-model-parallel-size")
    refused = {
        "sgt.skip_head": (config.sgt and config.sgt.skip_head, "every depth needs the outputs of all tokens"),
        "megatron.untie-embeddings-and-output-weights false": (
            config.shape.tied and stages > 1,
            f"of {stages} pipeline stages Megatron's last holds one matrix too many, and cannot save it",
        ),
    }
    for key, (given, why) in refused.items():
        if given:
            raise CherryError(f"{key} does not go with mtp.depths {depths}: {why}")


def _check_data(config: "Config") -> None:
    if config.value("dataloader-type") == "external":
        raise CherryError(
            "megatron.dataloader-type external: no loader is brought from outside; take it out, and choose by "
            "data.loader"
        )


def _check_graph(config: "Config") -> None:
    chosen = config.value("cuda-graph-impl")
    if chosen == "none":
        return
    if chosen != GRAPH:
        raise CherryError(
            f"megatron.cuda-graph-impl {chosen} records layers one by one, but the core's are walked several "
            f"times; use {GRAPH}"
        )
    micro_batches = "it replays as many micro-batches as it recorded"
    excluded = {
        "recurrence.random_loops": (config.recurrence.random_loops, "it replays one step, of one number of loops"),
        "megatron.rampup-batch-size": (config.value("rampup-batch-size"), micro_batches),
        "megatron.step-batch-size-schedule": (config.value("step-batch-size-schedule"), micro_batches),
        "megatron.pipeline-model-parallel-size": (
            config.value("pipeline-model-parallel-size") > 1,
            "it has not been tried over pipeline stages",
        ),
        "megatron.recompute-granularity": (
            config.value("recompute-granularity") == "full",
            "it has not been tried with recomputation",
        ),
    }
    for key, (given, why) in excluded.items():
        if given:
            raise CherryError(f"{key} does not go with megatron.cuda-graph-impl {GRAPH}: {why}; take one out")
    length = config.value("seq-length")
    # Seen: 32 and 64 fail, 128 does not (benchmarks/results/2026-11-22-graphs.md).
    if length < _SHORTEST_IN_GRAPH and config.value("attention-backend").name != "unfused":
        raise CherryError(
            f"megatron.seq-length {length} does not go with megatron.cuda-graph-impl {GRAPH}: in a graph cuDNN's "
            f"attention gives gradients that are not finite below {_SHORTEST_IN_GRAPH}; use longer sequences, or "
            "megatron.attention-backend unfused"
        )


def _check_selective(config: "Config") -> None:
    if config.sgt is None:
        return
    if config.sgt.skip_head:
        if config.value("cuda-graph-impl") == GRAPH:
            raise CherryError(
                f"sgt.skip_head: the number of tokens varies, and a {GRAPH} graph replays one; take one out"
            )
        if config.distillation is not None:
            raise CherryError("sgt.skip_head: a teacher compares the outputs of all tokens; take distillation out")
    for flag in ("overlap-grad-reduce", "overlap-param-gather"):
        if config.sgt.probe_loops and config.value(flag):
            raise CherryError(
                f"sgt.probe_loops: a loop's pass leaves weights without a gradient, which megatron.{flag} waits "
                "for; set it to false, or take probe_loops out"
            )
    instances = config.value("num-distributed-optimizer-instances")
    if config.sgt.probe_interval and instances > 1:
        raise CherryError(
            f"sgt.probe_interval: outside of a step gradients are not summed over {instances} "
            "megatron.num-distributed-optimizer-instances; take one out"
        )


def check_generation(config: "Config") -> None:
    """Refuse what a model may be trained with, and not generate with.

    Raises:
        CherryError: the first such flag.
    """
    for flag, why in _NOT_CACHED.items():
        if config.value(flag) != action_of(flag).default:
            raise CherryError(f"megatron.{flag} does not go with generation, whose attention has it not: {why}")


def _check_mixture(config: "Config") -> None:
    expert, tensor = config.value("expert-model-parallel-size"), config.value("tensor-model-parallel-size")
    mixture = config.moee
    if mixture is None:
        if expert > 1 and not config.has_experts:
            raise CherryError(
                f"megatron.expert-model-parallel-size {expert} needs experts: set moee.experts, or use 1"
            )
        return
    if config.positive("expert-model-parallel-size") > mixture.experts or mixture.experts % expert:
        raise CherryError(
            f"moee.experts {mixture.experts} cannot be shared out evenly over expert-model-parallel-size {expert}"
        )
    if config.value("expert-tensor-parallel-size") not in (None, tensor):
        raise CherryError(
            "megatron.expert-tensor-parallel-size: an expert is a whole model, cut by tensor-model-parallel-size; "
            "take it out"
        )
    if config.value("pipeline-model-parallel-size") > 1:
        raise CherryError(
            "moee.experts: an expert lies whole on its tensor-parallel ranks; set pipeline-model-parallel-size to 1"
        )
    if mixture.prefix >= config.value("seq-length"):
        raise CherryError(
            f"moee.prefix {mixture.prefix} leaves no token of the {config.value('seq-length')} of seq-length with "
            "a loss; use a smaller one"
        )
    refused = {
        "sgt.skip_head": (config.sgt and config.sgt.skip_head, "the mixture needs every expert's loss"),
        "sgt.probe_interval": (config.sgt and config.sgt.probe_interval, "gradients lie on different ranks"),
        "megatron.cuda-graph-impl": (
            mixture.routes and config.value("cuda-graph-impl") != "none",
            f"the number of sequences of an expert varies with moee.top_k {mixture.top_k}",
        ),
        "megatron.num-distributed-optimizer-instances": (
            config.value("num-distributed-optimizer-instances") > 1,
            "it has not been tried with experts",
        ),
        "megatron.deterministic-mode": (
            config.value("deterministic-mode"),
            "the router's cumulative sum has no deterministic form on a GPU",
        ),
    }
    for key, (given, why) in refused.items():
        if given:
            raise CherryError(f"{key} does not go with moee.experts: {why}; take it out")
    if config.value("fp8-format") and config.value("fp8-recipe") == "delayed":  # Megatron's default
        raise CherryError(
            "megatron.fp8-format does not go with moee.experts and fp8-recipe delayed, whose scales data-parallel "
            "ranks share over different experts; set megatron.fp8-recipe to tensorwise"
        )
