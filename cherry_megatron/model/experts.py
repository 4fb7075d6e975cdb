"""Experts inside a layer: the router of the sublayer `E`, its load-balancing loss, and how experts are drawn.

Dispatcher and experts are Megatron's own MoELayer. A core layer's experts are one set of weights that every loop
walks; its router is one too, or has weights of each loop.

The load-balancing loss of a walk is that of Fedus et al. 2022 (arXiv 2101.03961, equations 4 to 6), of the global
batch (Qiu et al. 2025, arXiv 2501.11873):

    coefficient * E * sum_e f_e P_e

f_e is the share of the choices that fell on expert e and P_e the mean of its scores (a softmax over all experts),
both over all tokens of the global batch. Walks add up, as layers do: each dispatches its own tokens, so each has to
be even.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from cherry_megatron.model.loops import PerLoop
from cherry_megatron.model.seeding import seeded

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class LoopRouter(PerLoop, TopKRouter):
    """Megatron's top-k router, which knows its loop, with a load-balancing loss that no split changes.

    Megatron's own `global_aux_loss` takes the mean load of the micro-batches so far, whatever layer walk they are
    of, and weighs it by the data-parallel size (Megatron-LM issues 3672 and 7213): it is switched off.

    Attributes:
        load: [walks, experts], the choices of the whole step by walk, where a pass before it has counted them; None
            if the step has one micro-batch, which sees all of them by itself.
        share: of the tokens of the global batch that carry a loss. Megatron divides all gradients by these.
        counting: the pass is one that counts, without a gradient.
        seen: [walks, 2 * experts + 2], sums over this rank's tokens of a step: choices, scores, entropy of the
            gates in nats, tokens.

    Args:
        config, pg_collection, is_mtp_layer: as Megatron's.
        loops: of how many loops it has weights.
        walks: how often a step may walk it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        loops: int,
        walks: int,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.weight: torch.nn.Parameter
        self.loops, self.walks = loops, walks
        if loops > 1:
            # [loops, experts, h]; all begin alike, so that an unrolled stack starts as the plain one walked again.
            self.weight = torch.nn.Parameter(self.weight.data.repeat(loops, 1, 1))
            self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._everyone = pg_collection.tp_dp_cp  # type: ignore[union-attr]
        self.share, self.counting = 1.0, False
        self.load: Tensor | None = None
        self.seen: Tensor | None = None

    def gating(self, input: Tensor) -> Tensor:
        """Logits [s, b, experts] of the current loop; input: [s, b, h]."""
        weight = self.weight[self.walk] if self.loops > 1 else self.weight
        return router_gating_linear(input, weight, None, _DTYPES.get(self.config.moe_router_dtype, input.dtype))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gates and choices, both [tokens, experts]; in training with the load-balancing loss attached."""
        gates, chosen = super().routing(logits, padding_mask)
        if self.counting:
            assert self.load is not None
            self.load[self.loop] += chosen.sum(0)
        # A pass whose activations are recomputed has no gradient, its recomputation has one.
        elif self.training and torch.is_grad_enabled():
            scores = logits.view_as(gates).softmax(-1, dtype=torch.float32)
            self._see(gates, chosen, scores)
            if self.config.moe_aux_loss_coeff:
                gates = MoEAuxLossAutoScaler.apply(gates, self._balance(chosen, scores))
        return gates, chosen

    def _balance(self, chosen: Tensor, scores: Tensor) -> Tensor:
        """This rank's part of the loss, times the number of tokens with a loss, by which Megatron divides."""
        if self.load is None:
            load = chosen.sum(0, dtype=torch.float32)
            torch.distributed.all_reduce(load, group=self._everyone)
        else:
            load = self.load[self.loop]
        weight = self.config.moe_aux_loss_coeff * self.share * len(load)
        return weight * (scores @ (load / load.sum())).sum()

    @torch.no_grad()
    def _see(self, gates: Tensor, chosen: Tensor, scores: Tensor) -> None:
        if self.seen is None:
            self.seen = torch.zeros(self.walks, 2 * scores.shape[1] + 2, dtype=torch.float64, device=gates.device)
        shares = gates / gates.sum(-1, keepdim=True)
        further = torch.stack((torch.special.entr(shares).sum(), shares.new_tensor(len(shares))))
        self.seen[self.loop] += torch.cat((chosen.sum(0), scores.sum(0), further))

    def start_counting(self) -> None:
        """From now on passes count the choices."""
        self.counting = True
        self.load = torch.zeros(self.walks, self.config.num_moe_experts, device=self.weight.device)

    def end_counting(self) -> None:
        """Sum them over all ranks that walk the same layers."""
        self.counting = False
        torch.distributed.all_reduce(self.load, group=self._everyone)


def routers_of(model: torch.nn.Module) -> Iterator[tuple[int, LoopRouter]]:
    """The routers on this rank, each with the number of its stored sublayer, from 0."""
    for module in model.modules():
        if isinstance(module, LoopRouter):
            yield module.layer_number - 1, module


def draw_experts(
    experts: Any,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    seed: int,
    name: str,
    numbers: Sequence[int],
) -> None:
    """Initialize a layer's experts on this rank from (seed, layer, expert) alone.

    Args:
        experts: Megatron's SequentialMLP or TEGroupedMLP.
        config: of the model.
        groups: the one of tensor-parallel ranks of experts says which share of each lies here.
        seed: of the model.
        name: of the layer.
        numbers: of the experts here.
    """
    ranks, rank = groups.expt_tp.size(), groups.expt_tp.rank()
    width, parts = config.moe_ffn_hidden_size, 2 if config.gated_linear_unit else 1
    for place, number in enumerate(numbers):
        first, second = torch.empty(parts, width, config.hidden_size), torch.empty(config.hidden_size, width)
        with seeded(seed, f"{name}.experts.{number}"), torch.no_grad():
            config.init_method(first)
            config.output_layer_init_method(second)
            # Gate and up are cut one by one.
            _weight(experts, place, "linear_fc1").copy_(first.chunk(ranks, 1)[rank].flatten(0, 1))
            _weight(experts, place, "linear_fc2").copy_(second.chunk(ranks, 1)[rank])


def _weight(experts: Any, place: int, linear: str) -> Tensor:
    """The weight of one expert, wherever Megatron's two kinds of experts keep it."""
    if hasattr(experts, "local_experts"):
        found: Tensor = getattr(experts.local_experts[place], linear).weight
        return found
    return getattr(getattr(experts, linear), f"weight{place}")
