"""Low-rank corrections of the loops: each walk of a core layer may differ a little from the shared weights.

In loop l a linear layer computes (W + B_l A_l) x, with A_l [rank, in] and B_l [out, rank]: the form of LoRA (Hu et
al. 2022), one a loop as in Bae et al. 2025, "Relaxed Recursive Transformers". B is zero at initialization, so an
unrolled stack starts as the plain one walked again; depth compression starts both from the layers that the loops
stand in for. They fold into the weights, so an unrolled dense twin exists.

Tensor parallelism cuts them like the weight: B with the rows of a column-parallel layer, A with the columns of a
row-parallel one. Ranks exchange activations of `rank` values a token.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional as F

from cherry_megatron.model.loops import PerLoop
from cherry_megatron.model.seeding import seeded

AXIS = 2  # of A [loops, rank, in] and of B [loops, parts, out/parts, rank]


class _Corrected(PerLoop):
    """What is added to a parallel linear layer; `loop` is set by the stack before each walk.

    Args:
        input_size, output_size: of the whole layer.
        loops: how many corrections.
        rank: of each.
        parts: matrices stacked in the output (2 for SwiGLU's gate and up, which ranks cut one by one).
        Others: as in the linear layer.
    """

    _sharded: str  # the factor that is cut over the ranks, along AXIS
    # With and without sequence parallelism: what takes [s, b, rank] from the linear layer's input side to its
    # output side; s is whole, or this rank's share.
    _between_ranks: ClassVar[dict[bool, Callable[..., Tensor]]]

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        loops: int,
        rank: int,
        parts: int,
        config: TransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
        **kwargs: Any,
    ) -> None:
        linear: Any = super()
        linear.__init__(input_size, output_size, config=config, tp_group=tp_group, **kwargs)
        self.loops, self._group, self._sequence_parallel = loops, tp_group, config.sequence_parallel
        with seeded(torch.initial_seed(), kwargs["tp_comm_buffer_name"]):
            inner = torch.randn(loops, rank, input_size) / input_size**0.5
        outer = torch.zeros(loops, parts, output_size // parts, rank)
        self.loop_a = self._parameter("loop_a", inner, config)
        self.loop_b = self._parameter("loop_b", outer, config)

    def _parameter(self, name: str, whole: Tensor, config: TransformerConfig) -> torch.nn.Parameter:
        """This rank's share of a factor."""
        mine = name == self._sharded
        if mine:
            whole = whole.chunk(self._group.size(), AXIS)[self._group.rank()].clone()
        parameter = torch.nn.Parameter(whole.to(config.params_dtype))
        set_tensor_model_parallel_attributes(parameter, mine, AXIS if mine else -1, 1)
        if not mine:
            # Under sequence parallelism each rank sees its own tokens: Megatron sums marked gradients.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return parameter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        exchange = self._between_ranks[self._sequence_parallel]
        inner = exchange(F.linear(x, self.loop_a[self.walk]), group=self._group)
        return output + F.linear(inner, self.loop_b[self.walk].flatten(0, 1)), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        factors = {"loop_a": self.loop_a, "loop_b": self.loop_b}
        return state | make_sharded_tensors_for_checkpoint(
            factors,
            prefix,
            {self._sharded: AXIS},
            sharded_offsets,
            tp_group=self._group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class _CorrectedColumn(_Corrected):
    _sharded = "loop_b"
    _between_ranks: ClassVar = {
        False: copy_to_tensor_model_parallel_region,
        True: gather_from_sequence_parallel_region,
    }


class _CorrectedRow(_Corrected):
    _sharded = "loop_a"
    _between_ranks: ClassVar = {
        False: reduce_from_tensor_model_parallel_region,
        True: reduce_scatter_to_sequence_parallel_region,
    }


@cache
def corrected_column(linear: type) -> type:
    """A column-parallel linear layer, Transformer Engine's or Megatron's own, with corrections."""
    return type(f"Corrected{linear.__name__}", (_CorrectedColumn, linear), {})


@cache
def corrected_row(linear: type) -> type:
    """Likewise of a row-parallel one."""
    return type(f"Corrected{linear.__name__}", (_CorrectedRow, linear), {})
