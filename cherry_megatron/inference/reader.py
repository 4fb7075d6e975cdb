"""Texts through the model under its parallel layout, each token once."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.training import get_args
from torch import Tensor

from cherry_megatron.model.cache import Cache

FP8_MULTIPLE = 32  # of the tokens of a pass: 16 is enough for all recipes but MXFP8


class Reads(Protocol):
    """What reads growing texts, see Reader."""

    def logits_after(self, texts: Sequence[Sequence[int]], count: int) -> Tensor | None: ...

    def keep(self, rows: Sequence[int]) -> None: ...


class Reader:
    """Reads growing texts; what it has read of them is kept, and not walked again.

    Args:
        model: chunks of this rank.
        rows: texts.
        longest: tokens that one of them can have at most.
        loops: how often the core is walked.
    """

    def __init__(self, model: list[torch.nn.Module], rows: int, longest: int, loops: int) -> None:
        self._model, self._cache = model, Cache(rows, longest, loops)

    def logits_after(self, texts: Sequence[Sequence[int]], count: int) -> Tensor | None:
        """What may follow each of the last tokens. Every rank of the replica calls it, with the same values.

        Args:
            texts: all rows; but for its last `count` tokens, each begins as far as it was read with what was read.
            count: so many tokens of each are to be followed.

        Returns:
            Logits [n, count, v] on the last pipeline stage.
        """
        held = self._cache.held
        held[:] = [min(known, len(text) - count) for known, text in zip(held, texts, strict=True)]
        left = max(len(text) - known for known, text in zip(held, texts, strict=True))
        # A pass holds no more tokens than a micro-batch of training, whose activations fit.
        args = get_args()
        piece = max(args.micro_batch_size * args.seq_length // len(texts), count)
        logits = None
        while left > 0:
            width = (left - 1) % piece + 1
            parts = [
                text[max(len(text) - left, known) : max(len(text) - left + width, known)]
                for known, text in zip(self._cache.held, texts, strict=True)
            ]
            logits = self._pass(parts, width, count)
            left -= width
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some texts alone."""
        self._cache.keep(rows)

    def _pass(self, parts: list[Sequence[int]], width: int, count: int) -> Tensor | None:
        """Read a part of each text, which stands in the last columns; the logits of the last `count` columns."""
        width = self._filled(width, len(parts))
        filled = torch.zeros(len(parts), width, dtype=torch.long)
        for row, part in zip(filled, parts, strict=True):
            row[width - len(part) :] = torch.tensor(part, dtype=torch.long)
        self._cache.place([len(part) for part in parts], width)
        found = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, self._cache, count),
            data_iterator=iter([filled.to(torch.cuda.current_device())]),
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

    def _filled(self, width: int, rows: int) -> int:
        """Columns that sequence parallelism can cut and FP8 can multiply."""
        args = get_args()
        ranks = args.tensor_model_parallel_size if args.sequence_parallel else 1
        fp8 = FP8_MULTIPLE // math.gcd(FP8_MULTIPLE, rows) if args.fp8 else 1
        multiple = math.lcm(ranks, fp8)
        return -(-width // multiple) * multiple


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
