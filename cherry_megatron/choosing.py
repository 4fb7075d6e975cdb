"""Before a training step of a mixture that routes: which experts see which sequence of the global batch.

The router reads the beginnings of all sequences, ranks exchange their scores, and every rank comes to the same
choice (model/choice.py), whatever the split. It costs the router's pass over the prefixes, and no expert's.
"""

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args
from torch import Tensor

from cherry_megatron.data.batches import EXPERTS
from cherry_megatron.model.choice import assign
from cherry_megatron.model.mixture import MixtureModel
from cherry_megatron.sgt.online import Rows


def choose_experts(mixture: MixtureModel, rows: Rows) -> None:
    """Give each micro-batch of a step its `experts`, and the mixture their load. All ranks call it.

    Args:
        mixture: on this rank.
        rows: the micro-batches of the step, on ranks that read data.
    """
    options = mixture.options
    with torch.no_grad():
        prefixes = _prefixes(rows, options.prefix)  # [m, b, prefix]
        scores = mixture.scores(mixture.router(prefixes.flatten(0, 1)))
    scores = scores.view(*prefixes.shape[:2], options.experts)
    group = mpu.get_data_parallel_group()
    everyone = [torch.empty_like(scores) for _ in range(group.size())]
    torch.distributed.all_gather(everyone, scores.contiguous(), group=group)
    together = torch.stack(everyone, dim=1)  # [m, ranks, b, experts], in the order of the data
    chosen = assign(together.flatten(0, 2), options.top_k, options.capacity)
    mixture.load.copy_(chosen.float().mean(0) / chosen.float().mean(0).sum())
    if rows is not None:
        ours = chosen.view_as(together)[:, group.rank()].float()
        for row, experts in zip(rows, ours, strict=True):
            row[EXPERTS] = experts


def _prefixes(rows: Rows, prefix: int) -> Tensor:
    """The first tokens of this rank's sequences on all tensor-parallel ranks, [m, b, prefix]."""
    args = get_args()
    shape = (get_num_microbatches(), args.micro_batch_size, prefix)
    found = torch.empty(shape, dtype=torch.int64, device=torch.cuda.current_device())
    if rows is not None:
        found.copy_(torch.stack([row["tokens"][:, :prefix] for row in rows]))
    source, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
    torch.distributed.broadcast(found, source, group=group)
    return found
