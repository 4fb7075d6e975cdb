"""What the depths of multi-token prediction say may follow growing texts.

A text of n tokens that the model has read but for its last one has states up to position n - 2. Depth d takes at
position t the state that depth d - 1 has there and token t + d, and predicts token t + d + 1, as in training. So at
position n - 2 depth 1 takes the last token and predicts the next one, depth 2 takes that and predicts the one
behind it, and so on. Each depth attends to its own keys and values at the positions before.

Where more is drafted than there are depths, the last one, D, goes on by itself: its state at position t, which
predicts token t + D + 1 as that of depth D - 1 at position t + 1 does, takes the place of the latter there.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from cherry_megatron.inference.passes import filled, in_pieces, placed
from cherry_megatron.model.cache import Cache
from cherry_megatron.model.head import RecurrentModel


class DepthReader:
    """Walks depths over a cache that keeps the model's states.

    What a depth makes of a position is final once it has seen the text's own token there: that of depth d at
    position t needs token t + d. What rests on drafts is walked again, with what the text has become.

    Args:
        model: on the last pipeline stage.
        cache: of the texts that the model reads.
        depths: so many are used.
    """

    def __init__(self, model: RecurrentModel, cache: Cache, depths: int) -> None:
        self._model, self._cache, self._depths = model, cache, depths
        self._final = [0] * len(cache.held)  # positions of each text that no depth has to walk again
        self._spans: list[range] = []  # positions of each text in the last piece
        self._states: Tensor | None = None  # of the last step, [s, b, h]

    def logits(self, texts: Sequence[Sequence[int]], drafted: int) -> Tensor:
        """What may follow each text, [b, 1, v].

        Args:
            texts: their last `drafted` tokens are drafts; what is before them has been read by the model, but for
                its last token.
            drafted: counts up from 0 from call to call.
        """
        depth = min(drafted + 1, self._depths)
        if drafted == 0:
            self._walk_pieces(texts)
        elif drafted < self._depths:
            assert self._states is not None
            self._states = self._walk(depth, self._states, self._spans, texts)
        else:
            self._go_on(texts)
        assert self._states is not None
        return self._model.last_logits(self._states)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some texts alone."""
        self._final = [self._final[row] for row in rows]

    def _walk_pieces(self, texts: Sequence[Sequence[int]]) -> None:
        """All depths over what is not final, but for the last piece, in which depth 1 alone is walked."""
        self._cache.held = list(self._final)
        ends = [len(text) - 1 for text in texts]
        for width, spans in in_pieces(self._final, ends, self._depths):
            self._place(spans, width)
            self._spans, self._states = spans, self._walk(1, self._cache.states(), spans, texts)
            if self._cache.held != ends:
                for depth in range(2, self._depths + 1):
                    self._states = self._walk(depth, self._states, spans, texts)
        # A draft that ends at an earlier depth is followed by no longer one, so deeper ones may stay behind.
        self._final = [max(len(text) - self._depths, 0) for text in texts]

    def _go_on(self, texts: Sequence[Sequence[int]]) -> None:
        """One more position of the last depth, from its own state."""
        assert self._states is not None
        ends = [len(text) - self._depths for text in texts]
        spans = [range(end - 1, end) for end in ends]
        self._cache.held = [span.start for span in spans]
        width = self._place(spans, 1)
        states = F.pad(self._states[-1:], (0, 0, 0, 0, width - 1, 0))
        self._states = self._walk(self._depths, states, spans, texts)

    def _place(self, spans: Sequence[range], width: int) -> int:
        """Give positions to the columns of a pass; returns how many columns there are."""
        width = filled(width, len(spans))
        self._cache.place([len(span) for span in spans], width)
        return width

    def _walk(self, depth: int, states: Tensor, spans: Sequence[range], texts: Sequence[Sequence[int]]) -> Tensor:
        """One depth at the positions that are placed, [s, b, h] of each."""
        parts = [text[span.start + depth : span.stop + depth] for text, span in zip(texts, spans, strict=True)]
        return self._model.walk_depth(depth, states, placed(parts, len(states)), self._cache)
