"""What is shown of experts inside layers: by layer and loop their load and the entropy of the gates."""

from collections.abc import Iterator

import torch

from cherry_megatron.model.experts import routers_of
from cherry_megatron.model.options import Recurrence
from cherry_megatron.model.pattern import MOE, Pattern

LEFT_OUT = 0.1  # of an even share


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
    model: list[torch.nn.Module], recurrence: Recurrence, experts: int, coefficient: float
) -> tuple[dict[str, float], float]:
    """What the routers of all ranks have seen in the step that has ended; every rank must call it.

    Args:
        model: chunks of this rank.
        recurrence: of the model.
        experts: of a layer.
        coefficient: of the load-balancing loss.

    Returns:
        By name (`load/layer-2/loop-1/0`, `gate-entropy/layer-2/loop-1`), without walks that had no gradient; and
        the load-balancing loss of the step, the sum over layers and loops.
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
        for loop, walk in enumerate(walks, start=1):
            choices, scores, (entropy, tokens) = walk.split((experts, experts, 2))
            if tokens == 0:
                continue
            report |= {f"load/{name}/loop-{loop}/{e}": float(c / tokens) for e, c in enumerate(choices)}
            report[f"gate-entropy/{name}/loop-{loop}"] = float(entropy / tokens)
            balance += coefficient * experts * float((choices / choices.sum()) @ (scores / tokens))
    return report, balance


def left_out(steps: list[dict[str, float]]) -> Iterator[str]:
    """A line for each expert of a layer that had next to no token, over all loops, in every step.

    Args:
        steps: what `report_of_step` gave.
    """
    shares = [_shares(step) for step in steps]
    for name, loads in (shares[0] if shares else {}).items():
        for expert in range(len(loads)):
            most = max(step[name][expert] * len(step[name]) for step in shares)
            if most < LEFT_OUT:
                yield (
                    f"expert {expert} of {name} is left out: {most:.1%} of an even share of the tokens at most, in "
                    f"each of the last {len(steps)} steps; raise megatron.moe-aux-loss-coeff"
                )


def _shares(step: dict[str, float]) -> dict[str, list[float]]:
    """Of each layer the share of the choices that each expert has, over all loops."""
    loads: dict[str, dict[int, float]] = {}
    for tag, load in step.items():
        if tag.startswith("load/layer-"):
            _, name, _, expert = tag.split("/")
            layer = loads.setdefault(name, {})
            layer[int(expert)] = layer.get(int(expert), 0.0) + load
    return {
        name: [load / sum(layer.values()) for _, load in sorted(layer.items())] for name, layer in loads.items()
    }
