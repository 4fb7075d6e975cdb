"""The model's head: an output layer that can be left out for tokens without a loss, and multi-token prediction."""

from functools import partial
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.utils import unwrap_model
from torch import Tensor

from cherry_megatron.model.cache import Cache
from cherry_megatron.model.multi_token import Ahead, ahead, likeliest


class RecurrentModel(HybridModel):
    """A HybridModel that gives the cross-entropy of some tokens alone if asked, and that of later tokens apart.

    Attributes:
        ahead: what the last pass with labels found by multi-token prediction; None without.
    """

    post_process: bool
    mtp_process: bool
    ahead: Ahead | None = None

    def forward(
        self,
        *args: Any,
        labels: Tensor | None = None,
        rows: Tensor | None = None,
        agreement: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """As HybridModel's, but that the losses of multi-token prediction are left in `ahead`.

        Args:
            labels: [b, s].
            rows: [b, s], 0 or 1: tokens whose loss is wanted; by default all.
            agreement: see whether multi-token prediction finds what the model does.
            Others: as HybridModel's. With multi-token prediction the last stage needs the tokens, too.

        Returns:
            The losses [b, s], 0 where none is wanted; logits without `labels`; [s, b, h] before the last stage.
        """
        self.ahead = None
        if labels is not None and rows is not None and self.post_process:
            return self._some_losses(self._hidden(*args, **kwargs), labels, rows)
        if labels is not None and self.mtp_process:
            return self._all_losses(self._hidden(*args, **kwargs), labels, agreement)
        predicts_ahead, self.mtp_process = self.mtp_process, False  # of no use for logits
        try:
            return super().forward(*args, labels=labels, **kwargs)
        finally:
            self.mtp_process = predicts_ahead

    def walk_depth(self, depth: int, states: Tensor, tokens: Tensor, cache: Cache) -> Tensor:
        """One depth of multi-token prediction at the positions that a cache has placed, without a gradient.

        Args:
            depth: counted from 1.
            states: [s, b, h], of the depth before at these positions; of the model for depth 1.
            tokens: [b, s], the token `depth` places behind each position.
            cache: keys and values of the depth at earlier positions, which these join.

        Returns:
            Its states, [s, b, h].
        """
        layer: Any = self.mtp.layers[depth - 1]
        attention = layer.mtp_model_layer.layers[0].self_attention.core_attention
        cache.take_angles(self.rotary_pos_emb(cache.max_sequence_length))
        self.config.fused_single_qkv_rope = False  # the cache rotates, as in the model's pass before
        if self.config.sequence_parallel:
            states = scatter_to_sequence_parallel_region(states, group=self.pg_collection.tp)
        attention.lookup = partial(cache.attend, depth, self.config)
        found: Tensor = layer.forward_single_position(states, tokens, None, self.embedding)
        attention.lookup = None  # or it would hold the cache's memory
        if self.config.sequence_parallel:
            found = gather_from_sequence_parallel_region(found, group=self.pg_collection.tp)
        return found

    def last_logits(self, states: Tensor) -> Tensor:
        """What the output layer makes of the last of some states, [s, b, h] to [b, 1, v], in single precision."""
        if self.config.sequence_parallel:
            # Each rank gives one position of as many as there are ranks.
            ranks = self.pg_collection.tp.size()
            last = scatter_to_sequence_parallel_region(states[-ranks:], group=self.pg_collection.tp)
        else:
            last = states[-1:]
        logits: Tensor = gather_from_tensor_model_parallel_region(self._logits(last), group=self.pg_collection.tp)
        return logits[-1:].transpose(0, 1).float()

    def _hidden(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the output layer gets, [s, b, h]; of multi-token prediction [(1 + depths) * s, b, h]."""
        self.post_process = False
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.post_process = True

    def _all_losses(self, hidden: Tensor, labels: Tensor, agreement: bool) -> Tensor:
        """Cross-entropy of the next tokens; that of later ones goes into `ahead`. hidden: as `_hidden` gives it."""
        group, config = self.pg_collection.tp, self.config
        # A teacher compares the first logits that the output layer gives.
        next_token, *later = hidden.chunk(1 + config.mtp_num_layers)
        logits = self._logits(next_token)
        # Before the cross-entropy, which overwrites the logits.
        chosen = likeliest(logits, group) if agreement else None
        losses = self.compute_language_model_loss(labels, logits)
        found, agrees = [], []
        for depth, state in enumerate(later, start=1):
            logits = self._logits(state)
            if chosen is not None:
                agrees.append(likeliest(logits, group) == ahead(chosen, depth))
            found.append(self.compute_language_model_loss(ahead(labels, depth), logits))
        self.ahead = Ahead(
            torch.stack(found), torch.stack(agrees) if agrees else None, config.mtp_loss_scaling_factor
        )
        return losses

    def _some_losses(self, hidden: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Cross-entropy of the wanted tokens; hidden: [s, b, h], or this rank's part of s."""
        if self.config.sequence_parallel:
            # The output layer sums its input's gradient over the ranks; here each keeps its part.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        wanted = rows.transpose(0, 1).flatten().nonzero().flatten()  # in the order of hidden
        # At least one row, and as many as sequence parallelism can share out; what is too much is cut off again.
        ranks = self.pg_collection.tp.size()
        spare = max(-len(wanted) % ranks, ranks if len(wanted) == 0 else 0)
        padded = torch.cat((wanted, wanted.new_zeros(spare)))
        some = hidden.flatten(0, 1)[padded].unsqueeze(1)  # [n, 1, h]
        if self.config.sequence_parallel:
            some = scatter_to_sequence_parallel_region(some, group=self.pg_collection.tp)
        targets = labels.transpose(0, 1).flatten()[padded].unsqueeze(0)  # [1, n]
        found = self.compute_language_model_loss(targets, self._logits(some)).flatten()
        # Spare rows keep the graph whole where no token is wanted.
        found = found * (torch.arange(len(padded), device=found.device) < len(wanted))
        losses = found.new_zeros(rows.numel()).index_add(0, padded, found)
        return losses.view(rows.shape[1], rows.shape[0]).transpose(0, 1).contiguous()

    def _logits(self, hidden: Tensor) -> Tensor:
        """[s, b, h], or this rank's part of s, to [s, b, v/tp]."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        return self._scale_logits(logits)


def ahead_of(model: torch.nn.Module) -> Ahead | None:
    """What the model inside Megatron's wrappers predicted of later tokens in its last pass with labels."""
    found: Ahead | None = getattr(unwrap_model(model), "ahead", None)
    return found
