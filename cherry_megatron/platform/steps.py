"""Be called around each training step, and decide whether it may update the weights.

megatron.training has no callbacks there. And have the step's learning rate reported: Megatron-core 0.19.2 reads it
when its schedule has moved on, and so reports the next step's rate beside a step's loss.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.training import training
from torch import Tensor

_train_step = training.train_step


class Hooks:
    """What is called around each step, in this order; these do nothing."""

    def prepare(self, data_iterator: Any, model: Any, config: Any) -> Any:
        """Before the step.

        Args:
            data_iterator, model, config: Megatron's own arguments, of `train_step`.

        Returns:
            The iterator that the step reads, the one that is given or another with the same data.
        """
        return data_iterator

    def begin(self, model: Any) -> None:
        """Before the forward and backward passes."""

    def summing(self) -> None:
        """This rank has its gradients, which are summed over ranks next; not called by a CUDA graph's replay."""

    def allows(self, losses: list[dict[str, Tensor]], norm: float) -> bool:
        """Whether the weights are updated; called on all ranks, all of which must decide alike.

        Without an update neither the optimizer's state nor the schedule of the learning rate changes.

        Args:
            losses: what each micro-batch reports, sum and count by name; empty but on the last pipeline stage.
            norm: of the gradient.
        """
        return True

    def finish(self, model: Any) -> None:
        """After the step, before it is reported."""


def around_each_step(hooks: Hooks) -> None:
    """Call these around each step from now on; a later call replaces the earlier."""

    used: float | None = None

    def step(
        forward_step_func: Any, data_iterator: Any, model: Any, optimizer: Any, scheduler: Any, config: Any,
        passes: Callable[..., Any], *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        nonlocal used
        data_iterator = hooks.prepare(data_iterator, model, config)
        rate = get_canonical_lr_for_logging(optimizer.param_groups)
        used = None if rate is None else float(rate)  # a tensor would change with the schedule
        losses: list[dict[str, Tensor]] = []

        def run(**given: Any) -> Any:
            hooks.begin(model)
            losses[:] = (found := passes(**given))
            return found

        _ask_before_updates(optimizer, lambda norm: hooks.allows(losses, norm))
        sums = config.finalize_model_grads_func

        def sum_gradients(*given: Any, **named: Any) -> Any:
            hooks.summing()
            return sums(*given, **named)

        config.finalize_model_grads_func = sum_gradients
        try:
            done = _train_step(
                forward_step_func, data_iterator, model, optimizer, scheduler, config, run, *args, **kwargs
            )
        finally:
            config.finalize_model_grads_func = sums
        hooks.finish(model)
        return done

    training.train_step = step
    training.get_canonical_lr_for_logging = lambda _: used


def _ask_before_updates(optimizer: Any, allows: Callable[[float], bool]) -> None:
    """Have Megatron's optimizer ask, once it has the gradient's norm, before it changes anything."""
    kind, norm = type(optimizer), float("nan")

    def get_grad_norm() -> float:
        nonlocal norm
        norm = kind.get_grad_norm(optimizer)
        return norm

    optimizer.get_grad_norm = get_grad_norm
    optimizer.step_with_ready_grads = lambda: allows(norm) and kind.step_with_ready_grads(optimizer)
