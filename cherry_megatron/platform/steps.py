"""Be called before and after each training step; megatron.training has no callback there.

And have the step's learning rate reported: Megatron-core 0.19.2 reads it when its schedule has moved on, and so
reports the next step's rate beside a step's loss.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
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

    used: float | None = None

    def step(
        forward_step_func: Any, data_iterator: Any, model: Any, optimizer: Any, scheduler: Any, config: Any,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        nonlocal used
        data_iterator = prepare(data_iterator, model, config)
        rate = get_canonical_lr_for_logging(optimizer.param_groups)
        used = None if rate is None else float(rate)  # a tensor would change with the schedule
        done = _train_step(forward_step_func, data_iterator, model, optimizer, scheduler, config, *args, **kwargs)
        finish(model)
        return done

    training.train_step = step
    training.get_canonical_lr_for_logging = lambda _: used
