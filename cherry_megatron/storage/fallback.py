"""A run's checkpoints when the newest is damaged: which are whole, and going back to one of them."""

from pathlib import Path

from cherry_megatron.errors import CherryError
from cherry_megatron.files import sync_folder, write_atomically
from cherry_megatron.storage.checkpoint import Checkpoint
from cherry_megatron.storage.integrity import INTEGRITY, check_small_files
from cherry_megatron.storage.tracker import TRACKER, newest, step_named

BROKEN = "broken-"  # in front of the name of a checkpoint that was put aside


def whole(folder: Path, own: bool) -> Checkpoint:
    """A checkpoint whose files are there and long enough; the long ones' hashes are compared when it is loaded.

    Args:
        folder: it.
        own: whether a run of this project must have saved it.

    Raises:
        CherryError: naming what is damaged.
    """
    if own or (folder / INTEGRITY).is_file():
        check_small_files(folder)
    checkpoint = Checkpoint(folder)
    checkpoint.check(list(checkpoint.tensors))
    checkpoint.arguments()
    return checkpoint


def older(folder: Path) -> list[Path]:
    """The checkpoints beside one that were saved at earlier steps, the newest first."""
    step = step_of(folder)
    found = [path for path in folder.parent.glob("iter_*") if path.is_dir() and -1 < step_of(path) < step]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step at which a checkpoint was saved, by its name; -1 if that has none."""
    number = folder.name.removeprefix("iter_")
    return int(number) if number.isdecimal() and len(number) < 16 else -1


def candidates(saved: Path) -> list[Path]:
    """The checkpoint that the tracker file of a folder names, there or not, and the older ones.

    Raises:
        CherryError: if the tracker file names no step.
    """
    first = step_named(saved) or newest(saved)
    return [first, *older(first)]


def newest_whole(saved: Path) -> Path:
    """The newest checkpoint of a run whose files are there, long enough, and described by what was saved.

    Raises:
        CherryError: what is wrong with the newest, if none is.
    """
    first: CherryError | None = None
    named, *_ = found = candidates(saved)
    for folder in found:
        try:
            return whole(folder, own=True).folder
        except CherryError as error:
            first = first or error
    if not named.exists():
        newest(saved)  # which says what there is instead
    raise CherryError(f"{first}; no older checkpoint of the run is whole")


def go_back(damaged: list[Path], good: Path) -> None:
    """Have a folder's tracker name an older checkpoint, and put the damaged newer ones aside.

    Args:
        damaged: folders, there or not.
        good: the older one.
    """
    write_atomically(good.parent / TRACKER, str(step_of(good)))
    for folder in damaged:
        if folder.is_dir():
            folder.rename(_aside(folder))
    sync_folder(good.parent)


def _aside(folder: Path) -> Path:
    """A name that is free."""
    names = (f"{BROKEN}{folder.name}{end}" for end in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(path for path in map(folder.with_name, names) if not path.exists())
