"""Writing files so that a reader finds the old content or the new, whenever the writer dies; folders too; locks."""

import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


def make_folder(path: Path) -> None:
    """Make a folder that may be there.

    Raises:
        CherryError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def append_lines(path: Path) -> TextIO:
    """Open a file of lines for more; half a line that a killed process left at its end is closed first."""
    file = path.open("a+", buffering=1, encoding="utf-8")
    if file.tell():
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read(1) != b"\n":
                file.write("\n")
    return file


def add_line(path: Path, value: Any) -> None:
    """Add a JSON value to a file of lines; it is on the disk when this returns."""
    with append_lines(path) as file:
        file.write(json.dumps(value) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[Any]:
    """The JSON value of each line; what a killed process left half written is skipped."""
    with path.open("rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:  # what is no UTF-8 too
                continue


def read_last_lines(path: Path, size: int) -> Iterator[Any]:
    """The same of the lines in the last `size` bytes."""
    with path.open("rb") as file:
        begin = max(file.seek(0, os.SEEK_END) - size, 0)
        file.seek(begin)
        lines = file.read(size).splitlines()
    for line in lines[1:] if begin else lines:
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
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # whoever looks at it has it for a moment, see is_locked
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CherryError(busy) from None
    except OSError as error:
        raise CherryError(f"cannot lock {path}: {error.strerror}; use a file system that locks") from None


def is_locked(path: Path) -> bool | None:
    """Whether a process has locked a file by `lock_or_refuse`; None if that cannot be told."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once; several may look
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False


@contextmanager
def locked_folder(folder: Path, busy: str, gone: str) -> Iterator[int]:
    """A folder, made if need be, for this process alone.

    Args:
        folder: its path.
        busy: what to say if another process has it.
        gone: what to say if the process that had it until now has renamed or removed it.

    Returns:
        The open folder.

    Raises:
        CherryError: `busy`, `gone`, or that it cannot be made or locked.
    """
    make_folder(folder)
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        lock_or_refuse(handle, busy, folder)
        if not _is_at(handle, folder):
            raise CherryError(gone)
        yield handle
    finally:
        os.close(handle)


def cannot_write(path: Path, error: OSError) -> CherryError:
    """An OSError while writing, as one sentence."""
    if error.errno == errno.ENOSPC:
        return CherryError(f"no space left for {path}; make room and run the same command again")
    if isinstance(error, FileExistsError):
        return CherryError(f"cannot write {path}: there is a file of that name, or of a folder above it")
    return CherryError(f"cannot write {path}: {error.strerror or error}")


@contextmanager
def new_folder(save: Path, needed: int) -> Iterator[Path]:
    """A hidden folder beside `save` that is renamed to it by whoever fills it, and is removed otherwise.

    Args:
        save: the folder to be, which must not exist or be empty.
        needed: bytes that will be written.

    Raises:
        CherryError: if there is something already, another process is at it, or there is no room.
    """
    refuse_taken(save)
    partial = hidden_folder(save)
    busy, gone = f"another run is writing {save}; wait for its end", f"another run has written {save}"
    with locked_folder(partial, busy, gone) as handle:
        if _is_taken(save):
            raise CherryError(gone)
        try:
            for left in partial.iterdir():  # by a run that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            free = shutil.disk_usage(partial).free
            if free < needed:
                raise CherryError(f"no space left for {save}: {needed:,} bytes are needed, {free:,} are free")
            yield partial
        except OSError as error:
            raise cannot_write(partial, error) from None
        finally:
            if _is_at(handle, partial):  # not published
                shutil.rmtree(partial, ignore_errors=True)


def hidden_folder(save: Path) -> Path:
    """Where `new_folder` has what will be `save`."""
    return save.parent / f".{save.name}.partial"


def why_not_writable(folder: Path, tried: bool = False) -> str | None:
    """Why nothing can be written into a folder that may have to be made; None if it can.

    Args:
        folder: the folder.
        tried: by making a folder there, which also sees what modes do not tell; by one process of many at most.
    """
    there = folder.absolute()
    try:
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            return f"{there} is not a folder"
        if not os.access(there, os.W_OK | os.X_OK):
            return f"{there} may not be written"
        if tried:
            tempfile.TemporaryDirectory(prefix=".cherry-", dir=there).cleanup()
    except OSError as error:
        return f"{there} takes no new folder ({error.strerror})"
    return None


def refuse_taken(save: Path) -> None:
    """See that there is nothing where a folder is to be written.

    Raises:
        CherryError: if there is.
    """
    if save.is_symlink():
        raise CherryError(f"{save} is a symbolic link, which no folder replaces; name the folder that it leads to")
    if _is_taken(save):
        raise CherryError(f"{save} exists and is not empty; choose another folder or remove it")
    if save.exists() and save.samefile("."):
        raise CherryError(f"{save} is the folder that you are in; choose one inside it")


def _is_taken(save: Path) -> bool:
    return save.exists() and (not save.is_dir() or any(save.iterdir()))


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False
