"""Online selection: the tokens of a global batch with the highest loss, before the step that trains on it."""

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import get_args
from torch import Tensor

from cherry_megatron.data.batches import SELECTED, Rows
from cherry_megatron.objective import Objective
from cherry_megatron.sgt.loss import Supervision


def select(supervision: Supervision, rows: Rows, scores: list[Tensor]) -> None:
    """Mark the targets with the highest loss of the global batch, and set rho to their exact share.

    All ranks call it.

    Args:
        supervision: of the training; `top_loss` of the targets is selected.
        rows: the micro-batches of the step, which get `selected` on the last stage.
        scores: what `scores_of` gives of them.
    """
    share = supervision.options.top_loss
    assert share is not None
    if not mpu.is_pipeline_last_stage():
        return
    selected, rho = highest(torch.stack(scores).float(), _masks(rows), share, mpu.get_data_parallel_group())
    supervision.rho.fill_(rho)
    if rows is not None:
        for row, chosen in zip(rows, selected, strict=True):
            row[SELECTED] = chosen


def scores_of(objective: Objective, rows: Rows, model: list[torch.nn.Module]) -> list[Tensor]:
    """The token losses [b, s] of each micro-batch on the last stage, by a forward pass. All ranks call it."""
    args, supervision = get_args(), objective.supervision
    scores: list[Tensor] = []
    if supervision is not None:
        supervision.mode = "plain"
    objective.scores = scores
    try:
        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=objective.forward_step,
                data_iterator=rows and iter(rows),
                model=model,
                num_microbatches=get_num_microbatches(),
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                forward_only=True,
            )
    finally:
        objective.scores = None
        if supervision is not None:
            supervision.mode = "weighted"
    return scores


def _masks(rows: Rows) -> Tensor:
    """The loss masks of the micro-batches on every rank of the last stage, [m, b, s]."""
    args = get_args()
    shape = (get_num_microbatches(), args.micro_batch_size, args.seq_length)
    masks = torch.empty(shape, device=torch.cuda.current_device())
    if rows is not None:
        masks.copy_(torch.stack([row["loss_mask"] for row in rows]))
    source, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
    torch.distributed.broadcast(masks, source, group=group)
    return masks


def highest(
    scores: Tensor, masks: Tensor, share: float, group: torch.distributed.ProcessGroup
) -> tuple[Tensor, float]:
    """The tokens with the highest scores of the global batch, exactly so many, under any split of it.

    Args:
        scores: [m, b, s] of this rank's micro-batches.
        masks: [m, b, s], 0 or 1: tokens that can be selected.
        share: of these; at least one token is selected.
        group: data-parallel ranks, which read the micro-batches of a batch in turns.

    Returns:
        1 for selected tokens, [m, b, s]; and the exact share that is selected.
    """
    scores = scores.masked_fill(masks == 0, float("-inf"))
    everyone = [torch.empty_like(scores) for _ in range(group.size())]
    torch.distributed.all_gather(everyone, scores, group=group)
    # [m, ranks, b, s] is the order of the data, by which ties are broken.
    together = torch.stack(everyone, dim=1)
    eligible = int((together > float("-inf")).sum())
    if not eligible:
        return torch.zeros_like(scores), 1.0
    count = max(round(share * eligible), 1)
    order = together.flatten().sort(descending=True, stable=True).indices[:count]
    chosen = torch.zeros_like(together).flatten().index_fill_(0, order, 1.0).view_as(together)
    return chosen[:, group.rank()], count / eligible
