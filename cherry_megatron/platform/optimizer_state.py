"""The optimizer's state for a checkpoint, parameter by parameter.

`DistributedOptimizer.get_parameter_state_dp_zero` of Megatron-core 0.19.2 copies each value about seven times, in
memory of the host that is new each time: to the host in pieces, back to the device for the exchange, to the host
again, joined, packed, and cut up. It packs the buckets of a buffer without the padding at their ends, but
`sharded_param_state_fully_reshardable` then cuts parameters out at offsets that count the padding
(https://github.com/NVIDIA/Megatron-LM/pull/5077, in no 0.19 release): every parameter behind the first padded
bucket is saved from the wrong place. Copies of tied layers have buckets of their own, so this project would meet it
often.

In its place here: a parameter's state is taken where it is if a rank has it whole; else it is exchanged on the
device, a bucket at a time, and comes to the host once. tests/test_resume.py shows that it is the right one.
"""

from typing import Any

import torch


def save_by_parameter() -> None:
    """Give the method that saves its parameters' state in this way. Calling it again does nothing."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    save = DistributedOptimizer.sharded_param_state_fully_reshardable
    if getattr(save, "by_parameter", False):
        return

    def save_by_parameter(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.get_parameter_state_dp_zero = lambda **how: _state(self, **how)
        try:
            return save(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    save_by_parameter.by_parameter = True  # type: ignore[attr-defined]
    DistributedOptimizer.sharded_param_state_fully_reshardable = save_by_parameter


class _Pieces(dict[int, torch.Tensor]):
    """A buffer's values as its parameters': what is cut out is one of them, found by where it begins."""

    def __getitem__(self, cut: slice) -> torch.Tensor:  # type: ignore[override]
        return super().__getitem__(cut.start)


def _state(
    optimizer: Any, use_gloo_comm: bool, empty_data: bool, return_on_all_ranks: bool
) -> dict[int, Any] | None:
    """By buffer, its data type and the state's name; None on ranks that are to have nothing."""
    group = optimizer.data_parallel_group_gloo if use_gloo_comm else optimizer.data_parallel_group
    has_it = return_on_all_ranks or group.rank() == 0
    found: dict[int, Any] = {}
    for index, (buffer, ranges) in enumerate(zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True)):
        ((dtype, of_buckets),) = ranges.items()
        pieces = {key: _Pieces() for key in ("param", *optimizer.optimizer_state_keys)}
        for bucket, here in zip(buffer.buckets, of_buckets, strict=True):
            places = [buffer.param_index_map[param][:2] for param in bucket.params_list]
            if empty_data:
                for of_key in pieces.values():
                    of_key.update((begin, torch.zeros(end - begin)) for begin, end in places)
            elif group.size() == 1:
                _add_own(optimizer, buffer, here["param_map"], pieces)
            else:
                for key, of_key in pieces.items():
                    whole = _gathered(optimizer, bucket, here["param_map"], key, group, use_gloo_comm)
                    if has_it:
                        at = bucket.offset
                        of_key.update((begin, whole[begin - at : end - at].cpu()) for begin, end in places)
        found[index] = {dtype: pieces}
    return found if has_it else None


def _add_own(optimizer: Any, buffer: Any, params: dict[Any, Any], pieces: dict[str, _Pieces]) -> None:
    """Of parameters that this rank has whole."""
    unscaled = (
        optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    )  # copies of it, which fill the device
    for param in params:
        state = optimizer._get_main_param_and_optimizer_states(param)
        for key, of_key in pieces.items():
            values = state[key].detach().float()
            of_key.update({buffer.param_index_map[param][0]: values.cpu() if unscaled else values})


def _gathered(
    optimizer: Any, bucket: Any, params: dict[Any, Any], key: str, group: Any, on_host: bool
) -> torch.Tensor:
    """A bucket's state of one name, of all ranks, with its padding."""
    size, device = bucket.grad_data.numel(), torch.device("cpu") if on_host else bucket.grad_data.device
    own = torch.zeros(size // group.size(), device=device)
    for param, ranges in params.items():
        at = ranges["gbuf_local"]
        own[at.start : at.end].copy_(optimizer._get_main_param_and_optimizer_states(param)[key].detach())
    whole = torch.empty(size, device=device)
    torch.distributed.all_gather_into_tensor(whole, own, group=group)
    return whole
