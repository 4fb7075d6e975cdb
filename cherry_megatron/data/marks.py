"""Marks of tokens: a 0 or 1 for every token of an indexed data set, in files beside it.

    PREFIX.NAME.bin, .idx    Megatron's indexed data set again: the same documents, a byte a token
    PREFIX.NAME.json         who set the marks, how many, and which tokens they belong to

`answers` marks the tokens of a conversation that are learned from; any other name is a selection, see sgt/.
"""

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cherry_megatron.errors import CherryError
from cherry_megatron.files import cannot_write, sync_folder

ANSWERS = "answers"
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 1 << 16
INDEXED_DATASET = "megatron.core.datasets.indexed_dataset"  # takes seconds to import


@dataclass(frozen=True)
class Marks:
    """What PREFIX.NAME.json holds.

    Attributes:
        name: NAME of the files.
        selector: what set the marks, e.g. semantic.
        version: of the selector; another one may mark other tokens.
        tokens: of the data set.
        eligible: tokens that could be marked.
        marked: tokens that are.
        data: `fingerprint` of the tokens.
        hash: SHA-256 of PREFIX.NAME.bin.
        options: of the selector.
    """

    name: str
    selector: str
    version: str
    tokens: int
    eligible: int
    marked: int
    data: str
    hash: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def rho(self) -> float:
        """The marked share of the eligible tokens."""
        return self.marked / self.eligible


def marks_prefix(prefix: Path, name: str) -> Path:
    """The path prefix of the files of these marks."""
    return Path(f"{prefix}.{name}")


def fingerprint(prefix: Path) -> str:
    """A hash of an indexed data set: its index, its size, and blocks spread evenly over the tokens.

    Raises:
        CherryError: if it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with Path(f"{prefix}.idx").open("rb") as index:
            while block := index.read(1 << 20):
                digest.update(block)
        with Path(f"{prefix}.bin").open("rb") as tokens:
            size = os.fstat(tokens.fileno()).st_size
            digest.update(str(size).encode())
            for place in sorted({size * i // SAMPLED_BLOCKS for i in range(SAMPLED_BLOCKS)}):
                tokens.seek(place)
                digest.update(tokens.read(BLOCK_BYTES))
    except OSError as error:
        raise CherryError(f"cannot read the tokens {prefix}: {error.strerror} ({error.filename})") from None
    return digest.hexdigest()


def has_answers(prefix: Path) -> bool:
    """Whether the tokens are conversations, of which the answers alone are learned from."""
    with suppress(OSError, ValueError, AttributeError):  # a data set may be without a report of ours
        if json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8")).get("answers"):
            return True  # also where the marks have been lost, so that they are missed
    return Path(f"{marks_prefix(prefix, ANSWERS)}.json").exists()


def read_marks(prefix: Path, name: str) -> Marks:
    """The description of marks, seen to belong to the tokens beside them.

    Raises:
        CherryError: if there are none, they are not whole, or they belong to other tokens.
    """
    target = marks_prefix(prefix, name)
    path = Path(f"{target}.json")
    made_by = "data --sft" if name == ANSWERS else "select"
    try:
        Path(f"{target}.idx").stat()
        size = Path(f"{target}.bin").stat().st_size
        marks = Marks(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CherryError(
            f"there are no marks {target}.bin, .idx and .json; make them with cherry {made_by}"
        ) from None
    except OSError as error:
        raise CherryError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise CherryError(f"{path} does not describe marks; make them again with cherry {made_by}") from None
    if size != marks.tokens:
        raise CherryError(
            f"{target}.bin has {size} bytes, not {marks.tokens}: copy it again or make the marks again"
        )
    if marks.data != fingerprint(prefix):
        raise CherryError(f"{path} belongs to other tokens than {prefix}.bin; make the marks again")
    return marks


def verify_marks(prefix: Path, name: str) -> None:
    """Read all marks and see that they are what was written.

    Raises:
        CherryError: if they are not.
    """
    path = Path(f"{marks_prefix(prefix, name)}.bin")
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CherryError(f"cannot read {path}: {error.strerror}") from None
    if found != read_marks(prefix, name).hash:
        raise CherryError(f"{path} is damaged (its SHA-256 is not the recorded one); copy it again")


def write_marks(
    prefix: Path, marks: Marks, lengths: np.ndarray[Any, Any], parts: Iterable[np.ndarray[Any, Any]]
) -> Marks:
    """Write the three files, whole or not at all; the index comes last, and without it there are no marks.

    Args:
        prefix: of the tokens.
        marks: without `hash`.
        lengths: tokens of each document, int32.
        parts: the marks in the order of the tokens, uint8 of 0 and 1.

    Returns:
        The marks with their hash.

    Raises:
        CherryError: if they exist, cannot be written, or `parts` has another number of tokens or marks than said.
    """
    target = marks_prefix(prefix, marks.name)
    refuse_existing(target)
    folder = Path(f"{target}.new")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        digest, tokens, marked = hashlib.sha256(), 0, 0
        with (folder / "marks.bin").open("wb") as file:
            for part in parts:
                content = part.astype(np.uint8, copy=False).tobytes()
                digest.update(content)
                file.write(content)
                tokens, marked = tokens + len(part), marked + int(part.sum())
            file.flush()
            os.fsync(file.fileno())
        if (tokens, marked) != (marks.tokens, marks.marked):
            raise CherryError(
                f"{target}: {marked} of {tokens} tokens were marked instead of {marks.marked} of {marks.tokens}"
            )
        written = Marks(**{**asdict(marks), "hash": digest.hexdigest()})
        write_index(folder / "marks.idx", lengths, np.dtype(np.uint8))
        _write_synced(folder / "marks.json", lambda path: path.write_text(json.dumps(asdict(written), indent=1)))
        for suffix in (".bin", ".json", ".idx"):
            (folder / f"marks{suffix}").replace(f"{target}{suffix}")
        sync_folder(target.parent)
    except OSError as error:
        raise cannot_write(target, error) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return written


def refuse_existing(target: Path) -> None:
    """See that there are no marks under a path prefix.

    Raises:
        CherryError: if there are.
    """
    if Path(f"{target}.idx").exists():
        raise CherryError(f"{target}.idx exists; remove it or give the marks another name")


def write_index(path: Path, lengths: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> None:
    """Write Megatron's index of a data set whose tokens are written already.

    Args:
        path: of the .idx file.
        lengths: tokens of each document, int32.
        dtype: of the tokens.
    """
    builder = importlib.import_module(INDEXED_DATASET).IndexedDatasetBuilder(os.devnull, dtype=dtype.type)
    builder.sequence_lengths = lengths
    builder.document_indices = np.arange(len(lengths) + 1)
    _write_synced(path, lambda path: builder.finalize(str(path)))


def _write_synced(path: Path, write: Callable[[Path], Any]) -> None:
    write(path)
    with path.open("ab") as file:
        os.fsync(file.fileno())
