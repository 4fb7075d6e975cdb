"""Whether the files of a checkpoint are those that were saved.

integrity.json has the SHA-256 of every other file beside it. Megatron writes and reads it (--verify-integrity,
which is fixed here), and checkpoint surgery does too.
"""

import hashlib
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cherry_megatron.errors import CherryError

INTEGRITY = "integrity.json"
# What says where tensors lie and in which format: no manifest covers it.
DESCRIPTION = (".metadata", "metadata.json")
_READ = ("*.distcp", "common.pt")  # what Megatron reads if it is there
THREADS = 8  # reading and hashing both let other threads go on


def saved_files(folder: Path) -> dict[str, str]:
    """The names of a checkpoint's files as they were saved, and the SHA-256 of each.

    Raises:
        CherryError: if that is not known, or there are further ones that Megatron would read.
    """
    path = folder / INTEGRITY
    if not path.is_file():
        raise CherryError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files: dict[str, str] = {**content["files"]} if content["algorithm"] == "sha256" else {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        files = {}
    if not {*DESCRIPTION} <= {*files} or any(Path(name).name != name for name in files):
        raise CherryError(f"{path} is damaged")
    there = {found.name for pattern in _READ for found in folder.glob(pattern)}
    if foreign := sorted(there - {*files}):
        raise CherryError(f"{folder / foreign[0]} is none of the files that {path.name} names")
    return files


def damage(folder: Path, names: Collection[str] | None = None) -> str | None:
    """The first file of a checkpoint that is not what was saved, and how it is seen; None if all are.

    Args:
        folder: the checkpoint.
        names: look at these files alone.
    """
    try:
        files = saved_files(folder)
    except CherryError as error:
        return str(error)
    looked_at = [name for name in files if names is None or name in names]
    with ThreadPoolExecutor(THREADS) as threads:
        found = threads.map(lambda name: _damage(folder / name, files[name]), looked_at)
        return next((why for why in found if why is not None), None)


def _damage(path: Path, expected: str) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    try:
        same = hash_file(path) == expected
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if same else f"{path} is not what was saved: {INTEGRITY} has another SHA-256 for it"


def check_description(folder: Path, required: bool = False) -> None:
    """What says where a checkpoint's tensors lie is what was saved.

    Args:
        folder: the checkpoint.
        required: whether there must be hashes of it; other trainings need not have written some.

    Raises:
        CherryError: naming the file that is damaged.
    """
    if (required or (folder / INTEGRITY).is_file()) and (why := damage(folder, DESCRIPTION)):
        raise CherryError(f"{why}; restore the checkpoint")


def check_small_files(folder: Path) -> None:
    """Everything of a checkpoint but its tensors is what was saved.

    Raises:
        CherryError: naming the file that is damaged.
    """
    try:
        small = [name for name in saved_files(folder) if not name.endswith(".distcp")]
    except CherryError as error:
        raise CherryError(f"{error}; restore the checkpoint") from None
    if why := damage(folder, small):
        raise CherryError(f"{why}; restore the checkpoint")


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
