"""Be called before and after each training step; megatron.training has no callback there."""

from collections.abc import Callable
from typing import Any

from megatron.training import training

_train_step = training.train_step


def around_each_step(prepare: Callable[..., Any], finish: Callable[..., None]) -> None:
    """Call `prepare(data_iterator, model, config)` before each step from now on, and `finish(model)` after it.

    A later call replaces the earlier.

    Args:
        prepare: gives the iterator that the step reads, the one it was given or another with the same data. Its
            arguments are Megatron's own, of `train_step`.
        finish: before the step is reported.
    """

    def step(
        forward_step_func: Any, data_iterator: Any, model: Any, optimizer: Any, scheduler: Any, config: Any,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        data_iterator = prepare(data_iterator, model, config)
        done = _train_step(forward_step_func, data_iterator, model, optimizer, scheduler, config, *args, **kwargs)
        finish(model)
        return done

    training.train_step = step
