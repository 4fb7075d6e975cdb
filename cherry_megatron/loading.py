"""A damaged checkpoint in one sentence: which file, and the way out."""

import sys
import traceback
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException

from cherry_megatron.errors import CherryError
from cherry_megatron.storage.checkpoint import newest, way_back


class Loading:
    """Turns what is raised for a damaged checkpoint, while Megatron loads one, into one sentence."""

    # torch's derives from BaseException.
    _RAISED = (CheckpointingException, CheckpointException, OSError, EOFError, BadZipFile, UnpicklingError)

    def __init__(self, args: Any) -> None:
        self._load: str | None = args.load

    def done(self) -> None:
        """The checkpoint has been loaded, or there was none."""
        self._load = None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._load is None or not isinstance(error, self._RAISED):
            return
        traceback.print_exception(error, file=sys.stdout)  # into the log
        folder = newest(Path(self._load))
        says = _first_sentence(error, folder)
        raise CherryError(
            f"cannot load {folder}: {says}; if it is damaged, restore it{way_back(folder)}"
        ) from error


def _first_sentence(error: BaseException, folder: Path) -> str:
    """What an error says, without the folder; a list that its first line announces is part of it."""
    lines = [line.strip() for line in str(error).replace(f" in {folder}", "").splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    first, *rest = lines
    return (f"{first} {', '.join(rest)}" if first.endswith(":") else first)[:300]
