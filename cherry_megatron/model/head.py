"""The model, with an output layer that can be left out for tokens without a loss."""

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor


class RecurrentModel(HybridModel):
    """A HybridModel whose cross-entropy may be asked of some tokens alone."""

    post_process: bool

    def forward(
        self, *args: Any, labels: Tensor | None = None, rows: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """As HybridModel's.

        Args:
            labels: [b, s].
            rows: [b, s], 0 or 1: tokens whose loss is wanted; by default all.
            Others: as HybridModel's.

        Returns:
            The losses [b, s], 0 where none is wanted; logits without `labels`; [s, b, h] before the last stage.
        """
        if rows is None or not self.post_process:
            return super().forward(*args, labels=labels, **kwargs)
        assert labels is not None
        self.post_process = False  # the hidden states, please
        try:
            hidden = super().forward(*args, **kwargs)
        finally:
            self.post_process = True
        return self._losses(hidden, labels, rows)

    def _losses(self, hidden: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
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
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(some, weight=weight)
        targets = labels.transpose(0, 1).flatten()[padded].unsqueeze(0)  # [1, n]
        found = self.compute_language_model_loss(targets, self._scale_logits(logits)).flatten()
        # Spare rows keep the graph whole where no token is wanted.
        found = found * (torch.arange(len(padded), device=found.device) < len(wanted))
        losses = found.new_zeros(rows.numel()).index_add(0, padded, found)
        return losses.view(rows.shape[1], rows.shape[0]).transpose(0, 1).contiguous()
