"""From scores to exactly so many tokens, without holding more than a piece of them.

All scores are ordered as 32-bit integers. A histogram of their upper halves says in which the last selected one
lies, a second one of that one's lower halves which score it is. Tokens of exactly this score are taken in the
order of a hash of their place, which does not depend on pieces, workers or interruptions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cherry_megatron.sgt.selection.selectors import mixed

Scored = tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]  # first place, scores, which may be selected
HALF = 16
BINS = 1 << HALF
HIGHEST = (1 << 64) - 1


@dataclass(frozen=True)
class Cut:
    """The line between selected tokens and the others.

    Attributes:
        score: of the last selected token, see `ordered`.
        hash: of the tokens of this score, those are selected whose `mixed` place is at most that.
    """

    score: int
    hash: int

    def selected(self, first: int, scores: np.ndarray[Any, Any], eligible: np.ndarray[Any, Any]) -> Any:
        """Which tokens are selected, [tokens] of bool."""
        keys = ordered(scores)
        tied = np.flatnonzero(keys == self.score)
        found = keys > self.score
        found[tied] = mixed(places(first, tied)) <= np.uint64(self.hash)
        return found & eligible


def cut(read: Callable[[], Iterator[Scored]], count: int) -> Cut:
    """The line above which there are exactly `count` tokens.

    Args:
        read: gives all pieces, each time that it is called.
        count: from 1 to the number of tokens that may be selected.
    """
    missing, score = count, 0
    for shift in (HALF, 0):
        bins = np.zeros(BINS, np.int64)
        for _, scores, eligible in read():
            keys = ordered(scores)[eligible]
            if not shift:
                keys = keys[keys >> HALF == score >> HALF] & (BINS - 1)
            bins += np.bincount(keys >> shift, minlength=BINS)
        at, missing = _holds(bins[::-1], missing)
        score |= (BINS - 1 - at) << shift
    tied = int(bins[score & (BINS - 1)])
    return Cut(score, HIGHEST if missing == tied else _last_hash(read, score, missing))


def ordered(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint32 that compare as these float32 do; 0 and -0 are one."""
    bits = (scores.astype(np.float32, copy=False) + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def places(first: int, offsets: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Places in the data set of some tokens of a piece, uint64."""
    return offsets.astype(np.uint64) + np.uint64(first)


def _holds(bins: np.ndarray[Any, Any], count: int) -> tuple[int, int]:
    """The bin that holds the count-th element (from 1), and which of the bin's elements that is."""
    ends = np.cumsum(bins)
    at = int(np.searchsorted(ends, count))
    return at, count - int(ends[at] - bins[at])


def _last_hash(read: Callable[[], Iterator[Scored]], score: int, count: int) -> int:
    """The count-th smallest hash among the tokens of a score. Hashes are evenly spread, so one bin holds few."""

    def hashes() -> Iterator[np.ndarray[Any, Any]]:
        for first, scores, eligible in read():
            yield mixed(places(first, np.flatnonzero((ordered(scores) == score) & eligible)))

    shift = np.uint64(64 - HALF)
    bins = np.zeros(BINS, np.int64)
    for found in hashes():
        bins += np.bincount((found >> shift).astype(np.int64), minlength=BINS)
    at, place = _holds(bins, count)
    few = np.concatenate([found[found >> shift == at] for found in hashes()])
    return int(np.partition(few, place - 1)[place - 1])
