"""The checkpoint that a run loads is what was saved: damage in one sentence, and the way out or the fall-back."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException

from cherry_megatron.config import Config
from cherry_megatron.errors import CherryError
from cherry_megatron.platform.loading import before_each_load
from cherry_megatron.ranks import as_first_rank
from cherry_megatron.runs import own_checkpoints
from cherry_megatron.storage.fallback import candidates, go_back, step_of
from cherry_megatron.storage.integrity import damage, saved_files
from cherry_megatron.storage.tracker import newest, way_back


class Loading:
    """Has every file of a checkpoint verified before Megatron reads it, and turns what it raises into one sentence.

    Args:
        config: of the run.
        args: Megatron's arguments.
        say: prints a line.
        keep_alarm: see `Progress.keep_alarm`.
    """

    # torch's derives from BaseException.
    _RAISED = (CheckpointingException, CheckpointException, OSError, EOFError, BadZipFile, UnpicklingError)

    def __init__(
        self, config: Config, args: Any, say: Callable[[str], None], keep_alarm: Callable[[str, str, int], None]
    ) -> None:
        self._load: Path | None = args.load and Path(args.load)
        self._own = not args.skip_train and own_checkpoints(config) is not None
        self._falls_back, self._args = self._own and config.checkpoints.fall_back, args
        self._say, self._keep_alarm = say, keep_alarm
        self._verified: Path | None = None

    def done(self) -> None:
        """The checkpoint has been loaded, or there was none.

        Raises:
            CherryError: if it is not what was verified: where Megatron finds none it starts from new weights.
        """
        if self._own and (self._verified is None or self._args.iteration != step_of(self._verified)):
            raise CherryError(
                f"{self._load}: what was loaded is of step {self._args.iteration}, not {self._verified}, which was "
                "verified; see that nothing else writes there, and start again"
            )
        self._load = None

    def __enter__(self) -> None:
        before_each_load(self._verify)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._load is None or not isinstance(error, self._RAISED):
            return
        traceback.print_exception(error, file=sys.stdout)  # into the log
        folder = newest(self._load)
        says = _first_sentence(error, folder)
        raise CherryError(
            f"cannot load {folder}: {says}; if it is damaged, restore it{way_back(folder)}"
        ) from error

    def _verify(self) -> None:
        """See, on all ranks, that the newest checkpoint is what was saved, or go back to one that is.

        Raises:
            CherryError: if it is not, and the run does not fall back or has no older one that is.
        """
        if self._load is None:
            return
        find, load = candidates if self._falls_back else lambda saved: [newest(saved)], self._load
        damaged: list[tuple[Path, str]] = []
        for folder in as_first_rank(lambda: find(load)):
            why = _damage_by_ranks(folder)
            if why is None:
                break
            damaged.append((folder, why))
        else:
            folder, why = damaged[0]
            rest = "; no older checkpoint of the run is whole" if self._falls_back else ""
            raise CherryError(f"{why}; restore the checkpoint{rest or way_back(folder)}")
        self._verified = folder
        if damaged:
            for text in as_first_rank(lambda: _put_aside(damaged, folder)):
                if torch.distributed.get_rank() == 0:
                    self._say(f"WARNING: {text}")
                self._keep_alarm("fallback", text, step_of(folder))
        torch.distributed.barrier()


def _put_aside(damaged: list[tuple[Path, str]], good: Path) -> list[str]:
    """Go back to an older checkpoint; what became of each newer one, of which it is known why it does not count."""
    told = [
        f"{old.name} is damaged ({why}) and put aside" if old.is_dir() else f"{old} is missing"
        for old, why in damaged
    ]
    go_back([old for old, _ in damaged], good)
    return [f"{text}; the run falls back to step {step_of(good)}" for text in told]


def _damage_by_ranks(folder: Path) -> str | None:
    """`damage`, with the files shared out over the ranks, the same answer on all."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        found = damage(folder, sorted(saved_files(folder))[rank::world])
    except CherryError as error:
        found = str(error)
    answers: list[str | None] = [None] * world
    torch.distributed.all_gather_object(answers, found)
    return next((answer for answer in answers if answer is not None), None)


def _first_sentence(error: BaseException, folder: Path) -> str:
    """What an error says, without the folder; a list that its first line announces is part of it."""
    if isinstance(error, CheckpointException) and error.failures:  # of ranks, each with its own error
        error = next(iter(error.failures.values()))[0]
    if "weights_only" in str(error):  # torch advises to load such a file all the same
        return "it holds objects that no checkpoint needs, which are not made"
    lines = [line.strip() for line in str(error).replace(f" in {folder}", "").splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    first, *rest = lines
    return (f"{first} {', '.join(rest)}" if first.endswith(":") else first)[:300]
