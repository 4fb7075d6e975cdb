"""Messages of different sizes, as experts exchange them: what NCCL takes and gloo does not.

Megatron's dispatcher of experts gathers and reduces as many tokens as each rank has, and gives split sizes as
tensors where a GPU would have brought them to the host.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist


def allow_uneven_messages() -> None:
    """Teach torch.distributed's calls of this process, which must use gloo."""
    calls: Any = dist
    exchange, gather, scatter = calls.all_to_all_single, calls.all_gather, calls.reduce_scatter

    @functools.wraps(exchange)
    def all_to_all_single(
        output: torch.Tensor, input: torch.Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        sizes = (s.tolist() if isinstance(s, torch.Tensor) else s for s in (output_split_sizes, input_split_sizes))
        return exchange(output, input, *sizes, **kwargs)

    @functools.wraps(gather)
    def all_gather(outputs: list[torch.Tensor], input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if _even(outputs):
            return gather(outputs, input, *args, **kwargs)
        group = args[0] if args else kwargs.get("group")
        outputs[dist.get_rank(group)].copy_(input)
        for rank, output in enumerate(outputs):
            dist.broadcast(output, group=group, group_src=rank)
        return None

    @functools.wraps(scatter)
    def reduce_scatter(output: torch.Tensor, inputs: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if _even(inputs):
            return scatter(output, inputs, *args, **kwargs)
        group = args[1] if len(args) > 1 else kwargs.get("group")
        for rank, part in enumerate(inputs):
            total = part.clone()
            dist.all_reduce(total, group=group)
            if rank == dist.get_rank(group):
                output.copy_(total)
        return None

    calls.all_to_all_single, calls.all_gather, calls.reduce_scatter = all_to_all_single, all_gather, reduce_scatter


def _even(tensors: list[torch.Tensor]) -> bool:
    return len({tensor.shape for tensor in tensors}) == 1
