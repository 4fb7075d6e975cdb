"""A mixture of whole recurrent models: p(y|x) = sum_e g_e(x) p_e(y|x).

Every expert has its own embedding and head. Of a token each gives one number, the cross-entropy CE_e, and the
loss is -logsumexp_e(log g_e - CE_e). Experts lie on expert-parallel ranks, which exchange token ids, choices and
cross-entropies, never hidden states. The gradient that an expert gets for a token is its responsibility, the
posterior probability of the expert given the target.

With multi-token prediction every expert has depths of its own, and what is predicted ahead is a mixture too: of
depth d at position t, -logsumexp_e(log g_e - CE_e,d) with the gates of position t.

With a teacher every expert is compared with it, and their divergences are mixed by the gates. KL is convex, so that
KL(teacher || sum_e g_e p_e) <= sum_e g_e KL(teacher || p_e): at temperature 1 what is made small is a bound of the
mixture's own divergence, which would need every expert's distribution on one rank. At another temperature it is one
of the divergence from the mixture of the experts' softened distributions, which the softened mixture is not.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import unwrap_model
from torch import Tensor

from cherry_megatron.model.choice import top
from cherry_megatron.model.head import RecurrentModel
from cherry_megatron.model.multi_token import Ahead
from cherry_megatron.model.options import Mixture
from cherry_megatron.model.router import Router


def mixture_loss(log_gates: Tensor, losses: Tensor) -> Tensor:
    """The loss of the mixture of likelihoods, in nats.

    Args:
        log_gates: [..., experts], normalised; -inf for an expert that takes no part.
        losses: [..., experts], cross-entropy of each expert.

    Returns:
        [...]. By Jensen's inequality at most the gate-weighted mean of `losses`.
    """
    return -(log_gates - losses).logsumexp(-1)


@dataclass(frozen=True)
class Seen:
    """What a forward pass found, without gradients.

    Attributes:
        gates: [b, s, experts], logarithms of the router's gates, normalised over all experts.
        log_gates: [b, s, experts], normalised over the chosen experts, -inf for the others.
        losses: [b, s, experts], cross-entropy of each expert; of no meaning where it is not chosen.
        chosen: [b, experts], which experts have seen a row.
        wanted: [b, experts], a row's own top k.
        sent: bytes that this rank sends to others for it, the backward pass included.
    """

    gates: Tensor
    log_gates: Tensor
    losses: Tensor
    chosen: Tensor
    wanted: Tensor
    sent: int

    def report(self, mask: Tensor) -> dict[str, Tensor]:
        """What is recorded of a micro-batch, as (sum, number), so that ranks and micro-batches add up.

        The number may stay zero: a mean over nothing is NaN.

        Args:
            mask: [b, s], 0 or 1: tokens with a loss.
        """
        tokens, mask = mask.float().sum(), mask.float().unsqueeze(-1)
        chosen, wanted = self.chosen.float(), self.wanted.float()
        gates, shares = self.log_gates.exp(), (self.log_gates - self.losses).softmax(-1)
        met = mask * chosen.unsqueeze(1)  # [b, s, experts]
        # Filled on the device: a CUDA graph takes no copy from the host.
        rows, choices = wanted.new_full((), len(wanted)), wanted.sum()
        found = {
            "gate-entropy": (-(gates * self.log_gates.masked_fill(gates == 0, 0.0) * mask).sum(), tokens),
            "displaced": (((1 - chosen) * wanted).sum(), choices),
            "unplaced": (choices - chosen.sum(), choices),
            "bytes-per-token": (mask.new_full((), self.sent), mask.new_full((), mask.numel())),
        }
        of_experts = {
            "load": (chosen.sum(0), rows),
            "wanted": (wanted.sum(0), rows),
            "responsibility": ((shares * mask).sum((0, 1)), tokens),
            "loss": ((self.losses * met).sum((0, 1)), met.sum((0, 1))),
        }
        report = {name: torch.stack(pair) for name, pair in found.items()}
        for name, (totals, numbers) in of_experts.items():
            pairs = torch.stack((totals, numbers.expand_as(totals)), -1).unbind()
            report.update({f"{name}/{expert}": pair for expert, pair in enumerate(pairs)})
        return report


class Comparing(Protocol):
    """A teacher, see distillation.py."""

    def look(self, tokens: Tensor, position_ids: Tensor) -> None: ...

    def expect(self, rows: Tensor | None = None) -> None: ...

    def forget(self) -> None: ...

    def take(self) -> Tensor: ...


class MixtureModel(MegatronModule):
    """The experts of this rank and the router, which every rank has.

    Args:
        config: Megatron's configuration of an expert.
        options: the mixture.
        experts: the models that lie here, by their number among all.
        router: gates.
        groups: process groups; `ep` holds ranks with different experts, `expt_dp` those with the same.

    Attributes:
        load: [experts], share of the global batch's own choices, before capacity, that each expert has; of a
            mixture that routes, to be set before each training step.
        balance: [b] of the last forward pass, a sequence's part in the loss that keeps the choices even.
        seen: what the last forward pass found.
        ahead: what it found by multi-token prediction; None without.
        teacher: to be compared with in the next forward pass, or None.
        divergence: from the teacher, [b, s], of the last forward pass with one.
        exchanged_bytes: bytes that this rank has sent to other expert-parallel ranks so far.
    """

    def __init__(
        self,
        config: TransformerConfig,
        options: Mixture,
        experts: dict[int, RecurrentModel],
        router: Router,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.options, self.pg_collection = options, groups  # the latter by the name that Megatron looks for
        self.experts = torch.nn.ModuleDict({str(number): expert for number, expert in experts.items()})
        for parameter in self.experts.parameters():
            # Megatron reduces the gradients of such parameters over the ranks with the same experts.
            parameter.allreduce = False  # type: ignore[attr-defined]
        self.router = router
        self.load = torch.full((options.experts,), 1 / options.experts, device=torch.cuda.current_device())
        self.balance: Tensor | None = None
        self.seen: Seen | None = None
        self.ahead: Ahead | None = None
        self.teacher: Comparing | None = None
        self.divergence: Tensor | None = None
        self.exchanged_bytes = 0

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron's schedules call it; there are no pipeline stages here."""

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        attention_mask: None,
        labels: Tensor,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Losses of the mixture.

        Args:
            tokens, position_ids, labels: [b, s] of this data-parallel rank.
            attention_mask: none; attention is causal.
            chosen: [b, experts], true where an expert is to see a row; by default each row's top k.

        Returns:
            [b, s], in nats.
        """
        before = self.exchanged_bytes
        gates = self.router(tokens)
        scores = self.scores(gates)
        wanted = top(scores, self.options.top_k)
        if chosen is None:
            chosen = self._agreed(wanted) if self.options.routes else wanted
        chosen = chosen.bool()
        log_gates = gates.masked_fill(~chosen.unsqueeze(1), float("-inf")).log_softmax(-1)
        losses, *later = self._all_losses(tokens, position_ids, labels, chosen)
        sent = self.exchanged_bytes - before
        # Switch transformer (Fedus et al. 2022), equations 4 to 6, with the load of the whole global batch.
        self.balance = self.options.balance * self.options.experts * (scores * self.load).sum(-1)
        self.seen = Seen(gates.detach(), log_gates.detach(), losses.detach(), chosen, wanted, sent)
        if self.teacher is not None:
            self.divergence = (log_gates.exp() * later.pop()).sum(-1)
        if later:
            depths = self.config.mtp_num_layers
            ahead = mixture_loss(log_gates, torch.stack(later[:depths]))
            # What the mixture itself finds likeliest no rank knows: what its experts accept of their own.
            agrees = [(log_gates.exp() * agree).sum(-1) for agree in later[depths:]]
            self.ahead = Ahead(ahead, torch.stack(agrees) if agrees else None, self.config.mtp_loss_scaling_factor)
        return mixture_loss(log_gates, losses)

    def scores(self, log_gates: Tensor) -> Tensor:
        """What sequences are routed by: the mean gates over the prefix; [b, s, experts] to [b, experts]."""
        return log_gates[:, : self.options.prefix].exp().mean(1)

    def _agreed(self, chosen: Tensor) -> Tensor:
        """What the first tensor-parallel rank has chosen: where routers differ in the last bit, so may choices."""
        found = chosen.to(torch.uint8)
        torch.distributed.broadcast(found, group=self.pg_collection.tp, group_src=0)
        return found.bool()

    def _all_losses(self, tokens: Tensor, position_ids: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
        """What every expert finds for this rank's rows, [numbers, b, s, experts]; see `_numbers`."""
        group, b = self.pg_collection.ep, len(tokens)
        tokens, labels = self._gather(tokens.int()).long(), self._gather(labels.int()).long()  # [ep * b, s]
        if self.options.routes:
            chosen = self._gather(chosen.to(torch.uint8)).bool()  # [ep * b, experts]
        position_ids = position_ids[:1].expand_as(tokens)
        if self.teacher is not None:
            self.teacher.look(tokens, position_ids)
        found = []
        for number, expert in self.experts.items():
            rows = chosen[:, int(number)].nonzero().flatten() if self.options.routes else None
            found.append(_numbers(expert, tokens, position_ids, labels, rows, self.teacher))
        if self.teacher is not None:
            self.teacher.forget()
        # [experts here, numbers, ep * b, s]: to each rank those of its rows.
        mine = torch.stack(found).float().unflatten(2, (group.size(), b)).movedim(2, 0).contiguous()
        theirs: Tensor = all_to_all(group, mine)  # [ep, experts of that rank, numbers, b, s]
        # A rank's own part stays with it; the gradient goes the same way back.
        passes = 2 if theirs.requires_grad else 1
        self.exchanged_bytes += passes * (mine.nbytes - mine.nbytes // group.size())
        return theirs.flatten(0, 1).movedim(0, -1)

    def _gather(self, ours: Tensor) -> Tensor:
        """The rows of all expert-parallel ranks, [b, n] to [ep * b, n]."""
        group = self.pg_collection.ep
        if group.size() == 1:
            return ours
        ours = ours.contiguous()
        everyone = ours.new_empty(group.size() * len(ours), *ours.shape[1:])
        torch.distributed.all_gather_into_tensor(everyone, ours, group=group)
        self.exchanged_bytes += everyone.nbytes - ours.nbytes
        return everyone

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The router, and each expert under `experts.NUMBER.` with the names that it has as a model alone."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = self.router.sharded_state_dict(f"{prefix}router.", sharded_offsets, metadata)
        copies = {**metadata, "dp_cp_group": self.pg_collection.expt_dp}
        for number, expert in self.experts.items():
            one: Any = expert
            state.update(one.sharded_state_dict(f"{prefix}experts.{number}.", sharded_offsets, copies))
        return state


def _numbers(
    expert: Any,
    tokens: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    teacher: Comparing | None,
) -> Tensor:
    """Numbers of each token by an expert, [numbers, B, s].

    They are its cross-entropy, those of its depths, in evaluation whether it accepts each of these, its divergence.

    Args:
        expert: a RecurrentModel.
        tokens, position_ids, labels: [B, s].
        rows: numbers of those that it sees, 0 for all others; None: all.
        teacher: that it is compared with, which has read the tokens; None: it is not.
    """
    if rows is None:
        return _pass(expert, tokens, position_ids, labels, None, teacher)
    of_depth = 1 if expert.training else 2
    count = 1 + (expert.config.mtp_num_layers or 0) * of_depth + (teacher is not None)
    if not len(rows) and not expert.training:
        return torch.zeros((count, *tokens.shape), device=tokens.device)
    # Without a row of its own it walks one that its gate leaves out: gradients and collectives stay whole.
    some = rows if len(rows) else rows.new_zeros(1)
    found = _pass(expert, tokens[some], position_ids[some], labels[some], some, teacher)
    return torch.zeros((count, *tokens.shape), device=found.device).index_add(1, some, found)


def _pass(
    expert: Any,
    tokens: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    teacher: Comparing | None,
) -> Tensor:
    """The numbers of the rows that are given, whose places among the teacher's are `rows`."""
    if teacher is not None:
        teacher.expect(rows)
    found = [expert(tokens, position_ids, None, labels=labels, agreement=not expert.training).float().unsqueeze(0)]
    if expert.ahead is not None:
        found.append(expert.ahead.losses.float())
        if expert.ahead.agrees is not None:
            found.append(expert.ahead.agrees.float())
    if teacher is not None:
        found.append(teacher.take().float().unsqueeze(0))
    return torch.cat(found)


def mixture_of(model: torch.nn.Module) -> MixtureModel | None:
    """The mixture inside Megatron's wrappers, or None if the model is none."""
    inner = unwrap_model(model)
    return inner if isinstance(inner, MixtureModel) else None
