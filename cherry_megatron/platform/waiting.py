"""Have the host wait for the GPU once a step, for what decides on the update.

Megatron-core 0.19.2 waits a dozen times more around each update, also where no other rank is to be asked, and
launches nothing meanwhile. Without that the host records a step and launches the next while the update runs.
"""

from typing import Any

import torch
from megatron.core import mpu
from megatron.training import dist_signal_handler, training
from torch import Tensor

_logical_and = training.logical_and_across_model_parallel_group
_reduce_max = training.reduce_max_stat_across_model_parallel_group
_gather = dist_signal_handler.all_gather_item
_log = training.training_log


class Reading:
    """Numbers on their way to the host; what is launched after them is not waited for.

    Args:
        numbers: tensors of one element on the device, or numbers that the host has.
    """

    def __init__(self, numbers: dict[str, Any]) -> None:
        self._sent = {
            name: n.to("cpu", non_blocking=True) if isinstance(n, Tensor) else n for name, n in numbers.items()
        }
        self._arrived = torch.cuda.Event() if torch.cuda.is_available() else None
        if self._arrived is not None:
            self._arrived.record()

    @property
    def values(self) -> dict[str, Any]:
        """Once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._sent


def means(reported: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Means over the global batch, of what its micro-batches report as (sum, number), as Megatron takes them."""
    found = {}
    for name in reported[0] if reported else ():
        both = torch.vstack([one[name].view(-1) for one in reported]).sum(dim=0)
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        if group.size() > 1:
            torch.distributed.all_reduce(both, group=group)
        found[name] = both[0] / both[1]
    return found


def ask_nobody_else() -> None:
    """Where a rank is alone in a group, it need not hear from it what it knows. Calling it again does nothing."""
    training.logical_and_across_model_parallel_group = _all_agree
    training.reduce_max_stat_across_model_parallel_group = _largest
    dist_signal_handler.all_gather_item = _of_all


def _is_alone(group: Any) -> bool:
    return (mpu.get_model_parallel_group() if group is None else group).size() == 1


def _all_agree(value: bool, group: Any = None) -> bool:
    return value if _is_alone(group) else _logical_and(value, group)


def _largest(value: float | None, group: Any = None) -> float | None:
    if value is None or not _is_alone(group):
        return _reduce_max(value, group)
    return float(torch.tensor(value, dtype=torch.float32))  # as precise as from the others


def _of_all(item: Any, *args: Any, **kwargs: Any) -> list[Any]:
    return [item] if torch.distributed.get_world_size() == 1 else _gather(item, *args, **kwargs)


def log_without_gpu() -> None:
    """Have Megatron's log of a step add up losses where they are: on the host. Calling it again does nothing."""
    training.training_log = _log_on_host


def _log_on_host(losses: dict[str, Tensor], sums: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    training.torch = host = _OnHost()
    try:
        return _log(losses, sums, *args, **kwargs)
    finally:
        training.torch = torch
        for name in sums.keys() - losses.keys():  # Megatron adds to these what it finds on the device
            if host.device is not None and isinstance(sums[name], Tensor):
                sums[name] = sums[name].to(host.device)


class _OnHost:
    """torch as the log is to see it: a number that it sends to the device would wait for the update there.

    Attributes:
        device: where it wanted one.
    """

    device: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        self.device = device
        return torch.tensor(*args, **kwargs)


def scale_without_gpu(optimizer: Any) -> None:
    """Between steps the loss scale is asked for by the log alone: where it is always one, the host knows it."""
    if all(getattr(one, "grad_scaler", None) is None for one in optimizer.chained_optimizers):
        optimizer.get_loss_scale = lambda: torch.tensor(1.0)


def scale_from_gpu(optimizer: Any) -> None:
    """In the passes of a step it is a tensor on the device again."""
    vars(optimizer).pop("get_loss_scale", None)
