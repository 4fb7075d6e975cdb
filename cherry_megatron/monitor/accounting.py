"""Exact parameter, FLOP and memory accounting of unrolled models."""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from cherry_megatron.model.options import Mixture, Recurrence, room
from cherry_megatron.model.pattern import AHEAD, ATTENTION, MLP, Visit, unroll
from cherry_megatron.model.plan import Plan
from cherry_megatron.model.shape import Shape

if TYPE_CHECKING:
    from cherry_megatron.config import Config

# H100/H200 SXM, dense BF16, from NVIDIA's datasheet. MFU is against it also for FP8.
PEAK_BF16 = 989e12


@dataclass(frozen=True)
class Part:
    """One row of the account.

    Attributes:
        name: which part of the model.
        stored: parameters kept.
        active: parameters that a token meets, each once.
        effective: parameters of the untied twin that walks the same layers.
        flops: training FLOPs a token (forward and backward).
    """

    name: str
    stored: int
    active: int
    effective: int
    flops: float


def account(
    recurrence: Recurrence, shape: Shape, sequence: int, mixture: Mixture | None = None, depths: int = 0
) -> list[Part]:
    """Parameters and training FLOPs a token of each part of a model.

    Args:
        recurrence: what is walked.
        shape: its sizes.
        sequence: tokens of a sequence, for the attention's share.
        mixture: of such models, if it is one: parts count over all experts, and active are those of the top k.
        depths: of multi-token prediction. Generating token by token does without its parts.
    """
    if mixture is not None:
        each = account(recurrence, shape, sequence, depths=depths)
        return [*(_times(part, mixture) for part in each), _router(mixture, shape)]
    pattern = recurrence.parsed
    visits = unroll(pattern, recurrence.loops, recurrence.order)
    rows = []
    first, last = len(pattern.prelude), len(pattern.prelude) + len(pattern.core)
    parts = {"prelude": range(first), "core": range(first, last), "coda": range(last, len(pattern.layers))}

    def weights(layer: int) -> int:
        symbols = pattern.layers[layer]
        return shape.matmul_weights(symbols) - shape.router_weights(symbols) + shape.norm_weights(symbols)

    def flops(visit: Visit) -> float:
        symbols = pattern.layers[visit.layer]
        routed = shape.router_weights(symbols) + shape.top_k * shape.expert_weights(symbols)
        return 3 * shape.forward_flops(symbols, sequence) - 6 * routed

    rows.append(Part("embedding", *3 * (shape.vocabulary_weights,), 0.0))
    for name, layers in parts.items():
        walked = [visit for visit in visits if visit.layer in layers]
        if layers:
            held, walks = sum(map(weights, layers)), sum(weights(visit.layer) for visit in walked)
            rows.append(Part(name, held, held, walks, sum(map(flops, walked))))
    rows += _expert_rows(recurrence, shape, visits)
    if recurrence.loop_scales:
        # Two vectors a sublayer and loop; in the untied twin they are folded into the weights.
        vectors = 2 * pattern.loops * shape.hidden * sum(len(layer) for layer in pattern.core)
        rows.append(Part("loop scales", vectors, vectors, 0, 0.0))
    if recurrence.loop_rank:
        # Folded into the weights in the untied twin; here each walk is a product of its own.
        once = sum(shape.correction_weights(layer, recurrence.loop_rank) for layer in pattern.core)
        stored = pattern.loops * once
        rows.append(Part("corrections", stored, stored, 0, 6 * recurrence.loops * once))
    rows.append(Part("final norm", *3 * (shape.hidden,), 0.0))
    head = 0 if shape.tied else shape.vocabulary_weights
    rows.append(Part("output layer", *3 * (head,), 3 * shape.head_flops))
    if depths:
        weights_ahead = depths * (shape.depth_matmul_weights + shape.depth_norm_weights)
        rows.append(
            Part(
                "MTP layers",
                *3 * (weights_ahead,),
                3 * depths * (shape.depth_flops(sequence) - shape.head_flops),
            )
        )
        rows.append(Part("MTP output", 0, 0, 0, 3 * depths * shape.head_flops))
    return rows


def _expert_rows(recurrence: Recurrence, shape: Shape, visits: tuple[Visit, ...]) -> list[Part]:
    """Routers and experts of the layers `E`, if there are any."""
    pattern = recurrence.parsed
    layers, core = "".join(pattern.layers), "".join(pattern.core)
    walked = "".join(pattern.layers[visit.layer] for visit in visits)
    router, one = shape.router_weights(layers), shape.expert_weights(layers)
    if not one:
        return []
    stored = router + (pattern.loops - 1) * shape.router_weights(core) * recurrence.loop_routers
    routers, experts = shape.router_weights(walked), shape.expert_weights(walked)
    return [
        Part("routers", stored, stored, routers, 6.0 * routers),
        Part(
            "experts", shape.experts * one, shape.top_k * one, shape.experts * experts,
            6.0 * shape.top_k * experts,
        ),
    ]  # fmt: skip


def _times(part: Part, mixture: Mixture) -> Part:
    """A part of an expert, for the mixture."""
    met = mixture.top_k
    return Part(part.name, mixture.experts * part.stored, met * part.active, met * part.effective, met * part.flops)


def _router(mixture: Mixture, shape: Shape) -> Part:
    sizes = _router_sizes(mixture, shape)
    return Part("router", *3 * (sum(sizes.values()),), 6.0 * (sizes["inner"] + sizes["outer"]))


def _router_sizes(mixture: Mixture, shape: Shape) -> dict[str, int]:
    return {name: prod(size) for name, (size, _) in mixture.router(shape.vocabulary).items()}


def together(rows: list[Part]) -> Part:
    """The sum of an account."""
    return Part(
        "together",
        sum(row.stored for row in rows),
        sum(row.active for row in rows),
        sum(row.effective for row in rows),
        sum(row.flops for row in rows),
    )


def training_flops(
    recurrence: Recurrence, shape: Shape, sequence: int, mixture: Mixture | None = None, depths: int = 0
) -> float:
    """Training FLOPs a token of the whole model; arguments as for `account`."""
    return together(account(recurrence, shape, sequence, mixture, depths)).flops


@dataclass(frozen=True)
class Layout:
    """How a model is spread and trained, as far as memory is concerned.

    Attributes:
        tensor, data: parallel sizes.
        micro_batch: sequences a micro-batch.
        sequence: tokens a sequence.
        bf16: BF16 (or FP16) weights with FP32 master copy, or FP32 throughout.
        instances: of the distributed optimizer: how often its state is there among the data-parallel ranks.
        sequence_parallel: activations divided over tensor-parallel ranks throughout.
        recompute: activations recomputed a loop at a time.
        expert: expert-parallel size.
        expert_tensor: tensor-parallel size of an expert inside a layer.
        micro_batches: of a step, of which a pipeline stage keeps no more; None if they fill the pipeline.
        fp8: recipe of the layers' matrix products, if they are in FP8.
    """

    tensor: int
    data: int
    micro_batch: int
    sequence: int
    bf16: bool
    instances: int
    sequence_parallel: bool
    recompute: bool
    expert: int = 1
    expert_tensor: int = 1
    micro_batches: int | None = None
    fp8: str | None = None

    @property
    def width(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.bf16 else 4

    def copies(self, mixture: bool) -> tuple[int, int, int]:
        """How many ranks hold the same weights.

        Whole models as experts lie on as many ranks less; those inside layers have groups of their own.

        Args:
            mixture: whether the experts are whole models.

        Returns:
            Of experts inside layers, of the router of a mixture, and before them of all other weights.
        """
        inside = self.data * self.tensor // (self.expert_tensor * self.expert)
        return self.data // (self.expert if mixture else 1), inside, self.data

    def shards(self, mixture: bool) -> tuple[int, int, int]:
        """Over how many of these ranks their optimizer state is shared out."""
        whole, inside, everywhere = (max(ranks // self.instances, 1) for ranks in self.copies(mixture))
        return whole, inside, everywhere


def layout_of(config: "Config", world: int) -> Layout:
    """That of a configuration on so many ranks."""
    tensor = config.value("tensor-model-parallel-size")
    data = max(world // (tensor * config.value("pipeline-model-parallel-size")), 1)
    micro, whole = config.value("micro-batch-size"), config.value("global-batch-size")
    return Layout(
        tensor=tensor,
        data=data,
        micro_batch=micro,
        sequence=config.value("seq-length"),
        bf16=bool(config.value("bf16") or config.value("fp16")),
        instances=config.value("num-distributed-optimizer-instances"),
        sequence_parallel=bool(config.value("sequence-parallel")),
        recompute=config.value("recompute-granularity") == "full",
        expert=config.value("expert-model-parallel-size"),
        expert_tensor=config.value("expert-tensor-parallel-size") or tensor,
        micro_batches=max(whole // (micro * data), 1) if whole else None,
        fp8=config.value("fp8-recipe") if config.value("fp8-format") else None,
    )


def memory(
    plan: Plan,
    shape: Shape,
    layout: Layout,
    recurrence: Recurrence,
    mixture: Mixture | None = None,
    walked: tuple[float, float] | None = None,
) -> list[dict[str, float]]:
    """Bytes that a rank of each pipeline stage needs: weights, gradients, optimizer, activations, workspace.

    Weights and optimizer as in Megatron's own theoretical memory: 6 bytes a parameter, and 12 over the
    data-parallel ranks of an optimizer instance.

    Activations are an estimate: per token and layer, what the backward pass keeps with a fused attention
    (Korthikanti et al. 2022, equation 1, SwiGLU). The workspace is the larger of what is there at one time alone:
    the logits at the end of the forward pass, the activations of a recomputed segment in the backward pass. Of a
    mixture the experts are walked one after the other, and keep their probabilities until their turn backward.

    Args:
        plan, shape, layout, recurrence, mixture: of what.
        walked: sequences that a mixture's experts on a rank walk in a micro-batch, all together and one alone; by
            default as many as they have on average. For what they may have, see `most_walked`.
    """
    stages = []
    count = len(plan.stages)
    if walked is None:
        rows = layout.micro_batch * (mixture.top_k if mixture else 1)
        walked = rows, rows / (mixture.experts // layout.expert if mixture else 1)
    tokens, of_one = walked[0] * layout.sequence, walked[1] * layout.sequence
    for stage, visits in enumerate(plan.stages):
        parameters, experts = held_parameters(plan, shape, layout, recurrence, mixture, stage)
        state, shards = 12 if layout.bf16 else 8, layout.shards(mixture is not None)
        in_flight = min(count - stage, layout.micro_batches or count)
        router = sum(_router_sizes(mixture, shape).values()) if mixture else 0  # whole on every rank
        last = stage == count - 1
        learning = [visit for visit in visits if not recurrence.is_cut(visit)]
        kept, again = _activations(plan, shape, layout, recurrence, learning, plan.depths if last else 0)
        # In float32 the probabilities take the place of the logits; else a copy of these is kept.
        words = layout.width * last * shape.vocabulary / layout.tensor
        kept_words = words * (1 + plan.depths)
        beside = 0 if layout.width == 4 else words
        stages.append(
            {
                "weights": (parameters + experts + router) * layout.width
                + _fp8_weights(plan, shape, layout, stage),
                "gradients": (parameters + experts + router) * 4,
                "optimizer": state * (parameters / shards[0] + experts / shards[1] + router / shards[2]),
                "activations": kept * tokens * layout.width * in_flight,
                "workspace": max(
                    kept_words * tokens + beside * of_one,
                    kept_words * (tokens - of_one) + again * layout.width * of_one,
                ),
            }
        )
    return stages


def held_parameters(
    plan: Plan, shape: Shape, layout: Layout, recurrence: Recurrence, mixture: Mixture | None, stage: int
) -> tuple[float, float]:
    """Parameters on a rank of a pipeline stage: those of experts inside layers, and before them all others."""
    parameters = experts = 0.0
    for layer in plan.held[stage]:
        symbols = plan.pattern.layers[layer]
        routers = shape.router_weights(symbols)  # whole on every rank
        parameters += (shape.matmul_weights(symbols) - routers) / layout.tensor + routers
        parameters += shape.norm_weights(symbols)
        experts += shape.experts * shape.expert_weights(symbols) / (layout.expert_tensor * layout.expert)
        if plan.is_core_symbol(plan.pattern.first_symbol(layer)):
            loops = plan.pattern.loops
            parameters += 2 * loops * shape.hidden * len(symbols) * recurrence.loop_scales
            # Half of the factors, about, are cut over the ranks.
            parameters += loops * shape.correction_weights(symbols, recurrence.loop_rank)
            parameters += (loops - 1) * routers * recurrence.loop_routers
    last = stage == len(plan.stages) - 1
    if stage == 0 or (shape.tied and last):
        parameters += shape.vocabulary_weights / layout.tensor
    if last:
        parameters += shape.hidden + (0 if shape.tied else shape.vocabulary_weights / layout.tensor)
        parameters += plan.depths * (shape.depth_matmul_weights / layout.tensor + shape.depth_norm_weights)
        if plan.depths and stage > 0:  # which embeds what is predicted from
            parameters += shape.vocabulary_weights / layout.tensor
    if mixture:
        parameters *= mixture.experts // layout.expert
    return parameters, experts


def _fp8_weights(plan: Plan, shape: Shape, layout: Layout, stage: int) -> float:
    """Bytes of the copies of the layers' weights in FP8, which Transformer Engine keeps with their transposes."""
    if layout.fp8 is None:
        return 0.0
    symbols = "".join(plan.pattern.layers[layer] for layer in plan.held[stage])
    experts = shape.experts * shape.expert_weights(symbols) / (layout.expert_tensor * layout.expert)
    return 2 * (shape.matmul_weights(symbols) / layout.tensor + experts)


def most_walked(mixture: Mixture, layout: Layout, global_batch: int | None) -> tuple[int, int]:
    """How many sequences the experts of a rank walk in one micro-batch at most, all together and one alone.

    Every rank of the expert-parallel group may send all of its own, as far as there is room in the global batch. An
    expert that no sequence wants walks one that does not count.

    Args:
        mixture, layout: as for `memory`.
        global_batch: its sequences, if there is a capacity.
    """
    here = mixture.experts // layout.expert
    most = layout.expert * layout.micro_batch * min(here, mixture.top_k)
    if global_batch is not None and mixture.routes:
        most = min(most, here * room(global_batch, mixture.experts, mixture.top_k, mixture.capacity))
    most += max(here - mixture.top_k, 0)
    return most, min(most, layout.expert * layout.micro_batch)


def _activations(
    plan: Plan, shape: Shape, layout: Layout, recurrence: Recurrence, visits: list[Visit], depths: int
) -> tuple[float, float]:
    """Values a token of a stage with so many depths, of one micro-batch.

    Returns:
        What is kept from the forward to the backward pass, and what is recomputed at a time.
    """
    kept_of = partial(_kept, shape, layout)

    def kept(visit: Visit) -> float:
        symbols = plan.pattern.layers[visit.layer]
        of_loop = 0.0
        if visit.loop is not None and plan.is_core_symbol(plan.pattern.first_symbol(visit.layer)):
            shared = 1 / layout.tensor if layout.sequence_parallel else 1.0
            # An output before it is scaled, and what a correction has between its factors.
            of_loop = len(symbols) * shape.hidden * shared * recurrence.loop_scales
            of_loop += len(shape.linears(symbols)) * recurrence.loop_rank
        return sum(map(kept_of, symbols)) + of_loop

    shared = 1 / layout.tensor if layout.sequence_parallel else 1.0
    inputs = 2 * shape.hidden * shared  # of a depth, which keeps both normed too
    ahead = sum(map(kept_of, AHEAD))
    if not layout.recompute:
        return sum(map(kept, visits)) + depths * (2 * inputs + ahead), 0.0
    # As the stack cuts them: a loop at a time, or a layer at a time where there are no loops.
    segments: dict[tuple[int, int | None], float] = {}
    for visit in visits:
        looped = visit.loop is not None and plan.pattern.loops > 1
        key = (-1, visit.loop) if looped else (visit.layer, None)
        segments[key] = segments.get(key, 0.0) + kept(visit)
    again = max(0.0, *segments.values(), (inputs + ahead) * bool(depths))
    return len(segments) * shape.hidden * shared + depths * inputs, again


def _kept(shape: Shape, layout: Layout, symbol: str) -> float:
    """Values a token that a sublayer keeps for its backward pass.

    In FP8 the inputs of its products are kept in half of the bytes. That of the projection behind the attention is
    the attention's output, which that keeps in BF16: the delayed recipe has a copy (both measured,
    docs/planner.md).
    """
    shared, split = (1 / layout.tensor if layout.sequence_parallel else 1.0), 1 / layout.tensor
    heads, groups = shape.heads * shape.head_size, shape.groups * shape.head_size
    given = 1.0 if layout.fp8 is None else 0.5
    ffn = 2 if shape.gated else 1  # what goes into the activation function
    if symbol == ATTENTION:  # input, normed; q, k, v, output
        copy = 0.5 * heads * split if layout.fp8 == "delayed" else 0.0
        return (1 + given) * shape.hidden * shared + (2 * heads + 2 * groups) * split + copy
    if symbol == MLP:
        return (1 + given) * shape.hidden * shared + (ffn + given) * shape.ffn * split
    # Each of the top k has its own copy of a token, gathered over the ranks that share the expert.
    copies = (1 + given) * shape.hidden * shared + (ffn + given) * shape.expert_ffn / layout.expert_tensor
    return 2 * shape.hidden * shared + shape.top_k * copies
