"""Passes through the model that training must not notice."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import rerun_state_machine
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.training import get_timers
from torch import Tensor

# What Transformer Engine's delayed recipe remembers in each layer, and what it begins with.
_SCALES = {"scale": 1.0, "amax_history": 0.0}


class Remembered:
    """Generators and scales of FP8 as they are now: what passes change besides gradients.

    Args:
        model: chunks of this rank.
    """

    def __init__(self, model: list[torch.nn.Module]) -> None:
        self._model = model
        self._generators = _generators()
        self._scales = {id(kept): kept.clone() for _, kept in _scales(model)}

    def restore(self) -> None:
        """Put them back."""
        _set_generators(*self._generators)
        for name, kept in _scales(self._model):
            if id(kept) in self._scales:
                kept.copy_(self._scales[id(kept)])
            else:  # made by the first pass of all
                kept.fill_(_SCALES[name])


@contextmanager
def undisturbed(model: list[torch.nn.Module], config: Any) -> Iterator[None]:
    """Put back what forward and backward passes change: generators, gradients, scales of FP8.

    Args:
        model: chunks of this rank.
        config: Megatron's transformer configuration.
    """
    before = Remembered(model)
    timers, config.timers = config.timers, None
    rerun = rerun_state_machine.get_rerun_state_machine()
    mode = rerun.get_mode()
    # It validates the passes of a step alone, and keeps what is read meanwhile for another pass.
    _set_mode(rerun, rerun_state_machine.RerunMode.DISABLED)
    try:
        yield
    finally:
        before.restore()
        for chunk in model:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        config.timers = timers
        _set_mode(rerun, mode)


@contextmanager
def clock_stopped() -> Iterator[None]:
    """Do not count what is done among the time of training steps."""
    timer = get_timers()("interval-time")
    timer.stop()
    try:
        yield
    finally:
        timer.start()


def seconds_in_steps() -> float:
    """Of Megatron's timer so far, which stands still during evaluation and saving; waits for no GPU to tell it."""
    timer = get_timers()("interval-time")
    going_on = time.time() - timer._start_time if timer._started else 0.0
    return float(timer.active_time() + going_on)


def _set_mode(rerun: Any, mode: Any) -> None:
    """Without the line that Megatron logs each time."""
    logger = logging.getLogger(rerun_state_machine.__name__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    rerun.set_mode(mode)
    logger.setLevel(before)


def _generators() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The state of each; with CUDA graphs the tracker holds generators, not states."""
    states = {
        name: state.get_state() if isinstance(state, torch.Generator) else state
        for name, state in get_cuda_rng_tracker().get_states().items()
    }
    return torch.get_rng_state(), torch.cuda.get_rng_state(), states


def _set_generators(cpu: Tensor, device: Tensor, states: dict[str, Tensor]) -> None:
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state(device)
    tracker = get_cuda_rng_tracker()
    held = tracker.get_states()
    for name, state in held.items():
        if isinstance(state, torch.Generator):
            state.set_state(states[name])
        else:
            held[name] = states[name]
    tracker.set_states(held)


def _scales(model: list[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for chunk in model:
        for module in chunk.modules():
            for state in getattr(module, "fp8_meta", {}).values():
                for name in _SCALES:
                    if isinstance(kept := getattr(state, name, None), Tensor):
                        yield name, kept
