"""The loss of a micro-batch: every token's own, weighted, and what is reported of it.

    w_t = (1 - alpha) + alpha * s_t / rho          loss = sum(w_t * l_t) / number of tokens

s_t is 1 for selected tokens, rho the selected share of the whole data set. So over the data set the loss is
alpha * (mean over selected tokens) + (1 - alpha) * (mean over all tokens), the mixed loss of the paper. Neither
the weights nor the number of tokens depend on a micro-batch, so no split of the data changes the gradients.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from cherry_megatron.data.dataset import rho_of
from cherry_megatron.model.multi_token import Ahead
from cherry_megatron.sgt.options import Selective

NONE_SELECTED = 1e-20  # instead of a count of zero: a mean over no tokens is reported as 0

Mode = Literal["weighted", "selected", "unselected", "plain"]


class Supervision:
    """How much each token counts in the step that runs.

    Attributes:
        options: of the configuration.
        share: selected share of the training split; of online selection, what is asked for.
        mode: `weighted` for training; the mean over `selected` or `unselected` tokens for the probe, up to a
            constant; `plain` for their scores.
        alpha, rho: tensors without dimensions, so that a CUDA graph sees their new values.

    Args:
        options: of the configuration.
        train: the training split, on ranks that read data. Every rank must make a Supervision: rank 0, which
            reads, counts rho for all. None if nothing is trained.
    """

    def __init__(self, options: Selective, train: Any) -> None:
        self.options = options
        self.mode: Mode = "weighted"
        device = torch.cuda.current_device()
        share = torch.tensor(options.top_loss or 0.0, dtype=torch.float64, device=device)
        if options.marks is not None:
            if torch.distributed.get_rank() == 0 and train is not None:
                share.fill_(rho_of(train))
            torch.distributed.broadcast(share, 0)
        self.share = float(share)
        self.alpha = torch.tensor(options.alpha_at(0), dtype=torch.float32, device=device)
        self.rho = share.float()

    def has_selection(self, training: bool) -> bool:
        """Whether batches come with `selected`: online selection has none at evaluation and for its scores."""
        return self.options.marks is not None or (training and self.mode != "plain")

    def weights(self, selected: Tensor) -> Tensor:
        """Weight of each token; selected: 0 or 1, any shape."""
        if self.mode == "selected":
            return selected
        if self.mode == "unselected":
            return 1 - selected
        return (1 - self.alpha) + self.alpha * selected / self.rho

    @property
    def skips_head(self) -> bool:
        """Whether the output layer may be left out for tokens that are not selected."""
        return self.options.skip_head and self.mode == "weighted"


def loss_function(
    loss_mask: Tensor | None,
    losses: Tensor,
    selected: Tensor | None = None,
    weights: Tensor | None = None,
    partly: bool = False,
    divergence: Tensor | None = None,
    share: float = 0.0,
    balance: Tensor | None = None,
    ahead: Ahead | None = None,
    further: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the token losses; Megatron divides by the token count of the whole global batch.

    Args:
        loss_mask: [b, s], 0 or 1; there is one on the last pipeline stage, where this is called.
        losses: [b, s], cross-entropy of each token in nats.
        selected: [b, s], 0 or 1; reported apart if given.
        weights: [b, s], of the tokens in the sum; by default 1.
        partly: only the losses of selected tokens are known.
        divergence: [b, s], of the student from its teacher, in nats.
        share: of the divergence; the cross-entropy has the rest.
        balance: [b], of a mixture that routes: added for each token of a sequence, whatever its weight.
        ahead: of multi-token prediction; its losses are added, each weighted like the token that it predicts.
        further: what else to report, each as (sum, number).

    Returns:
        The sum, the integer number of tokens, and for the report (sum, number) of the cross-entropy over all,
        selected and unselected tokens, of the weighted loss, of the divergence and of the balance.
    """
    assert loss_mask is not None
    mask = loss_mask.float().view(-1)
    losses = losses.float().view(-1)
    counted = mask if weights is None else mask * weights.float().view(-1)
    total = torch.sum(losses * counted)
    tokens = mask.sum().to(torch.int)
    report = {} if partly else {"lm loss": _pair(losses, mask)}
    if selected is not None:
        chosen = mask * selected.float().view(-1)
        report["selected loss"] = _pair(losses, chosen)
        if not partly:
            report["unselected loss"] = _pair(losses, mask - chosen)
    if divergence is not None:
        apart = divergence.float().reshape(-1)
        report["divergence from teacher"] = _pair(apart, mask)
        total = (1 - share) * total + share * torch.sum(apart * counted)
    if weights is not None:
        report["weighted loss"] = torch.stack((total.detach(), mask.sum()))
    if balance is not None:
        added = balance.unsqueeze(-1).expand_as(loss_mask).reshape(-1)
        report["balance loss"] = _pair(added, mask)
        total = total + torch.sum(added * mask)
    if ahead is not None:
        total = total + ahead.total(counted.view_as(loss_mask))
    return total, tokens, report | (further or {})


def _pair(losses: Tensor, mask: Tensor) -> Tensor:
    return torch.stack((torch.sum(losses.detach() * mask), mask.sum().clamp(min=NONE_SELECTED)))
