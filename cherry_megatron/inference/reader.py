"""Texts through the model under its parallel layout, each token once."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import unwrap_model
from torch import Tensor

from cherry_megatron.inference.ahead import DepthReader
from cherry_megatron.inference.passes import filled, in_pieces, placed
from cherry_megatron.model.cache import Cache


class Reads(Protocol):
    """What reads growing texts, see Reader."""

    def logits_after(self, texts: Sequence[Sequence[int]], count: int) -> Tensor | None: ...

    def logits_ahead(self, texts: Sequence[Sequence[int]], drafted: int) -> Tensor | None: ...

    def keep(self, rows: Sequence[int]) -> None: ...


class Reader:
    """Reads growing texts; what it has read of them is kept, and not walked again.

    Args:
        model: chunks of this rank.
        rows: texts.
        longest: tokens that one of them can have at most.
        loops: how often the core is walked.
        depths: of multi-token prediction, so many are asked by `logits_ahead`.
    """

    def __init__(self, model: list[torch.nn.Module], rows: int, longest: int, loops: int, depths: int = 0) -> None:
        self._model, self._cache = model, Cache(rows, longest, loops, keeps_states=depths > 0)
        self._ahead: DepthReader | None = None
        if depths and mpu.is_pipeline_last_stage():
            self._ahead = DepthReader(unwrap_model(model[-1]), self._cache, depths)

    def logits_after(self, texts: Sequence[Sequence[int]], count: int) -> Tensor | None:
        """What may follow each of the last tokens. Every rank of the replica calls it, with the same values.

        Args:
            texts: all rows; but for its last `count` tokens, each begins as far as it was read with what was read.
            count: so many tokens of each are to be followed.

        Returns:
            Logits [n, count, v] on the last pipeline stage.
        """
        cache = self._cache
        cache.held = [min(known, len(text) - count) for known, text in zip(cache.held, texts, strict=True)]
        logits = None
        for width, spans in in_pieces(cache.held, [len(text) for text in texts], count):
            parts = [text[span.start : span.stop] for text, span in zip(texts, spans, strict=True)]
            logits = self._pass(parts, width, count)
        return logits

    def logits_ahead(self, texts: Sequence[Sequence[int]], drafted: int) -> Tensor | None:
        """What may follow each text, by multi-token prediction; called after `logits_after`.

        Args:
            texts: all rows; their last `drafted` tokens are drafts, and the one before them is not read yet.
            drafted: counts up from 0 from call to call.

        Returns:
            Logits [n, 1, v] on the last pipeline stage.
        """
        return None if self._ahead is None else self._ahead.logits(texts, drafted)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some texts alone."""
        self._cache.keep(rows)
        if self._ahead is not None:
            self._ahead.keep(rows)

    def _pass(self, parts: list[Sequence[int]], width: int, count: int) -> Tensor | None:
        """Read a part of each text, which stands in the last columns; the logits of the last `count` columns."""
        width = filled(width, len(parts))
        self._cache.place([len(part) for part in parts], width)
        found = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, self._cache, count),
            data_iterator=iter([placed(parts, width)]),
            model=self._model,
            num_microbatches=1,
            seq_length=width,
            micro_batch_size=len(parts),
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not mpu.is_pipeline_last_stage():
            return None
        # Each rank has its part of the vocabulary.
        logits: Tensor = gather_from_tensor_model_parallel_region(found[0])
        return logits


def _forward_step(
    cache: Cache, count: int, batches: Iterator[Tensor], model: torch.nn.Module
) -> tuple[Tensor, Any]:
    tokens = next(batches)
    # The rotary embedding takes the positions from the cache.
    return model(tokens, None, None, inference_context=cache), partial(_last, count)


def _last(count: int, logits: Tensor, non_loss_data: bool) -> Tensor:
    """logits: [b, s, v]; those of the last columns, [b, count, v]."""
    assert non_loss_data
    return logits[:, -count:].float()
