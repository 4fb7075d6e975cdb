"""What a selector is; and the one that needs nothing, `random`."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from cherry_megatron.sgt.selection.scratch import SCORES, Scratch
from cherry_megatron.sgt.selection.tokens import Piece, Tokens

NAMES = ("semantic", "random", "top-loss", "excess-loss", "entropy")
LAST = -np.inf  # of the ends of documents


class Selector(Protocol):
    """Gives every token a score: the higher, the rather it is selected; LAST after all others.

    Attributes:
        name: one of NAMES.
        version: another one may give other scores.
        options: what else the scores follow from, for the marks' description.
    """

    name: str
    version: str
    options: dict[str, Any]

    def score(self, tokens: Tokens, pieces: list[Piece], scratch: Scratch, workers: int) -> int:
        """Write the SCORES of every piece that has none, [tokens] of float32.

        Returns:
            The number of tokens in these pieces.
        """


class Random:
    """Every token alike, ends of documents too.

    Args:
        seed: another one gives other tokens.
    """

    name = "random"
    version = "1"

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.options: dict[str, Any] = {"seed": seed}

    def score(self, tokens: Tokens, pieces: list[Piece], scratch: Scratch, workers: int) -> int:
        return scratch.share_out(pieces, SCORES, workers, _random_worker, self._seed, scratch)


def _random_worker(seed: int, scratch: Scratch) -> Callable[[Piece], None]:
    def write(piece: Piece) -> None:
        drawn = mixed(np.arange(piece.first, piece.first + piece.tokens, dtype=np.uint64), seed + 1)
        scratch.write(piece, SCORES, (drawn >> np.uint64(40)).astype(np.float32))  # as many bits as it holds

    return write


def mixed(places: np.ndarray[Any, Any], seed: int = 0) -> np.ndarray[Any, Any]:
    """A hash of places in the data set, another one for each seed, without two places that have the same.

    The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), which is a bijection of 64 bits.

    Args:
        places: uint64.
        seed: 0 is that of ties, see cut.py.

    Returns:
        uint64.
    """
    if seed:
        places = places + mixed(np.array([seed % (1 << 64)], np.uint64))
    z = (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
