"""Writing files so that a reader finds the old content or the new, whenever the writer dies; locks."""

import fcntl
import os
from pathlib import Path

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
