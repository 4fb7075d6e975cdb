"""Drafts: what a text may go on with, guessed cheaply, so that the model reads several tokens in one pass.

Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) with the draws of this project: a token follows from
the logits, the seed, the prompt and the position, so the model's own choice after each drafted token is known, and
a draft is taken as far as it agrees. The text is the one without drafts, token for token, at any temperature
(drafter-invariant decoding, Daliri et al. 2024, arXiv 2408.07978). Drafts agree often because they are drawn with
the same generators.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cherry_megatron.errors import CherryError
from cherry_megatron.inference.reader import Reads
from cherry_megatron.inference.rows import Chooser, Row


@dataclass(frozen=True)
class Drafting:
    """Drafting with fewer loops of the same model.

    Attributes:
        loops: of a draft; fewer than the model's.
        tokens: of a draft.
    """

    loops: int
    tokens: int = 2

    def check(self, loops: int) -> None:
        """See that it goes with a model of so many loops.

        Raises:
            CherryError: if it does not.
        """
        if loops == 1:
            raise CherryError("--draft-loops: a model of one loop has none to leave out; take it out")
        if not 1 <= self.loops < loops:
            raise CherryError(
                f"--draft-loops {self.loops} must be from 1 to {loops - 1}, fewer than the model's {loops}"
            )
        if self.tokens < 1:
            raise CherryError(f"--draft-tokens {self.tokens} must be at least 1")


def drafting(loops: int | None, tokens: int | None) -> Drafting | None:
    """What is asked by --draft-loops and --draft-tokens.

    Raises:
        CherryError: if the second is given alone.
    """
    if loops is not None:
        return Drafting(loops) if tokens is None else Drafting(loops, tokens)
    if tokens is not None:
        raise CherryError(f"--draft-tokens {tokens} needs --draft-loops, the loops to draft with")
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
        texts = [list(row.tokens) for row in rows]
        for _ in range(min(self._tokens, most)):
            found = self._chooser.after(self._reader.logits_after(texts, 1), 1, rows, texts)
            for text, (token,) in zip(texts, found, strict=True):
                text.append(token)
        return [text[len(row.tokens) :] for text, row in zip(texts, rows, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        self._reader.keep(rows)
