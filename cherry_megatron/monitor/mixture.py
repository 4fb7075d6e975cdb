"""What is kept of experts: by step, the alarm when an expert is left out, and how its router drifts."""

from typing import Any

import torch
from megatron.core import mpu
from torch import Tensor

from cherry_megatron.model.mixture import MixtureModel
from cherry_megatron.monitor.tags import MOEE, of_step

_LEFT_OUT = 0.1  # of an even share
# What a model that is of use has: tokens that it explains, sequences that the router itself would give it.
_OF_MODELS = {
    "responsibility": "responsible for {:.1%} of the tokens",
    "wanted": "wanted by {:.1%} of the sequences",
}


class MixtureWatch:
    """Collects what is reported of experts, step by step. Of a model without it keeps nothing."""

    def __init__(self) -> None:
        self._steps: list[dict[str, float]] = []

    def step_ended(self, heard: dict[str, float]) -> dict[str, Any]:
        """Take the tags of a step.

        Returns:
            What its line in steps.jsonl says of them: `moee`, by the tag's name, without means over nothing.
        """
        found = of_step(MOEE, heard)
        if not found:
            return {}
        self._steps.append(found)
        return {"moee": found}

    def alarms(self) -> list[str]:
        """A line for each expert that had next to nothing in every step since the last call.

        Capacity gives rows also to an expert that none wants, which sees nothing at evaluation: so what is wanted
        counts, and not the load.
        """
        steps, self._steps = self._steps, []
        found = [
            _left_out(steps, name, "", words, "moee.balance, or moee.top_k") for name, words in _OF_MODELS.items()
        ]
        for layer in _layers(steps):
            words = "sees {:.1%} of the tokens"
            found.append(_left_out(steps, f"load/{layer}", f" of {layer}", words, "megatron.moe-aux-loss-coeff"))
        return [line for lines in found for line in lines]


def _layers(steps: list[dict[str, float]]) -> list[str]:
    """The layers with experts, by what is reported over all loops of each."""
    names = (tag.split("/") for tag in (steps[0] if steps else {}) if tag.startswith("load/layer-"))
    return list(dict.fromkeys(name[1] for name in names if len(name) == 3))


def _left_out(steps: list[dict[str, float]], name: str, whose: str, words: str, advice: str) -> list[str]:
    """The alarm by one kind of share: its tags are `name`/expert."""
    start = f"{name}/"
    shares = [
        {tag.removeprefix(start): share for tag, share in step.items() if tag.startswith(start)} for step in steps
    ]
    shares = [{e: share for e, share in step.items() if e.isdecimal()} for step in shares]  # without single loops
    shares = [step for step in shares if step]  # without a token with a loss there are none
    if not shares:
        return []
    limits = [_LEFT_OUT * sum(step.values()) / len(step) for step in shares]
    return [
        f"expert {expert}{whose} is left out: {words.format(max(step[expert] for step in shares))} at most, in "
        f"each of the last {len(shares)} steps; raise {advice}"
        for expert in shares[0]
        if all(step[expert] < limit for step, limit in zip(shares, limits, strict=True))
    ]


class RouterDrift:
    """How far a router has moved between two evaluations of the same rows.

    It compares what the mixture saw last, which at every evaluation of a process are the same held-out rows.
    """

    def __init__(self) -> None:
        self._before: tuple[Tensor, Tensor] | None = None

    def since_last(self, mixture: MixtureModel) -> dict[str, float]:
        """Called on all ranks after each evaluation.

        Returns:
            `router-drift`, the mean divergence KL(before || now) of the gates of a token in nats, and
            `changed-choices`, the share of rows whose own top k is another; nothing at the first evaluation.
        """
        assert mixture.seen is not None
        now, before = (mixture.seen.gates, mixture.seen.wanted), self._before
        self._before = now
        if before is None:
            return {}
        found = torch.stack((divergence(before[0], now[0]), (before[1] != now[1]).any(-1).float().mean()))
        group = mpu.get_data_parallel_group()
        torch.distributed.all_reduce(found, group=group)
        drift, changed = (found / group.size()).tolist()
        return {f"{MOEE}router-drift": drift, f"{MOEE}changed-choices": changed}


def divergence(before: Tensor, now: Tensor) -> Tensor:
    """Mean KL(before || now) of logarithms of gates, [..., experts], in nats."""
    return (before.exp() * (before - now)).sum(-1).mean()
