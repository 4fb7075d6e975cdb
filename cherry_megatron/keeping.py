"""The checkpoints that a run writes: room for them, what is recorded with them, and which stay."""

import errno
import hashlib
import shutil
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import CheckpointException

from cherry_megatron.checkpoints import tokenizer_of_run
from cherry_megatron.config import Config
from cherry_megatron.data.paths import data_prefixes
from cherry_megatron.errors import CherryError
from cherry_megatron.files import cannot_write, hidden_folder, make_folder, sync_folder
from cherry_megatron.monitor.accounting import account, together
from cherry_megatron.platform.saving import Saves, named
from cherry_megatron.ranks import as_first_rank
from cherry_megatron.runs import checkpoint_to_load, own_checkpoints, record_saved_step
from cherry_megatron.storage.ancestry import parents_of, record_saved
from cherry_megatron.storage.checkpoint import open_checkpoint
from cherry_megatron.storage.fallback import older, step_of
from cherry_megatron.storage.integrity import damage
from cherry_megatron.storage.lineage import Manifest
from cherry_megatron.storage.tracker import saved_folder, step_named

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def why_no_room(config: Config) -> str | None:
    """Why the disk of a run does not take another checkpoint; None if it does.

    One is taken to be as large as the run's newest, or before there is one as its weights and optimizer state.
    """
    saved = config.run.absolute() / "checkpoints"
    there = next(folder for folder in (saved, *saved.parents) if folder.exists())
    needed, free = _size(config, saved), shutil.disk_usage(there).free
    if free >= needed:
        return None
    return (
        f"no space left for a checkpoint in {saved}: about {needed:,} bytes are needed, {free:,} are free; make "
        "room, or choose another run's folder"
    )


def _size(config: Config, saved: Path) -> int:
    """Bytes of the next checkpoint, about."""
    found = saved_folder(saved)
    steps = [] if found is None else sorted(found.glob("iter_*"), key=step_of)
    if steps:
        return sum(path.stat().st_size for path in steps[-1].iterdir() if path.is_file())
    stored = together(account(config.recurrence, config.shape, 1, config.moee, config.mtp.depths)).stored
    weights = 2 if config.value("bf16") or config.value("fp16") else 4
    # Adam keeps a copy and two moments of each weight in FP32.
    return stored * (weights + (0 if config.value("no-save-optim") else 12))


class Keeping:
    """Sees a training's checkpoints written; its `saves` are for platform/saving.py.

    Args:
        config: of the run.
        args: Megatron's arguments.
        say: prints a line.
    """

    def __init__(self, config: Config, args: Any, say: Callable[[str], None]) -> None:
        self._config, self._say, self._rank = config, say, args.rank
        self._saved = Path(args.save)
        own, loaded = own_checkpoints(config) is not None, checkpoint_to_load(config, training=True)
        self._parents = _parents(config, loaded, own) if args.rank == 0 else []
        data = [{"path": prefix, "report": _hash(Path(f"{prefix}.json"))} for _, prefix in data_prefixes(config)]
        self._details = {"config": config.as_dict(), "config_hash": config.hash(), "data": data}
        self._details |= tokenizer_of_run(config)
        self._removing: threading.Thread | None = None

    @property
    def saves(self) -> Saves:
        return Saves(self._begins, self._written, self._counts)

    def __enter__(self) -> "Keeping":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._removing is not None:
            self._removing.join()
        why = None if error is None else self._why_not_saved(error)
        if why is None:
            return
        traceback.print_exception(error, file=sys.stdout)  # into the log
        if self._rank == 0:
            self._remove_leftovers()
        raise CherryError(why) from error

    def _why_not_saved(self, error: BaseException) -> str | None:
        """A sentence for an error that a disk made."""
        if isinstance(error, CheckpointException):
            found = [str(failure).removeprefix("Worker failure: ") for failure, _ in error.failures.values()]
            return found[0] if found else f"a rank could not write its part of the checkpoint in {self._saved}"
        ours = isinstance(error, OSError) and str(self._config.run) in str(error.filename)
        if isinstance(error, OSError) and (ours or error.errno in _NO_ROOM):
            return str(cannot_write(Path(str(error.filename)) if ours else self._config.run, error))
        return None

    def _begins(self, iteration: int) -> bool:
        """See, on all ranks, that there is room, and that there is something new to save."""
        return as_first_rank(lambda: self._look(iteration))

    def _look(self, iteration: int) -> bool:
        """Whether the step is not the newest checkpoint already.

        Raises:
            CherryError: why it cannot be saved.
        """
        found = saved_folder(self._saved)
        if found is not None and step_named(found) == self._folder(iteration) and self._folder(iteration).is_dir():
            return False
        self._remove_leftovers()
        make_folder(hidden_folder(self._folder(iteration)))
        if why := why_no_room(self._config):
            self._remove_leftovers()
            raise CherryError(why)
        return True

    def _folder(self, iteration: int) -> Path:
        return self._saved / f"iter_{iteration:07d}"

    def _remove_leftovers(self) -> None:
        """What a save or a removal has left that did not come to its end."""
        if self._removing is not None:
            self._removing.join()
        for left in self._saved.glob(".iter_*"):
            shutil.rmtree(left, ignore_errors=True)

    def _written(self, folder: Path, manifest: Manifest) -> None:
        iteration = step_of(named(folder))
        record_saved(folder, "pretrain", manifest, self._parents, iteration=iteration, **self._details)

    def _counts(self, folder: Path) -> None:
        self._say(f"step {step_of(folder):>7}  checkpoint written to {folder}")
        record_saved_step(self._config.run, step_of(folder))
        options = self._config.checkpoints
        if not options.keep:
            return
        surplus = [old for old in older(folder)[options.keep - 1 :] if not _stays(old, options.keep_every)]
        if surplus:
            self._removing = threading.Thread(target=self._remove, args=(folder, surplus))
            self._removing.start()

    def _remove(self, newest: Path, surplus: list[Path]) -> None:
        """Remove older checkpoints, once the newest one is verified."""
        if why := damage(newest):
            self._say(f"WARNING: no older checkpoint is removed: {why}")
            return
        try:
            for folder in surplus:
                # A name that does not count first, because a removal takes its time.
                folder.rename(hidden := hidden_folder(folder))
                sync_folder(folder.parent)
                shutil.rmtree(hidden, ignore_errors=True)
        except OSError as error:
            self._say(f"WARNING: cannot remove {error.filename}: {error.strerror}")


def _stays(folder: Path, every: int) -> bool:
    return bool(every) and step_of(folder) % every == 0


def _parents(config: Config, loaded: Path | None, own: bool) -> list[dict[str, Any]]:
    """Records of what a training starts from and learns from; both may be gone when it saves."""
    parents = parents_of(loaded, own)
    if config.distillation is not None:
        teacher = open_checkpoint(Path(config.distillation.load)).folder
        known = {parent["identity"] for parent in parents if parent.get("role") == "teacher"}
        found = [{**found, "role": "teacher"} for found in parents_of(teacher, False)]
        parents += [each for each in found if each["identity"] not in known]
    return parents


def _hash(path: Path) -> str | None:
    """SHA-256 of the report of `cherry data`, which names text and tokenizer; None if it is gone."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
