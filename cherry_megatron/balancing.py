"""Before a training step of a model with experts inside layers: the load of its routers over the global batch.

The load-balancing loss (model/experts.py) needs it in the first backward pass already. A step of one micro-batch a
rank has it from an exchange within the pass; a step of several makes a forward pass over all of them first.
"""

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args
from torch import Tensor

from cherry_megatron.data.batches import Rows
from cherry_megatron.model.experts import routers_of
from cherry_megatron.objective import Objective
from cherry_megatron.sgt.online import scores_of


def balance_over_global_batch(
    objective: Objective, rows: Rows, model: list[torch.nn.Module]
) -> list[Tensor] | None:
    """Tell the routers what they need of the global batch. All ranks call it.

    Args:
        objective: of the training.
        rows: the micro-batches of the step, on ranks that read data.
        model: chunks of this rank.

    Returns:
        What `scores_of` gives, if it took a forward pass.
    """
    routers = [router for chunk in model for _, router in routers_of(chunk)]
    share = _share_with_loss(rows)
    for router in routers:
        router.share, router.load = share, None
    if get_num_microbatches() == 1 or get_args().moe_aux_loss_coeff == 0:
        return None
    for router in routers:
        router.start_counting()
    scores = scores_of(objective, rows, model)
    for router in routers:
        router.end_counting()
    return scores


def _share_with_loss(rows: Rows) -> float:
    """The share of the global batch's tokens that carry a loss, on every rank."""
    found = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    if rows is not None and mpu.is_pipeline_last_stage():
        masks = torch.stack([row["loss_mask"] for row in rows])
        found += torch.tensor([float(masks.sum(dtype=torch.float64)), masks.numel()], device=found.device)
    torch.distributed.all_reduce(found)
    carry, tokens = found.tolist()
    return carry / tokens
