"""Be called around each training step, and decide whether it may update the weights.

megatron.training has no callbacks there. And have the step's learning rate reported: Megatron-core 0.19.2 reads it
when its schedule has moved on, and so reports the next step's rate beside a step's loss.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.training import training
from torch import Tensor

from cherry_megatron.platform.waiting import (
    Reading,
    ask_nobody_else,
    log_without_gpu,
    means,
    scale_from_gpu,
    scale_without_gpu,
)

_train_step = training.train_step
_NORM = "gradient norm"  # among what is read


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

    def allows(self, losses: dict[str, float], norm: float) -> bool:
        """Whether the weights are updated; called on all ranks, all of which must decide alike.

        Without an update neither the optimizer's state nor the schedule of the learning rate changes.

        Args:
            losses: what is reported, as means over the global batch; empty but on the last pipeline stage.
            norm: of the gradient.
        """
        return True

    def finish(self, model: Any) -> None:
        """After the step, before it is reported."""


def around_each_step(hooks: Hooks) -> None:
    """Call these around each step from now on; a later call replaces the earlier."""
    ask_nobody_else()
    log_without_gpu()
    used: float | None = None

    def step(
        forward_step_func: Any, data_iterator: Any, model: Any, optimizer: Any, scheduler: Any, config: Any,
        passes: Callable[..., Any], *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        nonlocal used
        data_iterator = hooks.prepare(data_iterator, model, config)
        rate = get_canonical_lr_for_logging(optimizer.param_groups)
        used = None if rate is None else float(rate)  # a tensor would change with the schedule
        reported: list[dict[str, Tensor]] = []

        def run(**given: Any) -> Any:
            hooks.begin(model)
            reported[:] = passes(**given)
            return []  # Megatron would take their means behind the update, and wait for it

        scale_from_gpu(optimizer)
        decision = _Decision(optimizer, reported, hooks.allows)
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
        scale_without_gpu(optimizer)
        return decision.losses, *done[1:]

    training.train_step = step
    training.get_canonical_lr_for_logging = lambda _: used


class _Decision:
    """Has Megatron's optimizer ask, once it has the gradient's norm, before it changes anything.

    Losses and norm set out for the host when the norm is computed, and are waited for when the update is to begin:
    meanwhile the GPU clips the gradients.

    Args:
        optimizer: Megatron's.
        reported: what each micro-batch reports, known when the optimizer begins.
        allows: of `Hooks`.
    """

    def __init__(
        self, optimizer: Any, reported: list[dict[str, Tensor]], allows: Callable[[dict[str, float], float], bool]
    ) -> None:
        self._optimizer, self._reported, self._allows = optimizer, reported, allows
        self._read: Reading | None = None
        optimizer.get_grad_norm, optimizer.step_with_ready_grads = self._norm, self._update
        optimizer.step = self._step

    @property
    def losses(self) -> dict[str, Tensor]:
        """The means over the global batch, on the CPU."""
        if self._read is None:  # the optimizer has found the gradients not finite by itself
            self._read = Reading(means(self._reported))
        return {name: value for name, value in self._read.values.items() if name != _NORM}

    def _norm(self) -> Any:
        norm = type(self._optimizer).get_grad_norm(self._optimizer)
        self._read = Reading({**means(self._reported), _NORM: norm})
        return norm

    def _update(self) -> bool:
        assert self._read is not None
        losses = {name: float(value) for name, value in self.losses.items()}
        allowed = self._allows(losses, float(self._read.values[_NORM]))
        return allowed and bool(type(self._optimizer).step_with_ready_grads(self._optimizer))

    def _step(self) -> tuple[bool, float | None, Any]:
        updated, norm, zeros = type(self._optimizer).step(self._optimizer)
        if norm is not None:
            assert self._read is not None
            norm = float(self._read.values[_NORM])  # which need not be waited for again
        return updated, norm, zeros
