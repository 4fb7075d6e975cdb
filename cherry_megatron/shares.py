"""What a rank holds of a model's tensors, and filling it from a checkpoint that was saved under any layout."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.utils import nested_values

from cherry_megatron.storage.numbers import to_float
from cherry_megatron.storage.records import Array


@dataclass(frozen=True)
class Share:
    """A rank's part of a tensor.

    Attributes:
        key: the tensor's name in checkpoints.
        shape: of the whole tensor.
        cut: where the part lies in it.
        data: the part, in the model.
    """

    key: str
    shape: tuple[int, ...]
    cut: tuple[slice, ...]
    data: torch.Tensor

    def fill(self, dtype: str, values: Array) -> None:
        """Write the part, rounded to the model's type.

        Args:
            dtype: torch's name of the stored type.
            values: the part as stored.
        """
        with torch.no_grad():
            self.data.copy_(torch.from_numpy(to_float(dtype, values).copy()).view(self.data.shape))


def shares(model: torch.nn.Module) -> Iterator[Share]:
    """The shares of this rank's part of a model; it does not talk to other ranks."""
    state = model.sharded_state_dict()  # type: ignore[operator]
    apply_factories(state)
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor):
            sizes = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)  # an expert is one of several
            cut = tuple(slice(at, at + n) for at, n in zip(shard.global_offset, sizes, strict=True))
            yield Share(shard.key, tuple(shard.global_shape), cut, shard.data)
