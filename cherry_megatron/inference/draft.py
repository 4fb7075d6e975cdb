"""Drafts: what a text may go on with, guessed cheaply, so that the model reads several tokens in one pass.

Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) with the draws of this project: a token follows from
the logits, the seed, the prompt and the position, so the model's own choice after each drafted token is known, and
a draft is taken as far as it agrees. The text is the one without drafts, token for token, at any temperature
(drafter-invariant decoding, Daliri et al. 2024, arXiv 2408.07978). Drafts agree often because they are drawn with
the same generators.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cherry_megatron.errors import CherryError
from cherry_megatron.inference.reader import Reads
from cherry_megatron.inference.rows import Chooser, Row

LOOP_TOKENS = 2  # of a draft with fewer loops, if nothing else is asked


@dataclass(frozen=True)
class Drafting:
    """How drafts are made.

    Attributes:
        loops: draft with so many loops of the same model, fewer than it has; None: by multi-token prediction.
        tokens: of a draft; None: 2, or as many as multi-token prediction has depths.
    """

    loops: int | None = None
    tokens: int | None = None

    def check(self, loops: int, depths: int) -> None:
        """See that it goes with a model of so many loops and depths.

        Raises:
            CherryError: if it does not.
        """
        if self.loops is None:
            if not depths:
                raise CherryError(
                    "--draft-mtp: the model has no multi-token prediction (mtp.depths 0); take it out, or draft "
                    "with fewer loops by --draft-loops"
                )
        elif loops == 1:
            raise CherryError("--draft-loops: a model of one loop has none to leave out; take it out")
        elif not 1 <= self.loops < loops:
            raise CherryError(
                f"--draft-loops {self.loops} must be from 1 to {loops - 1}, fewer than the model's {loops}"
            )
        if self.tokens is not None and self.tokens < 1:
            raise CherryError(f"--draft-tokens {self.tokens} must be at least 1")

    def most(self, depths: int) -> int:
        """Tokens of a draft, of a model with so many depths."""
        return self.tokens or (LOOP_TOKENS if self.loops is not None else depths)


def drafting(loops: int | None, ahead: bool, tokens: int | None) -> Drafting | None:
    """What is asked by --draft-loops, --draft-mtp and --draft-tokens.

    Raises:
        CherryError: if the first two are given together, or the last alone.
    """
    if loops is not None and ahead:
        raise CherryError(f"--draft-loops {loops} and --draft-mtp are two ways to draft; take one out")
    if loops is not None or ahead:
        return Drafting(loops, tokens)
    if tokens is not None:
        raise CherryError(f"--draft-tokens {tokens} needs --draft-loops, the loops to draft with, or --draft-mtp")
    return None


class Drafter(Protocol):
    """What drafts; every rank of a replica calls it."""

    def draft(self, rows: Sequence[Row], most: int) -> list[list[int]]:
        """At most so many tokens that may follow each text; as many of each."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some texts alone."""


class NoDrafts:
    """Drafts nothing: one token a pass."""

    def draft(self, rows: Sequence[Row], most: int) -> list[list[int]]:
        return [[] for _ in rows]

    def keep(self, rows: Sequence[int]) -> None:
        pass


class FewerLoops:
    """Drafts with fewer loops. It has a cache of its own: what comes after the core sees another state.

    Args:
        reader: with fewer loops.
        chooser: of the tokens.
        tokens: of a draft.
    """

    def __init__(self, reader: Reads, chooser: Chooser, tokens: int) -> None:
        self._reader, self._chooser, self._tokens = reader, chooser, tokens

    def draft(self, rows: Sequence[Row], most: int) -> list[list[int]]:
        def logits(texts: list[list[int]], _: int) -> Tensor | None:
            return self._reader.logits_after(texts, 1)

        return _one_by_one(logits, self._chooser, rows, min(self._tokens, most))

    def keep(self, rows: Sequence[int]) -> None:
        self._reader.keep(rows)


class Depths:
    """Drafts by multi-token prediction, which goes on from what the model's own passes have left.

    The first pass, before which there is nothing, has no draft.

    Args:
        reader: the model's own.
        chooser: of the tokens.
        tokens: of a draft.
    """

    def __init__(self, reader: Reads, chooser: Chooser, tokens: int) -> None:
        self._reader, self._chooser, self._tokens = reader, chooser, tokens

    def draft(self, rows: Sequence[Row], most: int) -> list[list[int]]:
        if not rows[0].new:
            return [[] for _ in rows]
        return _one_by_one(self._reader.logits_ahead, self._chooser, rows, min(self._tokens, most))

    def keep(self, rows: Sequence[int]) -> None:
        """The reader is told as the model's."""


def _one_by_one(
    logits: Callable[[list[list[int]], int], Tensor | None], chooser: Chooser, rows: Sequence[Row], count: int
) -> list[list[int]]:
    """So many tokens behind each text; `logits`: what may follow texts that end with so many drafted tokens."""
    texts = [list(row.tokens) for row in rows]
    for drafted in range(count):
        found = chooser.after(logits(texts, drafted), 1, rows, texts)
        for text, (token,) in zip(texts, found, strict=True):
            text.append(token)
    return [text[len(row.tokens) :] for text, row in zip(texts, rows, strict=True)]
