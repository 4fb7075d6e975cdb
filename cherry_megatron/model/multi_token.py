"""Multi-token prediction: after the next token, which the model itself predicts, the one behind it, and so on.

Depth d sees, at position t, what depth d - 1 made of the tokens up to t + d - 1 (depth 0 is the model) and the
embedding of token t + d, and predicts token t + d + 1 with the model's own output layer (DeepSeek-V3,
arXiv 2412.19437, section 2.2). The layers are Megatron's. The loss is not: Megatron's divides by the tokens of a
micro-batch, so that it depends on the split (its issue 2417); this one is, as in equation 24 there,

    weight / depths * sum_d sum_t w_{t+d} l_{d,t} / number of tokens

with the weights and the mask of the tokens predicted, and the number of tokens of the model's own loss, by which
the gradient of the whole step is divided.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from cherry_megatron.model.loops import RMSNorm
from cherry_megatron.model.seeding import seeded


class Depth(MultiTokenPredictionLayer):
    """Megatron's layer of one depth, with initial weights that depend on the seed and the depth alone.

    Args:
        config, submodules, layer_number, Others: as in MultiTokenPredictionLayer.
        sublayers: specs of its attention and MLP, which have nothing of loops.
        seed: of its initial weights.
        hybrid_submodules: those of the model's stack, in the place of which `sublayers` are taken.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MultiTokenPredictionLayerSubmodules,
        layer_number: int,
        *,
        sublayers: HybridStackSubmodules,
        seed: int,
        hybrid_submodules: HybridStackSubmodules,
        **kwargs: Any,
    ) -> None:
        with seeded(seed, f"mtp.{layer_number - 1}"):
            super().__init__(config, submodules, layer_number, hybrid_submodules=sublayers, **kwargs)


def depths_spec(sublayers: HybridStackSubmodules, linear: type, seed: int) -> ModuleSpec:
    """The spec of all depths.

    Args:
        sublayers: specs of attention and MLP.
        linear: the column-parallel linear layer that joins embedding and state.
        seed: initial weights are drawn from it and the depth.
    """
    parts = MultiTokenPredictionLayerSubmodules(enorm=RMSNorm, hnorm=RMSNorm, layer_norm=RMSNorm, eh_proj=linear)
    depth = ModuleSpec(Depth, params={"sublayers": sublayers, "seed": seed}, submodules=parts)
    block = MultiTokenPredictionBlockSubmodules(layer_specs=[depth])
    return ModuleSpec(MultiTokenPredictionBlock, submodules=block)


@dataclass(frozen=True)
class Ahead:
    """What a forward pass found of the tokens behind the next one.

    Attributes:
        losses: [depths, b, s], cross-entropy of depth d at position t, for the target of position t + d, in nats.
        agrees: [depths, b, s], whether the likeliest token there is the one that the model has at position t + d,
            once it sees the tokens between: what greedy speculative decoding accepts. Where it is asked for. Of a
            mixture the share of its experts, by their gates, each of which is asked about its own.
        weight: of the mean over depths in the loss.
    """

    losses: Tensor
    agrees: Tensor | None
    weight: float

    def total(self, counted: Tensor) -> Tensor:
        """What is added to the sum of the token losses.

        Args:
            counted: [b, s], how much each target counts: its mask, and its weight.
        """
        sums = [torch.sum(loss.float() * ahead(counted, depth)) for depth, loss in enumerate(self.losses, start=1)]
        return self.weight / len(sums) * torch.stack(sums).sum()

    def report(self, mask: Tensor) -> dict[str, Tensor]:
        """Mean loss and acceptance rate of each depth as (sum, number), so that ranks and micro-batches add up.

        Args:
            mask: [b, s], 0 or 1: targets with a loss.
        """
        found = {}
        for name, values in (("loss", self.losses), ("acceptance", self.agrees)):
            for depth, value in enumerate(() if values is None else values, start=1):
                met = ahead(mask.float(), depth)
                found[f"{name}/{depth}"] = torch.stack((torch.sum(value.detach().float() * met), met.sum()))
        return found


def ahead(values: Tensor, depth: int) -> Tensor:
    """At each position what stands `depth` positions later, [b, s]; 0 where a sequence has ended."""
    return F.pad(values[:, depth:], (0, depth))


def likeliest(logits: Tensor, group: ProcessGroup) -> Tensor:
    """The token with the highest logit over a vocabulary that ranks share; of equals the first.

    Args:
        logits: [s, b, v/tp].
        group: tensor-parallel ranks.

    Returns:
        [b, s].
    """
    highest, place = logits.float().max(-1)
    everywhere = highest.clone()
    torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MAX, group=group)
    size = logits.shape[-1]
    token = torch.where(highest == everywhere, place + group.rank() * size, group.size() * size)
    torch.distributed.all_reduce(token, op=torch.distributed.ReduceOp.MIN, group=group)
    return token.transpose(0, 1)
