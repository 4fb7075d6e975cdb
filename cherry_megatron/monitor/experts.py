"""What is shown of experts inside layers: their load and the entropy of the gates."""

import torch

from cherry_megatron.model.experts import routers_of
from cherry_megatron.model.options import Recurrence
from cherry_megatron.model.pattern import MOE, Pattern


def expert_layers(pattern: Pattern) -> dict[int, str]:
    """The stored sublayers `E` by number from 0, each with its layer's name: layers are counted from 1.

    A second one of a layer is `layer-3b`, and so on.
    """
    found, number = {}, 0
    for layer, symbols in enumerate(pattern.layers, start=1):
        names = iter(("", *"bcdefghijklmnopqrstuvwxyz"))
        for symbol in symbols:
            if symbol == MOE:
                found[number] = f"layer-{layer}{next(names)}"
            number += 1
    return found


def report_of_step(
    model: list[torch.nn.Module], recurrence: Recurrence, experts: int, coefficient: float, each_walk: bool
) -> tuple[dict[str, float], float]:
    """What the routers of all ranks have seen in the step that has ended; every rank must call it.

    Args:
        model: chunks of this rank.
        recurrence: of the model.
        experts: of a layer.
        coefficient: of the load-balancing loss.
        each_walk: report of each loop too.

    Returns:
        By name (`load/layer-2/0`, `gate-entropy/layer-2`: the mean over the loops of the step; if asked for
        `load/layer-2/loop-1/0` and so on), without walks that had no gradient; and the load-balancing loss of the
        step, the sum over layers and loops.
    """
    names = expert_layers(recurrence.parsed)
    # Every token and walk is on one rank, so a sum over the world counts each once.
    sums = torch.zeros(len(names), recurrence.loops, 2 * experts + 2, dtype=torch.float64)
    for chunk in model:
        for number, router in routers_of(chunk):
            if router.seen is not None:
                sums[list(names).index(number), : router.walks] += router.seen.cpu()
                router.seen = None
    sums = sums.to(torch.cuda.current_device())
    torch.distributed.all_reduce(sums)
    report: dict[str, float] = {}
    balance = 0.0
    for name, walks in zip(names.values(), sums.cpu(), strict=True):
        report |= _shares(name, walks.sum(0))
        for loop, walk in enumerate(walks, start=1):
            if each_walk:
                report |= _shares(f"{name}/loop-{loop}", walk)
            choices, scores, (_, tokens) = walk.split((experts, experts, 2))
            if tokens > 0:
                balance += coefficient * experts * float((choices / choices.sum()) @ (scores / tokens))
    return report, balance


def _shares(name: str, sums: torch.Tensor) -> dict[str, float]:
    """What is reported of sums as in `LoopRouter.seen`, [2 * experts + 2]; nothing of no token."""
    experts = len(sums) // 2 - 1
    choices, _, (entropy, tokens) = sums.split((experts, experts, 2))
    if tokens == 0:
        return {}
    loads = {f"load/{name}/{expert}": float(count / tokens) for expert, count in enumerate(choices)}
    return loads | {f"gate-entropy/{name}": float(entropy / tokens)}
