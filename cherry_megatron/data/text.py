"""Documents in text files: .txt and .md (one document a file), .jsonl (one a line), also .gz and .zst."""

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from cherry_megatron.errors import CherryError

SUFFIXES = (".txt", ".md", ".jsonl")
COMPRESSED = (".gz", ".zst")
# A longer plain-text document is cut at line ends: very long ones slow tokenizers down.
LONGEST_DOCUMENT = 1 << 20


@dataclass(frozen=True)
class Line:
    """One raw record: where it is, and its bytes (a JSON object, or a document's text)."""

    path: Path
    number: int
    raw: bytes


def find_files(inputs: Iterable[Path]) -> list[Path]:
    """The text files named, or below the folders named, in a stable order.

    Raises:
        CherryError: if one does not exist, has another suffix, or there are none.
    """
    known = {*SUFFIXES, *(s + c for s in SUFFIXES for c in COMPRESSED)}
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found.extend(sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in known))
        elif not path.exists():
            raise CherryError(f"input {path} does not exist")
        elif _suffix(path) not in known:
            raise CherryError(f"input {path}: unknown kind of file; known are {', '.join(sorted(known))}")
        else:
            found.append(path)
    if not found:
        raise CherryError(f"no {', '.join(SUFFIXES)} files in {', '.join(map(str, inputs)) or 'no inputs'}")
    return found


def _suffix(path: Path) -> str:
    parts = path.suffixes
    return "".join(parts[-2:]) if parts and parts[-1] in COMPRESSED else path.suffix


def read_lines(path: Path) -> Iterator[Line]:
    """The records of a file.

    Raises:
        CherryError: if it cannot be read or decompressed.
    """
    try:
        with _open(path) as file:
            if ".jsonl" in path.suffixes:
                for number, raw in enumerate(file, start=1):
                    yield Line(path, number, raw)
            else:
                yield from _plain_documents(path, file)
    except (OSError, EOFError, zstandard.ZstdError) as error:
        raise CherryError(f"cannot read {path}: {error}") from None


def _plain_documents(path: Path, file: io.BufferedIOBase) -> Iterator[Line]:
    """The whole file, cut after lines where it is very long. Numbers are those of first lines."""
    start, size, lines = 1, 0, []
    number = 0
    for number, line in enumerate(file, start=1):
        lines.append(line)
        size += len(line)
        if size >= LONGEST_DOCUMENT:
            yield Line(path, start, b"".join(lines))
            start, size, lines = number + 1, 0, []
    if lines:
        yield Line(path, start, b"".join(lines))


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True)
        return io.BufferedReader(stream, buffer_size=1 << 20)  # type: ignore[arg-type]
    return path.open("rb")


def document(line: Line, key: str = "text") -> str:
    """The text of a record.

    Raises:
        ValueError: why the record is malformed, without naming where.
    """
    try:
        text = line.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None
    if ".jsonl" not in line.path.suffixes:
        return text
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        raise ValueError(f"no text under the key {key!r}")
    # Half of a surrogate pair is valid JSON but no text.
    if any("\ud800" <= c <= "\udfff" for c in record[key]):
        raise ValueError("an unpaired surrogate is no character")
    return record[key]
