"""Keys and values of tokens that were walked before, one slot for each effective layer and each depth.

Megatron's static inference context keeps a slot for each `layer_number`, which all loops of a core layer share; it
has one offset for all rows of a batch; and with Transformer Engine's layers it leaves the causal mask out where
several tokens follow kept ones, which the check of a draft needs. Hence a cache of our own. Projections and their
tensor parallelism stay Megatron's; only the product of queries, keys and values is done here.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as rotate
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from cherry_megatron.model.pattern import Visit

type Slot = Visit | int  #: an effective layer, or a depth of multi-token prediction, from 1


class Cache:
    """What attention has to know of the texts of a batch, each of its own length.

    Memory: rows x (positions + 1) x effective layers x 2 x key-value heads of this rank x head size, in the type of
    the activations. Each depth that is walked counts as a layer; states take the hidden size once.

    Attributes:
        loops: how often a pass over it walks the core.
        keeps_states: whether what the model makes of each token is kept too, for multi-token prediction.
        held: tokens of each row that are kept; a smaller number forgets the last ones.
        max_sequence_length: positions, by the name under which Megatron's rotary embedding asks for them.

    Args:
        rows: texts.
        positions: tokens of the longest.
        loops, keeps_states: see above.
    """

    def __init__(self, rows: int, positions: int, loops: int, keeps_states: bool = False) -> None:
        self.loops, self.keeps_states, self.held = loops, keeps_states, [0] * rows
        self.max_sequence_length = positions + 1  # the last takes the keys of filling
        self._slots: dict[Slot, tuple[Tensor, Tensor]] = {}  # [b, positions, key-value heads, head size]
        self._states: Tensor | None = None  # [b, positions, h]

    def place(self, counts: Sequence[int], width: int) -> None:
        """Give the tokens of the next pass their positions: of each row the next ones, in its last columns.

        Args:
            counts: tokens of each row that are not filling.
            width: columns of the pass.
        """
        device = torch.cuda.current_device()
        held, new = torch.tensor(self.held, device=device), torch.tensor(counts, device=device)
        column = torch.arange(width, device=device) - (width - new[:, None])
        spare = self.max_sequence_length - 1
        self._positions = torch.where(column >= 0, held[:, None] + column, spare)  # [b, s]
        self.held = [before + count for before, count in zip(self.held, counts, strict=True)]
        self._longest = max(self.held)
        seen = torch.arange(self._longest, device=device) <= self._positions[:, :, None]
        self._mask = seen[:, None]  # [b, 1, s, longest]
        self._rows = torch.arange(len(counts), device=device)[:, None]

    def take_angles(self, table: Tensor) -> None:
        """Look up the rotary angles of the next pass in those of all positions, [positions, 1, 1, d]."""
        self._angles = table[self._positions.T, 0]  # [s, b, 1, d]

    def take_states(self, states: Tensor) -> None:
        """Keep what the model made of the tokens of this pass, [s, b, h]."""
        if self._states is None:
            self._states = states.new_zeros(len(self.held), self.max_sequence_length, states.shape[-1])
        self._states[self._rows, self._positions] = states.transpose(0, 1)

    def states(self) -> Tensor:
        """What was kept at the positions of this pass, [s, b, h]."""
        assert self._states is not None
        return self._states[self._rows, self._positions].transpose(0, 1)

    def attend(self, slot: Slot, config: TransformerConfig, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of new tokens to the kept ones, to those before them and to themselves, which are kept too.

        Args:
            slot: the effective layer, or the depth.
            config: of the model.
            query: [s, b, heads, d], not rotated.
            key, value: [s, b, key-value heads, d], not rotated.

        Returns:
            [s, b, heads * d].
        """
        if slot not in self._slots:
            # Zeros, not whatever memory holds: a masked NaN is still one after the product with its weight 0.
            shape = (len(self.held), self.max_sequence_length, *key.shape[2:])
            self._slots[slot] = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self._slots[slot]
        together = rotate(torch.cat((query, key), 2), self._angles, config.rotary_interleaved)
        query, key = together.split((query.shape[2], key.shape[2]), 2)
        keys[self._rows, self._positions] = key.transpose(0, 1)
        values[self._rows, self._positions] = value.transpose(0, 1)
        mixed = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            keys[:, : self._longest].transpose(1, 2),
            values[:, : self._longest].transpose(1, 2),
            attn_mask=self._mask,
            enable_gqa=True,
        )
        return mixed.permute(2, 0, 1, 3).flatten(2)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some rows alone."""
        self.held = [self.held[row] for row in rows]
        for slot, (keys, values) in self._slots.items():
            self._slots[slot] = keys[list(rows)], values[list(rows)]
        if self._states is not None:
            self._states = self._states[list(rows)]


class _Cached:
    """Attention that can look into a cache, set before each walk of its layer."""

    lookup: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.lookup is not None:
            return self.lookup(query, key, value)
        found: Tensor = super().forward(query, key, value, *args, **kwargs)  # type: ignore[misc]
        return found


@cache
def cached(attention: type) -> type:
    """An attention class of Megatron's that can look into a cache."""
    return type(f"Cached{attention.__name__}", (_Cached, attention), {})
