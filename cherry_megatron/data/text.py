"""Documents in text files: .txt and .md (one document a file), .jsonl (one a line), also .gz and .zst.

Files are read in chunks of whole lines, so that a process can hand the splitting and parsing of lines
to others and never holds more than a chunk (or a line, where a line is longer) of a file.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from cherry_megatron.errors import CherryError

SUFFIXES = (".txt", ".md", ".jsonl")
COMPRESSED = (".gz", ".zst")
KNOWN = {*SUFFIXES, *(s + c for s in SUFFIXES for c in COMPRESSED)}
# Also where a longer plain-text document is cut, at a line end: very long ones keep one worker busy alone.
CHUNK_BYTES = 1 << 20
BLOCK_BYTES = 1 << 18
# One block of a .zst file may decompress to thousands of times its size, all of it at once: keep it small.
ZSTD_BLOCK_BYTES = 1 << 14
# What `zstd --long=31` needs, the most it can be asked for; by default the library refuses such files.
ZSTD_WINDOW_BYTES = 1 << 31
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Chunk:
    """Some whole lines of a file (the last one may lack its line end)."""

    path: Path
    line: int
    """Number of the first line."""
    raw: bytes
    disk: int
    """How many bytes of the file, as it lies on disk, were read for it."""


def find_files(inputs: Iterable[Path]) -> list[Path]:
    """The text files named, or below the folders named, in a stable order.

    Raises:
        CherryError: if one does not exist, has another suffix, or there are none.
    """
    inputs = list(inputs)
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found.extend(sorted(p for p in path.rglob("*") if _suffix(p) in KNOWN and p.is_file()))
        elif not path.exists():
            raise CherryError(f"input {path} does not exist")
        elif _suffix(path) not in KNOWN:
            raise CherryError(f"input {path}: unknown kind of file; known are {', '.join(sorted(KNOWN))}")
        else:
            found.append(path)
    if not found:
        raise CherryError(f"no {', '.join(SUFFIXES)} files in {', '.join(map(str, inputs)) or 'no inputs'}")
    return found


def other_files(inputs: Iterable[Path]) -> list[Path]:
    """What `find_files` leaves out of the folders named."""
    below = (p for path in inputs if path.is_dir() for p in path.rglob("*"))
    return sorted(p for p in below if _suffix(p) not in KNOWN and p.is_file())


def _suffix(path: Path) -> str:
    parts = [part.lower() for part in path.suffixes]
    return "".join(parts[-2:]) if parts and parts[-1] in COMPRESSED else "".join(parts[-1:])


def read_chunks(path: Path) -> Iterator[Chunk]:
    """A file in chunks. The same file always gives the same chunks.

    Raises:
        CherryError: if it cannot be read or decompressed, or ends too early.
    """
    line = 1
    before = 0
    try:
        with path.open("rb") as raw:
            for piece in _cut(_blocks(path, raw)):
                lines = piece.count(b"\n")
                if line == 1 and before == 0:
                    piece = piece.removeprefix(BYTE_ORDER_MARK)
                after = raw.tell()
                yield Chunk(path, line, piece, after - before)
                line, before = line + lines, after
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise CherryError(f"cannot read {path}: {error}") from None


def _cut(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Pieces of about CHUNK_BYTES that end at line ends, in time linear in the length of a line."""
    pending: list[bytes] = []
    size = 0
    for block in blocks:
        end = block.rfind(b"\n") + 1 if size + len(block) >= CHUNK_BYTES else 0
        if end:
            yield b"".join([*pending, block[:end]])
            pending, size = [], 0
        pending.append(block[end:])
        size += len(block) - end
    if size:
        yield b"".join(pending)


def _blocks(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    match path.suffix.lower():
        case ".zst":
            yield from _zstd_blocks(raw)
        case ".gz":
            yield from iter(partial(gzip.GzipFile(fileobj=raw).read, BLOCK_BYTES), b"")
        case _:
            yield from iter(partial(raw.read, BLOCK_BYTES), b"")


def _zstd_blocks(raw: BinaryIO) -> Iterator[bytes]:
    """Every frame of a file. The library's own stream reader takes a file that was cut off for a whole one."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    frame = None
    while block := raw.read(ZSTD_BLOCK_BYTES):
        while block:
            frame = frame or decompressor.decompressobj()
            if text := frame.decompress(block):
                yield text
            block = b""
            if frame.eof:
                block, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("it ends in the middle of a compressed frame")


def documents(chunk: Chunk, key: str = "text") -> Iterator[tuple[int, str | ValueError]]:
    """The documents of a chunk: the number of the (first) line, and the text or why it is malformed."""
    if is_jsonl(chunk.path):
        yield from lines(chunk, partial(_text_of, key=key))
    else:
        yield chunk.line, _parsed(chunk.raw, partial(str, encoding="utf-8"))


def is_jsonl(path: Path) -> bool:
    """Whether a file holds a document a line."""
    return _suffix(path).startswith(".jsonl")


def lines[T](chunk: Chunk, parse: Callable[[bytes], T]) -> Iterator[tuple[int, T | ValueError]]:
    """What `parse` makes of each line of a chunk, or why the line is malformed, with its number."""
    # Only \n ends a line: splitlines() would also cut at characters that JSON allows in a string.
    for number, line in enumerate(chunk.raw.removesuffix(b"\n").split(b"\n"), start=chunk.line):
        yield number, _parsed(line, parse)


def _parsed[T](record: bytes, parse: Callable[[bytes], T]) -> T | ValueError:
    try:
        return parse(record)
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte {error.start} is {error.object[error.start]:#04x})")
    except ValueError as error:
        return error


def _text_of(line: bytes, key: str) -> str:
    parsed = json_object(line)
    return "" if parsed is None else text_under(parsed, key)


def json_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, None if the line is blank.

    Raises:
        ValueError: why it is malformed.
    """
    text = line.decode("utf-8")
    if not text.strip():
        return None
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # numbers too long, brackets nested too deeply
        raise ValueError(f"not usable JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise ValueError("no JSON object")
    return parsed


def text_under(found: dict[str, Any], key: str) -> str:
    """The text of a JSON object under a key.

    Raises:
        ValueError: if there is none.
    """
    text = found.get(key)
    if not isinstance(text, str):
        raise ValueError(f"no text under the key {key!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair is valid JSON but no text.
        raise ValueError("an unpaired surrogate is no character") from None
    return text
