"""A mixture with one head of multi-token prediction for all experts, beside `cherry pretrain`'s one for each.

    python benchmarks/shared_depths.py --config RUN/config.yaml --set run=FOLDER [--set KEY=VALUE ...]

Takes the arguments of `cherry pretrain` and trains what it would, but that all experts of this process have the
depths of the first one. FOLDER/evaluations.jsonl then compares with that of the run itself: `mtp` has the held-out
loss of each depth. What it starts from has depths for each expert, of which the last one's are taken. It saves no
optimizer, and is no model of this project.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from cherry_megatron.cli import main as cherry
from cherry_megatron.platform.machine import prepare


def share_depths(provider: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """A model provider whose mixtures have one block of depths."""

    @wraps(provider)
    def provide(*values: Any, **named: Any) -> torch.nn.Module:
        model: Any = provider(*values, **named)
        first, *others = model.experts.values()
        for other in others:
            other.mtp = first.mtp
        total = sum(parameter.numel() for parameter in model.parameters())
        print(f"{total:,} parameters, one block of depths for {1 + len(others)} experts", flush=True)
        return model

    return provide


def main() -> None:
    prepare()
    from cherry_megatron import pretrain

    make = pretrain.model_provider
    pretrain.model_provider = lambda config: share_depths(make(config))  # type: ignore[assignment]
    sys.exit(cherry(["pretrain", *sys.argv[1:], "--", "--no-save-optim"]))


if __name__ == "__main__":
    main()
