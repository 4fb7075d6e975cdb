"""Writing files so that a reader finds the old content or the new, whenever the writer dies; locks."""

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from cherry_megatron.errors import CherryError


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def append_lines(path: Path) -> TextIO:
    """Open a file of lines for more; half a line that a killed process left at its end is closed first."""
    file = path.open("a+", buffering=1, encoding="utf-8")
    if file.tell():
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read(1) != b"\n":
                file.write("\n")
    return file


def read_lines(path: Path) -> Iterator[Any]:
    """The JSON value of each line; what a killed process left half written is skipped."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_or_refuse(handle: int, busy: str, path: Path) -> None:
    """Lock a file or folder that is open; the system gives it back when the process ends, however it ends.

    Raises:
        CherryError: `busy` if another process has it, or that it cannot be locked.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CherryError(busy) from None
    except OSError as error:
        raise CherryError(f"cannot lock {path}: {error.strerror}; use a file system that locks") from None
