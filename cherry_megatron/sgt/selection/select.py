"""One run of `cherry select`: scores of every token, a cut at exactly --rho, marks beside the tokens."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cherry_megatron.data.marks import ANSWERS, Marks, marks_prefix, refuse_existing, write_marks
from cherry_megatron.errors import CherryError
from cherry_megatron.sgt.selection.cut import Cut, Scored, cut
from cherry_megatron.sgt.selection.scratch import SCORES, Scratch, open_scratch
from cherry_megatron.sgt.selection.selectors import Selector
from cherry_megatron.sgt.selection.semantic import WORDS, Semantic, kinds
from cherry_megatron.sgt.selection.tokens import PIECE_TOKENS, Piece, Tokens, open_tokens, pieces, report
from cherry_megatron.sgt.selection.words import KINDS

NAME = re.compile(r"[\w-]+")
FREQUENT = 10
FREQUENT_PIECES = 16  # in which the most frequent words are looked for


@dataclass(frozen=True)
class Word:
    """A word that was selected.

    Attributes:
        document, start, end: where it is first: tokens of a document.
        count: how often it is selected in the first FREQUENT_PIECES pieces.
    """

    document: int
    start: int
    end: int
    count: int


@dataclass
class Selection:
    """What a run has made.

    Attributes:
        marks: as written.
        seconds: of the run.
        scored: tokens that this run scored, not an earlier one that it went on from.
        workers: processes that scored them.
        bytes_a_token: of text, if `cherry data` made the tokens.
        kinds: of `semantic`: eligible and marked tokens of each of KINDS, [kinds, 2].
        words: of `semantic`: the most frequent ones that are marked.
    """

    marks: Marks
    seconds: float
    scored: int
    workers: int
    bytes_a_token: float | None
    kinds: np.ndarray | None = None
    words: list[Word] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Of a worker."""
        return self.scored / self.seconds / self.workers


def check(prefix: Path, name: str, rho: float) -> None:
    """See that a selection can be asked for, before anything is read or imported.

    Raises:
        CherryError: what is wrong with it.
    """
    if not 0 < rho <= 1:
        raise CherryError(f"--rho {rho:g} is no share of the tokens; give a number above 0 up to 1, e.g. 0.15")
    if name == ANSWERS or not NAME.fullmatch(name):
        why = "names the tokens that may be targets" if name == ANSWERS else "must be letters, digits, - and _"
        raise CherryError(f"--name {name} {why}; give the marks another name")
    if name in ("bin", "idx", "json", "parts"):
        raise CherryError(f"--name {name} is what files of the tokens end in; give the marks another name")
    if prefix.suffix in (".bin", ".idx"):
        raise CherryError(f"--data {prefix}: give what its files have in common, {prefix.with_suffix('')}")
    if not Path(f"{marks_prefix(prefix, name)}.parts").exists():
        refuse_existing(marks_prefix(prefix, name))


def select(prefix: Path, selector: Selector, rho: float, name: str, workers: int) -> Selection:
    """Mark round(rho * eligible) tokens of a data set: those with the highest scores.

    Args:
        prefix: of the tokens.
        selector: gives the scores.
        rho: share of the tokens that may be targets: those of PREFIX.answers if there are such marks, else all.
        name: of the marks.
        workers: processes. The marks do not depend on it.

    Returns:
        The selection; its marks are written.

    Raises:
        CherryError: if the data or the request is unusable, nothing would be selected, or a worker died. There
            are no marks then, only what a later run goes on from.
    """
    started = time.perf_counter()
    check(prefix, name, rho)
    tokens, lengths = open_tokens(prefix)
    parts = pieces(lengths)
    eligible = sum(int(tokens.eligible(piece).sum()) for piece in parts)
    count = round(rho * eligible)
    if not count:
        of = "tokens of answers" if tokens.answers else "tokens"
        raise CherryError(f"--rho {rho:g} of {eligible} {of} selects none; give a larger share")
    options = {"asked": rho, **selector.options}
    marks = Marks(name, selector.name, selector.version, tokens.total, eligible, count, tokens.data, "", options)
    made_from = [tokens.data, PIECE_TOKENS, selector.name, selector.version, selector.options]
    with open_scratch(prefix, name, {"made from": made_from}) as scratch:
        scored = selector.score(tokens, parts, scratch, workers)
        line = cut(lambda: _scored(tokens, parts, scratch), count)
        marked = (line.selected(*found).astype(np.uint8) for found in _scored(tokens, parts, scratch))
        marks = write_marks(prefix, marks, lengths, marked)
        made = report(prefix)
        bytes_a_token = made["bytes"] / made["tokens"] if {"bytes", "tokens"} <= made.keys() else None
        selection = Selection(marks, time.perf_counter() - started, scored, workers, bytes_a_token)
        if isinstance(selector, Semantic):
            selection.kinds = _shares(tokens, parts, scratch, line)
            selection.words = _frequent(tokens, parts[:FREQUENT_PIECES], scratch, line)
    return selection


def _scored(tokens: Tokens, parts: list[Piece], scratch: Scratch) -> Iterator[Scored]:
    for piece in parts:
        yield piece.first, scratch.read(piece, SCORES), tokens.eligible(piece)


def _shares(tokens: Tokens, parts: list[Piece], scratch: Scratch, line: Cut) -> np.ndarray:
    """Eligible and marked tokens of each kind of word, [kinds, 2]."""
    found = np.zeros((len(KINDS), 2), np.int64)
    for first, scores, eligible in _scored(tokens, parts, scratch):
        of = kinds(scores)
        for column, chosen in enumerate((eligible, line.selected(first, scores, eligible))):
            found[:, column] += np.bincount(of[chosen], minlength=len(KINDS))
    return found


def _frequent(tokens: Tokens, parts: list[Piece], scratch: Scratch, line: Cut) -> list[Word]:
    """The words that are marked most often."""
    counts: dict[int, int] = {}
    where: dict[int, tuple[Piece, int, int]] = {}
    for piece in parts:
        records = scratch.read(piece, WORDS)
        marked = line.selected(piece.first, scratch.read(piece, SCORES), tokens.eligible(piece))
        chosen = records[marked[records["start"]]]
        found, places, times = np.unique(chosen["key"], return_index=True, return_counts=True)
        for key, place, often in zip(found.tolist(), places.tolist(), times.tolist(), strict=True):
            counts[key] = counts.get(key, 0) + often
            where.setdefault(key, (piece, int(chosen["start"][place]), int(chosen["end"][place])))
    words = []
    for key in sorted(counts, key=lambda key: (-counts[key], key))[:FREQUENT]:
        piece, start, end = where[key]
        ends = np.cumsum(piece.lengths)
        document = int(np.searchsorted(ends, start, side="right"))
        before = int(ends[document] - piece.lengths[document])
        words.append(Word(piece.document + document, start - before, end - before, counts[key]))
    return words
