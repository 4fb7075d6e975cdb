"""What selective supervision does before a training step: alpha, online selection, the probe."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.training import get_args
from torch import Tensor

from cherry_megatron.data.batches import SELECTED
from cherry_megatron.objective import Objective
from cherry_megatron.platform.undisturbed import undisturbed
from cherry_megatron.sgt.probe import Probe

Rows = list[dict[str, Tensor]]
Passes = list["Rows | None"]  # of each model chunk; None on ranks that read no data


class BeforeStep:
    """Called before each step, see platform/steps.py.

    Args:
        objective: with a supervision.
        probe: called at each `sgt.probe_interval`-th step.
    """

    def __init__(self, objective: Objective, probe: Probe) -> None:
        assert objective.supervision is not None
        self._objective, self._supervision, self._probe = objective, objective.supervision, probe

    def __call__(self, data_iterator: Any, model: list[torch.nn.Module], config: Any) -> Any:
        iteration = get_args().curr_iteration
        options = self._supervision.options
        self._supervision.alpha.fill_(options.alpha_at(iteration))
        probing = bool(options.probe_interval) and (iteration + 1) % options.probe_interval == 0
        if options.top_loss is None and not probing:
            return data_iterator
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        count = get_num_microbatches()
        ahead: Passes = [None if it is None else [next(it) for _ in range(count)] for it in iterators]
        with undisturbed(model, config):
            if options.top_loss is not None:
                self._select(ahead, model, options.top_loss)
            if probing:
                self._probe(lambda: replay(ahead), model, iteration + 1)
        again = [None if rows is None else RerunDataIterator(iter(rows)) for rows in ahead]
        return again if isinstance(data_iterator, list) else again[0]

    def _select(self, ahead: Passes, model: list[torch.nn.Module], share: float) -> None:
        """Mark the targets with the highest loss of the global batch, and set rho to their exact share."""
        args = get_args()
        self._supervision.mode, self._objective.scores = "plain", []
        try:
            get_forward_backward_func()(
                forward_step_func=self._objective.forward_step,
                data_iterator=replay(ahead),
                model=model,
                num_microbatches=get_num_microbatches(),
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                forward_only=True,
            )
            scores = self._objective.scores
        finally:
            self._supervision.mode, self._objective.scores = "weighted", None
        if not mpu.is_pipeline_last_stage():
            return
        masks = torch.stack(self._masks(ahead))
        selected, rho = highest(torch.stack(scores).float(), masks, share, mpu.get_data_parallel_group())
        self._supervision.rho.fill_(rho)
        rows = ahead[-1]
        if rows is not None:
            for row, chosen in zip(rows, selected, strict=True):
                row[SELECTED] = chosen

    def _masks(self, ahead: Passes) -> list[Tensor]:
        """The loss masks of the micro-batches, [b, s], on every rank of the last stage."""
        args = get_args()
        shape = (args.micro_batch_size, args.seq_length)
        source, group = mpu.get_tensor_model_parallel_src_rank(), mpu.get_tensor_model_parallel_group()
        masks = []
        for number in range(get_num_microbatches()):
            rows = ahead[-1]
            given = torch.empty(shape, device="cuda") if rows is None else rows[number]["loss_mask"].float().cuda()
            torch.distributed.broadcast(given, source, group=group)
            masks.append(given)
        return masks


def replay(ahead: Passes) -> list[Iterator[dict[str, Tensor]] | None]:
    """Iterators over micro-batches that were read already."""
    return [None if rows is None else iter(rows) for rows in ahead]


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
