"""Which checkpoints lie in a folder that a training saved to, and which of them its tracker file names."""

from pathlib import Path

from cherry_megatron.errors import CherryError
from cherry_megatron.storage.integrity import INTEGRITY

TRACKER = "latest_checkpointed_iteration.txt"


def saved_folder(path: Path) -> Path | None:
    """The folder that Megatron saved checkpoints to: this one, or a run's checkpoints/ in it."""
    return next((folder for folder in (path, path / "checkpoints") if (folder / TRACKER).is_file()), None)


def why_none(path: Path) -> str:
    """Why there is no checkpoint in a folder that is not one that Megatron saved to, and what to do."""
    if not path.exists():
        return f"{path} does not exist; correct the path"
    places = (path, path / "checkpoints")
    left = [found for folder in places for found in ended(folder)]
    if left:
        return (
            f"{path} holds {left[-1].name}, but {TRACKER} is missing; write the number of the checkpoint to "
            f"take into {left[-1].parent / TRACKER}"
        )
    if parts := [found for folder in places for found in sorted(folder.glob("iter_*"))]:
        return (
            f"{path} holds {parts[-1].name} without {INTEGRITY}, whose save did not come to its end, and {TRACKER} "
            "is missing; restore them, or remove the folder"
        )
    if (path / "metadata.json").is_file():
        return f"{path}/.metadata is missing; restore the checkpoint"
    return f"{path}: no checkpoint there ({TRACKER} is missing); name the folder that holds it"


def newest(saved: Path) -> Path:
    """The checkpoint that the tracker file of a folder names.

    Raises:
        CherryError: if it names none that is there.
    """
    tracker = saved / TRACKER
    text = tracker.read_text(errors="replace").strip()
    folder = saved / text if text == "release" else step_named(saved)
    if folder is not None and (folder / ".metadata").is_file():
        return folder
    if folder is not None and folder.is_dir():
        raise CherryError(f"{folder}/.metadata is missing; restore the checkpoint{way_back(folder)}")
    complete = sorted(found.parent.name for found in saved.glob("*/.metadata"))
    others = f"there are {', '.join(complete)}: write the number of one into it" if complete else "there is none"
    raise CherryError(f"{tracker} says {text[:20]!r}, which is no checkpoint beside it; {others}")


def step_named(saved: Path) -> Path | None:
    """Where the checkpoint lies whose step the tracker file of a folder has; None if it has none."""
    text = (saved / TRACKER).read_text(errors="replace").strip()
    return saved / f"iter_{int(text):07d}" if text.isdecimal() and len(text) < 16 else None


def step_saved(run: Path) -> int:
    """The step of a run's newest checkpoint that counts, whole or damaged; 0 if it has none.

    Raises:
        CherryError: if its tracker file names no step.
    """
    if (saved := saved_folder(run / "checkpoints")) is None:
        return 0
    folder = step_named(saved) or newest(saved)
    if not folder.name.startswith("iter_"):
        raise CherryError(
            f"{saved / TRACKER} names no step but {folder.name!r}; write the number of a checkpoint into it"
        )
    return int(folder.name.removeprefix("iter_"))


def way_back(folder: Path) -> str:
    """What to do about a damaged checkpoint besides restoring it, as the end of a sentence.

    Args:
        folder: the checkpoint, in a folder that a training saved to.
    """
    before = [found.name for found in ended(folder.parent) if found.name < folder.name]
    return f", or go back to {before[-1]}: write its number into {folder.parent / TRACKER}" if before else ""


def ended(saved: Path) -> list[Path]:
    """The checkpoints of a folder that were saved to their end, in order: hashes of their files come last."""
    return sorted(found.parent for found in saved.glob(f"iter_*/{INTEGRITY}"))
