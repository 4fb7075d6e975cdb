"""An indexed data set in pieces of whole documents, and the bytes of text that its tokens stand for."""

import importlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.data.marks import ANSWERS, INDEXED_DATASET, fingerprint, has_answers, marks_prefix, read_marks
from cherry_megatron.errors import CherryError

PIECE_TOKENS = 1 << 20  # about 4.5 MB of text
SPECIAL = b"\n"  # what stands for a special token: no word crosses it


@dataclass(frozen=True)
class Piece:
    """Some whole documents of a data set, one after another.

    Attributes:
        number: of the piece.
        document: number of the first document.
        first: place of its first token in the data set.
        lengths: tokens of each document, int32.
    """

    number: int
    document: int
    first: int
    lengths: np.ndarray[Any, Any]

    @property
    def tokens(self) -> int:
        """How many it has."""
        return int(self.lengths.sum())


@dataclass(frozen=True)
class Tokens:
    """The tokens of an indexed data set. A worker process can be given it.

    Attributes:
        prefix: path of the files, without .bin and .idx.
        dtype: of the ids.
        total: how many there are.
        data: `fingerprint` of the data set.
        answers: whether only the tokens that PREFIX.answers marks are targets.
    """

    prefix: Path
    dtype: str
    total: int
    data: str
    answers: bool

    def read(self, first: int, count: int) -> np.ndarray[Any, Any]:
        """So many ids from a place on.

        Raises:
            CherryError: if they cannot be read.
        """
        path = Path(f"{self.prefix}.bin")
        try:
            ids = np.fromfile(path, self.dtype, count, offset=first * np.dtype(self.dtype).itemsize)
        except OSError as error:
            raise CherryError(f"cannot read {path}: {error.strerror}") from None
        if len(ids) != count:
            raise CherryError(f"{path} is shorter than its index says; copy it again or make the data again")
        return ids

    def eligible(self, piece: Piece) -> np.ndarray[Any, Any]:
        """Which tokens of a piece may be targets, [tokens] of bool."""
        if not self.answers:
            return np.ones(piece.tokens, bool)
        path = f"{marks_prefix(self.prefix, ANSWERS)}.bin"
        return np.fromfile(path, np.uint8, piece.tokens, offset=piece.first) > 0


def open_tokens(prefix: Path) -> tuple[Tokens, np.ndarray[Any, Any]]:
    """The data set with the lengths of its documents (int32).

    Raises:
        CherryError: if there is none, it is damaged or empty, or its answer marks belong to other tokens.
    """
    for suffix in (".bin", ".idx"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise CherryError(f"--data {prefix}: {prefix}{suffix} is missing; make it with `cherry data`")
    try:
        index = importlib.import_module(INDEXED_DATASET).IndexedDataset(str(prefix)).index
    except Exception as error:
        raise CherryError(f"{prefix}.idx is no index of tokens ({error}); make the data again") from None
    lengths = np.array(index.sequence_lengths, np.int32)
    total = int(lengths.sum(dtype=np.int64))
    dtype = np.dtype(index.dtype)
    if Path(f"{prefix}.bin").stat().st_size != total * dtype.itemsize:
        raise CherryError(f"{prefix}.bin has another size than {prefix}.idx says; copy it again")
    if not total:
        raise CherryError(f"--data {prefix} holds no tokens")
    answers = has_answers(prefix)
    if answers:
        read_marks(prefix, ANSWERS)
    return Tokens(prefix, dtype.str, total, fingerprint(prefix), answers), lengths


def pieces(lengths: np.ndarray[Any, Any]) -> list[Piece]:
    """The data set in pieces of at least PIECE_TOKENS tokens, but for the last."""
    ends = np.cumsum(lengths, dtype=np.int64)
    borders = [0]
    while borders[-1] < len(lengths):
        before = ends[borders[-1] - 1] if borders[-1] else 0
        borders.append(min(int(np.searchsorted(ends, before + PIECE_TOKENS)) + 1, len(lengths)))
    return [
        Piece(number, start, int(ends[start - 1]) if start else 0, lengths[start:end])
        for number, (start, end) in enumerate(pairwise(borders))
    ]


def report(prefix: Path) -> dict[str, Any]:
    """What `cherry data` has said of the data set; empty if it was made otherwise."""
    try:
        found: dict[str, Any] = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def open_tokenizer(folder: Path, prefix: Path) -> Tokenizer:
    """The tokenizer that a data set was made with.

    Raises:
        CherryError: if it is none, or another.
    """
    known = report(prefix).get("tokenizer")
    tokenizer = tokenizers.load(folder)
    if known is not None and known != tokenizers.fingerprint(folder):
        raise CherryError(f"{prefix} was made with another tokenizer than {folder}; name the one it was made with")
    return tokenizer


def token_bytes(tokenizer: Tokenizer, folder: Path) -> list[bytes]:
    """The bytes of text that each token of a byte-level vocabulary stands for; SPECIAL for special ones.

    Raises:
        CherryError: if the vocabulary is not byte-level.
    """
    alphabet = _alphabet()
    special = tokenizer.get_added_tokens_decoder()
    table = [SPECIAL] * tokenizers.size(tokenizer)
    for token, number in tokenizer.get_vocab().items():
        if number not in special:
            try:
                table[number] = bytes(map(alphabet.__getitem__, token))
            except KeyError:
                raise CherryError(
                    f"the tokenizer {folder} is not byte-level (token {token!r}); make one with `cherry tokenizer`"
                ) from None
    return table


def _alphabet() -> dict[str, int]:
    """Byte-level BPE's letters: printable bytes of Latin-1 are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
