"""The selector `semantic`: triggers, numbers, names, then content words, each from rare to frequent.

A first pass analyses every piece once and keeps its words (WORDS) and how often each of them occurs (COUNTS); the
second one makes scores of them, once the counts of the whole data set are known.
"""

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cherry_megatron.data.tokenizer import end_of_document
from cherry_megatron.errors import CherryError
from cherry_megatron.sgt.selection.scratch import SCORES, Scratch
from cherry_megatron.sgt.selection.segments import Analyser, versions
from cherry_megatron.sgt.selection.selectors import LAST
from cherry_megatron.sgt.selection.tokens import Piece, Tokens, open_tokenizer, token_bytes
from cherry_megatron.sgt.selection.triggers import Triggers, read_triggers

WORDS, COUNTS = "words", "counts"
RARITY = "rarity.npy"
RECORD = np.dtype([("start", "<u4"), ("end", "<u4"), ("kind", "u1"), ("key", "<u8")])  # tokens of a piece
COUNT = np.dtype([("key", "<u8"), ("count", "<i8")])
RARE = np.dtype([("key", "<u8"), ("rarity", "<f8")])
KEYS_AT_ONCE = 1 << 22


class Semantic:
    """Words by what they are and how rare they are in the data set.

    The score of a word is the number of its kind, from which less than a half is taken by the rank of its count. A
    token has that of the highest of its words; without any it has 0, and the end of a document LAST.

    Args:
        prefix: of the data set.
        tokenizer: folder of its tokenizer.
        triggers: a list of expressions, or None for the shipped ones.

    Raises:
        CherryError: if it is another tokenizer, the list cannot be read, or an analyser is missing.
    """

    name = "semantic"
    version = "1"

    def __init__(self, prefix: Path, tokenizer: Path, triggers: Path | None) -> None:
        self._tokenizer, self._triggers = tokenizer, read_triggers(triggers)
        # For what they refuse, before anything is written.
        token_bytes(open_tokenizer(tokenizer, prefix), tokenizer)
        Analyser(self._triggers)
        self.options: dict[str, Any] = {"triggers": self._triggers.hash, **versions()}

    def score(self, tokens: Tokens, pieces: list[Piece], scratch: Scratch, workers: int) -> int:
        arguments = (tokens, scratch, self._tokenizer)
        done = scratch.share_out(pieces, WORDS, workers, _words_worker, *arguments, self._triggers)
        if not (scratch.folder / RARITY).exists():
            counts = merged(scratch.read(piece, COUNTS) for piece in pieces)
            scratch.write_file(scratch.folder / RARITY, rarities(counts))
        scratch.share_out(pieces, SCORES, workers, _scores_worker, *arguments)
        return done


def kinds(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The kind of word that each score comes from."""
    return np.ceil(np.maximum(scores, 0)).astype(np.int64)


def _words_worker(tokens: Tokens, scratch: Scratch, tokenizer: Path, triggers: Triggers) -> Callable[[Piece], None]:
    """Writes the words and counts of a piece."""
    reader = Reader(token_bytes(open_tokenizer(tokenizer, tokens.prefix), tokenizer), Analyser(triggers))

    def write(piece: Piece) -> None:
        ids = tokens.read(piece.first, piece.tokens)
        at, parts = 0, []
        for document, length in enumerate(piece.lengths.tolist()):
            try:
                parts.append(reader.words(ids[at : at + length].tolist()))
            except ValueError as error:
                raise CherryError(
                    f"document {piece.document + document} of {tokens.prefix} cannot be read ({error}); see "
                    f"whether {tokenizer} is its tokenizer, or leave the document out of the data"
                ) from None
            parts[-1]["start"] += at
            parts[-1]["end"] += at
            at += length
        records = np.concatenate(parts)
        scratch.write(piece, COUNTS, merged([_counted(records["key"])]))
        scratch.write(piece, WORDS, records)  # last: where it is, both are

    return write


class Reader:
    """Finds the words of documents that are given as tokens.

    Args:
        table: the bytes of each token, see `token_bytes`.
        analyser: text -> words.
    """

    def __init__(self, table: list[bytes], analyser: Analyser) -> None:
        self._table, self._analyser = table, analyser

    def words(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """The words of a document: the tokens that share a byte with each, as RECORDs.

        Raises:
            ValueError: if it is no text or cannot be analysed.
        """
        try:
            parts = [self._table[number] for number in ids]
        except IndexError:
            raise ValueError(f"the tokenizer has no token {max(ids)}") from None
        text = b"".join(parts).decode()
        found = self._analyser(text)
        records = np.empty(len(found), RECORD)
        if found:
            starts, ends, records["kind"], keys = (np.array(column) for column in zip(*found, strict=True))
            records["key"] = [_hash(key) for key in keys.tolist()]
            places = byte_places(text)
            token_ends = np.cumsum([len(part) for part in parts])
            records["start"] = np.searchsorted(token_ends, places[starts], side="right")
            records["end"] = np.searchsorted(token_ends, places[ends], side="left") + 1
        return records


def byte_places(text: str) -> np.ndarray[Any, Any]:
    """Where each character begins in the text's UTF-8, and where the last one ends."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate(([0], np.cumsum(sizes)))


@lru_cache(1 << 18)
def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _counted(keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    counts = np.ones(len(keys), COUNT)
    counts["key"] = keys
    return counts


def merged(parts: Iterable[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The sums of counts of equal keys, in the order of the keys.

    Memory is that of the different keys, and of KEYS_AT_ONCE more.
    """
    waiting: list[np.ndarray[Any, Any]] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting[1:])) > KEYS_AT_ONCE:
            waiting = [_sum(waiting)]
    return _sum(waiting)


def _sum(parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    counts = np.concatenate([np.empty(0, COUNT), *parts])
    keys, places = np.unique(counts["key"], return_inverse=True)
    found = np.zeros(len(keys), COUNT)
    found["key"] = keys
    np.add.at(found["count"], places, counts["count"])
    return found


def rarities(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """From 1 for the rarest key to above 1/2 for the most frequent one.

    Keys of the same count follow their hash, so that a cut among them goes between words, not through all of them.

    Args:
        counts: see `merged`.
    """
    found = np.empty(len(counts), RARE)
    found["key"] = counts["key"]
    order = np.argsort(counts["count"], kind="stable")
    found["rarity"][order] = 1 - np.arange(len(counts)) / max(2 * len(counts), 1)
    return found


def _scores_worker(tokens: Tokens, scratch: Scratch, tokenizer: Path) -> Callable[[Piece], None]:
    """Writes the scores of a piece."""
    table = np.load(scratch.folder / RARITY, mmap_mode="r")
    end = end_of_document(open_tokenizer(tokenizer, tokens.prefix), tokenizer)

    def write(piece: Piece) -> None:
        records = scratch.read(piece, WORDS)
        rarity = table["rarity"][np.searchsorted(table["key"], records["key"])]
        scores = np.zeros(piece.tokens, np.float32)
        at, which = spread(records)
        np.maximum.at(scores, at, (records["kind"] - 1 + rarity).astype(np.float32)[which])
        scores[tokens.read(piece.first, piece.tokens) == end] = LAST
        scratch.write(piece, SCORES, scores)

    return write


def spread(records: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Every token of every word, and the number of the word that it is of."""
    sizes = records["end"].astype(np.int64) - records["start"]
    which = np.repeat(np.arange(len(records)), sizes)
    begins = np.cumsum(sizes) - sizes
    return np.arange(len(which)) - begins[which] + records["start"][which], which
