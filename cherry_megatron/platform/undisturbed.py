"""Passes through the model that training must not notice."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.training import get_timers


@contextmanager
def undisturbed(model: list[torch.nn.Module], config: Any) -> Iterator[None]:
    """Put back what forward and backward passes change: generators, gradients, scales of FP8, and the clock.

    Args:
        model: chunks of this rank.
        config: Megatron's transformer configuration.
    """
    tracker, timer = get_cuda_rng_tracker(), get_timers()("interval-time")
    generators = torch.get_rng_state(), torch.cuda.get_rng_state(), tracker.get_states()
    scales = [(kept, kept.clone()) for kept in _scales(model)]
    timers, config.timers = config.timers, None
    rerun = get_rerun_state_machine()
    mode = rerun.get_mode()
    rerun.set_mode(RerunMode.DISABLED)  # it validates the passes of a step alone
    timer.stop()
    try:
        yield
    finally:
        torch.set_rng_state(generators[0])
        torch.cuda.set_rng_state(generators[1])
        tracker.set_states(generators[2])
        for kept, was in scales:
            kept.copy_(was)
        for chunk in model:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        config.timers = timers
        rerun.set_mode(mode)
        timer.start()


def _scales(model: list[torch.nn.Module]) -> Iterator[torch.Tensor]:
    """What Transformer Engine's delayed recipe remembers in each layer."""
    for chunk in model:
        for module in chunk.modules():
            for state in getattr(module, "fp8_meta", {}).values():
                for name in ("scale", "amax_history"):
                    if isinstance(kept := getattr(state, name, None), torch.Tensor):
                        yield kept
