"""Exact parameter, FLOP and memory accounting of unrolled models."""

from dataclasses import dataclass
from math import prod

from cherry_megatron.model.options import Mixture, Recurrence, room
from cherry_megatron.model.pattern import ATTENTION, MLP, MOE, Visit, unroll
from cherry_megatron.model.plan import Plan
from cherry_megatron.model.shape import Shape

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
            rows.append(
                Part(
                    name,
                    sum(map(weights, layers)),
                    sum(map(weights, layers)),
                    sum(weights(visit.layer) for visit in walked),
                    sum(map(flops, walked)),
                )
            )
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
    sizes = {name: prod(size) for name, (size, _) in mixture.router(shape.vocabulary).items()}
    return Part("router", *3 * (sum(sizes.values()),), 6.0 * (sizes["inner"] + sizes["outer"]))


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
        bf16: BF16 weights with FP32 master copy, or FP32 throughout.
        distributed_optimizer: optimizer state divided over data-parallel ranks.
        sequence_parallel: activations divided over tensor-parallel ranks throughout.
        recompute: activations recomputed a loop at a time.
        expert: expert-parallel size.
        expert_tensor: tensor-parallel size of an expert inside a layer.
    """

    tensor: int
    data: int
    micro_batch: int
    sequence: int
    bf16: bool
    distributed_optimizer: bool
    sequence_parallel: bool
    recompute: bool
    expert: int = 1
    expert_tensor: int = 1


def memory(
    plan: Plan, shape: Shape, layout: Layout, recurrence: Recurrence, mixture: Mixture | None = None
) -> list[dict[str, float]]:
    """Bytes that a rank of each pipeline stage needs: weights, gradients, optimizer, activations.

    Of a mixture they are those of the experts on a rank, with as many sequences as they have on average; for what
    they may have, see `most_rows`.

    Activations are an estimate without Transformer Engine's workspaces: per token and layer, what
    the backward pass keeps with a fused attention (Korthikanti et al. 2022, equation 1, SwiGLU).
    """
    stages = []
    width = 2 if layout.bf16 else 4
    tokens = layout.micro_batch * layout.sequence
    count = len(plan.stages)
    for stage, visits in enumerate(plan.stages):
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
        if stage == 0 or (shape.tied and stage == count - 1):
            parameters += shape.vocabulary_weights / layout.tensor
        if stage == count - 1:
            parameters += shape.hidden + (0 if shape.tied else shape.vocabulary_weights / layout.tensor)
            parameters += plan.depths * (shape.depth_matmul_weights / layout.tensor + shape.depth_norm_weights)
            if plan.depths and stage > 0:  # which embeds what is predicted from
                parameters += shape.vocabulary_weights / layout.tensor
        parameters *= mixture.experts // layout.expert if mixture else 1
        # Whole models as experts lie on as many ranks less; those inside layers have groups of their own.
        whole = layout.data // (layout.expert if mixture else 1)
        inside = layout.data * layout.tensor // (layout.expert_tensor * layout.expert)
        state = 12 if layout.bf16 else 8
        shards = (whole, inside) if layout.distributed_optimizer else (1, 1)
        in_flight = min(count - stage, count)
        depths = plan.depths if stage == count - 1 else 0
        activations = _activations(plan, shape, layout, list(visits), depths) * tokens * width * in_flight
        if stage == count - 1:
            activations += (1 + plan.depths) * tokens * shape.vocabulary / layout.tensor * (width + 4)
        stages.append(
            {
                "weights": (parameters + experts) * width,
                "gradients": (parameters + experts) * 4,
                "optimizer": state * (parameters / shards[0] + experts / shards[1]),
                "activations": activations * (mixture.top_k if mixture else 1),
            }
        )
    return stages


def most_rows(mixture: Mixture, layout: Layout, global_batch: int | None) -> int:
    """How many sequences the experts of a rank walk in one micro-batch at most.

    Every rank of the expert-parallel group may send all of its own, as far as there is room in the global batch.

    Args:
        mixture, layout: as for `memory`.
        global_batch: its sequences, if there is a capacity.
    """
    here = mixture.experts // layout.expert
    most = layout.expert * layout.micro_batch * min(here, mixture.top_k)
    if global_batch is None or not mixture.routes:
        return most
    return min(most, here * room(global_batch, mixture.experts, mixture.top_k, mixture.capacity))


def _activations(plan: Plan, shape: Shape, layout: Layout, visits: list[Visit], depths: int) -> float:
    """Values a token that a stage with so many depths keeps for the backward pass of one micro-batch."""
    shared = 1 / layout.tensor if layout.sequence_parallel else 1.0
    split = 1 / layout.tensor
    heads, groups = shape.heads * shape.head_size, shape.groups * shape.head_size
    attention = 2 * shape.hidden * shared + (2 * heads + 2 * groups) * split  # input, normed; q, k, v, output
    mlp = 2 * shape.hidden * shared + (3 if shape.gated else 2) * shape.ffn * split

    # Each of the top k has its own copy of a token, gathered over the ranks that share the expert.
    copies = 2 * shape.hidden * shared + (3 if shape.gated else 2) * shape.expert_ffn / layout.expert_tensor
    moe = 2 * shape.hidden * shared + shape.top_k * copies
    of = {ATTENTION: attention, MLP: mlp, MOE: moe}

    def kept(visit: Visit) -> float:
        return sum(of[symbol] for symbol in plan.pattern.layers[visit.layer])

    inputs = 2 * shape.hidden * shared  # of a depth, which keeps both normed too
    if not layout.recompute:
        return sum(map(kept, visits)) + depths * (2 * inputs + attention + mlp)
    # As the stack cuts them: a loop at a time, or a layer at a time where there are no loops.
    segments: dict[tuple[int, int | None], float] = {}
    for visit in visits:
        looped = visit.loop is not None and plan.pattern.loops > 1
        key = (-1, visit.loop) if looped else (visit.layer, None)
        segments[key] = segments.get(key, 0.0) + kept(visit)
    again = max(*segments.values(), (inputs + attention + mlp) * bool(depths))
    return len(segments) * shape.hidden * shared + depths * inputs + again
