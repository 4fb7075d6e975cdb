"""Saving: a checkpoint is whole or not there, is hashed by those who write it, and training need not wait for it.

Megatron-core 0.19.2 writes into the checkpoint's folder itself, hashes all files on rank 0 alone, truncates its
tracker file before it writes it, and drops --async-save unless a further process of each rank does the writing. Put
in place of that here:

1. every rank writes its files into a folder with a hidden name, and hashes them and its tensors (shards.py); with
   --async-save in a thread, from copies, while training goes on with the next steps (`_Thread`);
2. when all have, rank 0 gets the hashes with the places of the tensors (`_finish`), lets its caller add to the
   folder, writes integrity.json, flushes, and renames the folder (`_publish`);
3. the tracker file moves last, at once (`_Tracker`).

Whatever dies on the way leaves a hidden folder, and the checkpoint before it is the newest.
"""

import io
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.training import checkpointing, training
from megatron.training.async_utils import maybe_finalize_async_save

from cherry_megatron.files import hidden_folder, sync_folder, write_atomically
from cherry_megatron.platform.shards import Hashed, files_of, write_shards
from cherry_megatron.platform.staging import Staging
from cherry_megatron.storage.integrity import INTEGRITY, hash_file
from cherry_megatron.storage.lineage import Manifest
from cherry_megatron.storage.tracker import TRACKER

_save_checkpoint, _name_of = training.save_checkpoint, checkpointing.get_checkpoint_name
_prepare_writing, _write_metadata = FileSystemWriterAsync.prepare_write_data, FileSystemWriterAsync.finish
_staging = Staging()  # of this process; one save is under way at a time
_maybe_msc, _tell_wandb = checkpointing.maybe_msc, checkpointing.wandb_utils.on_save_checkpoint_success


class Saves(NamedTuple):
    """What is called around each save.

    Attributes:
        begins: with the step, on all ranks before anything is written; False lets it be.
        written: with the folder and the hashes of the tensors' values, on rank 0 before it counts.
        counts: with the folder, on rank 0 when the tracker file names it.
    """

    begins: Callable[[int], bool]
    written: Callable[[Path, Manifest], None]
    counts: Callable[[Path], None]


def around_each_save(saves: Saves) -> None:
    """Call these from now on; a later call replaces the earlier."""

    def save(iteration: int, *args: Any, **kwargs: Any) -> None:
        maybe_finalize_async_save(blocking=True)  # one at a time
        if not saves.begins(iteration):
            return
        checkpointing.get_checkpoint_name = lambda *given, **how: str(hidden_folder(Path(_name_of(*given, **how))))
        try:
            _save_checkpoint(iteration, *args, **kwargs)
        finally:
            checkpointing.get_checkpoint_name = _name_of

    hashed: dict[str, _Hashes] = {}
    training.save_checkpoint = save
    checkpointing.maybe_msc = _Files(saves.counts)
    async_utils.TemporalAsyncCaller = _Thread
    filesystem_async._results_queue = queue.Queue()  # Megatron's lives in a process of its own
    checkpointing.wandb_utils.on_save_checkpoint_success = lambda path, *rest: _tell_wandb(str(named(path)), *rest)
    FileSystemWriterAsync.prepare_write_data = _prepare
    FileSystemWriterAsync.preload_tensors = staticmethod(lambda buckets, _: _staging.staged(buckets, alive=False))
    FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(write_shards)
    FileSystemWriterAsync.finish = lambda *given: _finish(hashed, *given)
    serialization.save_integrity_manifest = lambda folder: _publish(Path(folder), hashed.pop(folder), saves.written)


class _Hashes(NamedTuple):
    manifest: Manifest
    files: dict[str, str]


def _prepare(writer: Any, plan: Any, planner: Any) -> None:
    """As Megatron's, with as many files as there is something to write for."""
    writer.thread_count = files_of(plan.items)
    _prepare_writing(writer, plan, planner)


def _finish(hashed: dict[str, _Hashes], writer: Any, metadata: Any, results: list[list[Hashed]]) -> None:
    """Write .metadata, on rank 0, and keep the hashes that all ranks tell."""
    found = _Hashes({}, {})
    for one in (one for of_rank in results for one in of_rank):
        found.files[one.storage_data.relative_path] = one.file_sha256
        if one.sha256 is not None:
            found.manifest.setdefault(one.index.fqn, {})[",".join(map(str, one.index.offset or ()))] = one.sha256
    hashed[str(writer.checkpoint_dir)] = found
    _write_metadata(writer, metadata, results)


def _publish(hidden: Path, hashes: _Hashes, written: Callable[[Path, Manifest], None]) -> None:
    """Complete a checkpoint, on rank 0, and give it its name."""
    written(hidden, hashes.manifest)
    rest = [path for path in hidden.iterdir() if path.is_file() and path.name not in hashes.files]
    for path in rest:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    files = hashes.files | {path.name: hash_file(path) for path in rest}
    write_atomically(hidden / INTEGRITY, json.dumps({"algorithm": "sha256", "files": files}, indent=1))
    folder = named(hidden)
    if folder.exists():  # of steps that are trained anew
        folder.rename(old := hidden_folder(folder.with_name(f"{folder.name}.old")))
        shutil.rmtree(old)
    hidden.rename(folder)
    sync_folder(folder.parent)


def named(hidden: Path | str) -> Path:
    """What a hidden folder will be called."""
    return Path(hidden).with_name(Path(hidden).name.removeprefix(".").removesuffix(".partial"))


class _Files:
    """What Megatron opens files with; of them the tracker file is replaced at once."""

    def __init__(self, counts: Callable[[Path], None]) -> None:
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        return getattr(_maybe_msc, name)

    def open(self, path: str, mode: str = "r") -> Any:
        if mode == "w" and Path(path).name == TRACKER:
            return _Tracker(Path(path), self._counts)
        return _maybe_msc.open(path, mode)


class _Tracker(io.StringIO):
    def __init__(self, path: Path, counts: Callable[[Path], None]) -> None:
        super().__init__()
        self._path, self._counts = path, counts

    def close(self) -> None:
        text = self.getvalue()
        super().close()
        write_atomically(self._path, text)
        self._counts(self._path.parent / f"iter_{int(text):07d}")


class _Thread(async_utils.AsyncCaller):
    """Writes a rank's part of a checkpoint beside the training, from a copy."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def schedule_async_call(self, request: Any) -> None:
        if request.async_fn is None:
            return
        rank, buckets, results = request.async_fn_args
        copied = _staging.staged(buckets, alive=True)
        self._thread = threading.Thread(target=request.async_fn, args=(rank, copied, results), daemon=True)
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        alive = self._thread is not None and self._thread.is_alive()
        done = not alive if no_dist else bool(self.sync_all_async_calls(int(alive)))
        if done or blocking:
            self.close()
        return done or blocking

    def close(self, abort: bool = False) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __del__(self) -> None: ...
