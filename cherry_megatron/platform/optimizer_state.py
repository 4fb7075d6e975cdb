"""Megatron-core 0.19 saves wrong optimizer state when a gradient buffer has padding between buckets.

`DistributedOptimizer.get_parameter_state_dp_zero` packs the buckets of a buffer without the padding at
their ends, but `sharded_param_state_fully_reshardable` then cuts parameters out of it at offsets that
count the padding (https://github.com/NVIDIA/Megatron-LM/pull/5077, in no 0.19 release). Every parameter
behind the first padded bucket is saved from the wrong place. Copies of tied layers have buckets of
their own, so this project would meet it often. tests/test_resume.py shows it.
"""

from typing import Any

import torch


def save_by_padded_offsets() -> None:
    """Give the saving method a packing that keeps the padding. Calling it again does nothing."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    save = DistributedOptimizer.sharded_param_state_fully_reshardable
    if getattr(save, "keeps_padding", False):
        return

    def save_with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        pack = self.get_parameter_state_dp_zero
        self.get_parameter_state_dp_zero = lambda *a, **k: _with_padding(self, pack(*a, **k))
        try:
            return save(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    save_with_padding.keeps_padding = True  # type: ignore[attr-defined]
    DistributedOptimizer.sharded_param_state_fully_reshardable = save_with_padding


def _with_padding(optimizer: Any, packed: dict | None) -> dict | None:
    """Spread each packed tensor over the whole buffer, bucket by bucket."""
    if packed is None:
        return None
    for index, buffer in enumerate(optimizer.buffers):
        for tensors in packed[index].values():
            for key, values in tensors.items():
                if not isinstance(values, torch.Tensor) or values.numel() == buffer.numel:
                    continue
                assert values.numel() == sum(bucket.numel_unpadded for bucket in buffer.buckets)
                spread = values.new_zeros(buffer.numel)
                begin = 0
                for bucket in buffer.buckets:
                    end = begin + bucket.numel_unpadded
                    spread[bucket.offset : bucket.offset + bucket.numel_unpadded] = values[begin:end]
                    begin = end
                tensors[key] = spread
    return packed
