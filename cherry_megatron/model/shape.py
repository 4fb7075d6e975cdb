"""Sizes of a model, and what each part of it weighs and costs.

FLOPs follow the usual accounting of training: 6 for every weight of a matrix product and token
(2 forward, 4 backward), counted as often as the weight is walked; the output layer counts, the
embedding lookup does not; attention scores and their product with the values cost 6*h*s a token
and layer for a sequence of s tokens (causal: half of the square). Recomputation is not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cherry_megatron.errors import CherryError
from cherry_megatron.model.pattern import AHEAD, ATTENTION, MLP, MOE

# Looking up embeddings is no matrix product; with its gradient it costs about this many layers.
EMBEDDING_COST = 0.1


@dataclass(frozen=True)
class Shape:
    """Sizes that fix the parameter count.

    Attributes:
        hidden: width of the residual stream.
        ffn: width of the MLP.
        heads, groups: query heads, and key-value heads.
        head_size: width of a head.
        vocabulary: rows of the embedding, padding included.
        gated: SwiGLU (three matrices) or a plain MLP (two).
        tied: one matrix for embedding and output.
        experts: of a layer `E`.
        top_k: how many of them a token goes to.
        expert_ffn: width of each.
    """

    hidden: int
    ffn: int
    heads: int
    groups: int
    head_size: int
    vocabulary: int
    gated: bool = True
    tied: bool = False
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise CherryError(
                f"num-attention-heads {self.heads} is not a multiple of num-query-groups {self.groups}"
            )

    def linears(self, symbols: str) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers in sublayers such as `*-`; of `E` there are the router's alone."""
        query, key_value = self.heads * self.head_size, self.groups * self.head_size
        each = {
            ATTENTION: [(self.hidden, query + 2 * key_value), (query, self.hidden)],
            MLP: self._gated(self.ffn),
            MOE: [(self.hidden, self.experts)],
        }
        return [sizes for symbol in symbols for sizes in each[symbol]]

    def _gated(self, width: int) -> list[tuple[int, int]]:
        return [(self.hidden, width * (2 if self.gated else 1)), (width, self.hidden)]

    def matmul_weights(self, symbols: str) -> int:
        """Weights of matrix products in sublayers that every token meets: all but those of experts."""
        return sum(inputs * outputs for inputs, outputs in self.linears(symbols))

    def expert_weights(self, symbols: str) -> int:
        """Weights of one expert of each layer `E` among sublayers."""
        one = sum(inputs * outputs for inputs, outputs in self._gated(self.expert_ffn))
        return symbols.count(MOE) * one

    def router_weights(self, symbols: str) -> int:
        """Weights of the routers among sublayers, of one loop; `matmul_weights` has them too."""
        return symbols.count(MOE) * self.hidden * self.experts

    def correction_weights(self, symbols: str, rank: int) -> int:
        """Weights of one loop's low-rank corrections of sublayers (see corrections.py)."""
        return sum(rank * (inputs + outputs) for inputs, outputs in self.linears(symbols))

    def norm_weights(self, symbols: str) -> int:
        """One norm before each sublayer."""
        return self.hidden * len(symbols)

    @property
    def vocabulary_weights(self) -> int:
        """One of the two vocabulary matrices."""
        return self.hidden * self.vocabulary

    def forward_flops(self, symbols: str, sequence: int) -> float:
        """Forward FLOPs a token of sublayers, for causal sequences of `sequence` tokens."""
        width = self.heads * self.head_size
        weights = self.matmul_weights(symbols) + self.top_k * self.expert_weights(symbols)
        return 2 * weights + 2 * width * sequence * symbols.count(ATTENTION)

    @property
    def depth_matmul_weights(self) -> int:
        """Weights of matrix products in a depth of multi-token prediction: its layer, and what joins its inputs."""
        return self.matmul_weights(AHEAD) + 2 * self.hidden**2

    @property
    def depth_norm_weights(self) -> int:
        """Those of its layer, of both inputs and of the output."""
        return self.norm_weights(AHEAD) + 3 * self.hidden

    def depth_flops(self, sequence: int) -> float:
        """Forward FLOPs a token of one depth of multi-token prediction, the output layer included."""
        return self.forward_flops(AHEAD, sequence) + 4 * self.hidden**2 + self.head_flops

    @property
    def head_flops(self) -> float:
        """Forward FLOPs a token of the output layer."""
        return 2 * self.vocabulary_weights


def heads_of(config: Path, megatron: Mapping[str, Any], hidden: int) -> tuple[int, int, int]:
    """Query heads, query groups, and channels of a head.

    Args:
        config: the configuration's file, for messages.
        megatron: its `megatron` section by flags.
        hidden: width of the residual stream, which is shared out where `kv-channels` is not set.

    Raises:
        CherryError: if the configuration does not name the heads, or names what cannot be.
    """

    def positive(key: str) -> int:
        value = megatron.get(key)
        if not isinstance(value, int) or value < 1:
            raise CherryError(f"{config}: set megatron.{key} to a positive number (it is {value})")
        return value

    heads = positive("num-attention-heads")
    groups = positive("num-query-groups") if megatron.get("group-query-attention") else heads
    if heads % groups:
        raise CherryError(f"{config}: megatron.num-query-groups {groups} does not divide the {heads} heads")
    if megatron.get("kv-channels") is not None:
        return heads, groups, positive("kv-channels")
    if hidden % heads:
        raise CherryError(
            f"{config}: megatron.hidden-size {hidden} is not a multiple of num-attention-heads {heads}; use a "
            "number of heads that divides it, or set megatron.kv-channels"
        )
    return heads, groups, hidden // heads
