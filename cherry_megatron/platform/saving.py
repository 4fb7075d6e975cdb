"""Saving: a checkpoint is whole or not there, is hashed by those who write it, and training need not wait for it.

Megatron-core 0.19.2 writes into the checkpoint's folder itself, hashes all files on rank 0 alone, truncates its
tracker file before it writes it, and drops --async-save unless a further process of each rank does the writing. Put
in place of that here:

1. every rank writes its file into a folder with a hidden name, and hashes it and its tensors (`_write`); with
   --async-save in a thread, while training goes on with the next steps (`_Thread`);
2. when all have, rank 0 gets the hashes with the places of the tensors (`_finish`), lets its caller add to the
   folder, writes integrity.json, flushes, and renames the folder (`_publish`);
3. the tracker file moves last, at once (`_Tracker`).

Whatever dies on the way leaves a hidden folder, and the checkpoint before it is the newest.
"""

import errno
import hashlib
import io
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.training import checkpointing, training
from megatron.training.async_utils import maybe_finalize_async_save
from torch.distributed.checkpoint.storage import WriteResult

from cherry_megatron.files import cannot_write, hidden_folder, sync_folder, write_atomically
from cherry_megatron.storage.integrity import INTEGRITY, THREADS, hash_file
from cherry_megatron.storage.lineage import Manifest
from cherry_megatron.storage.tracker import TRACKER

_save_checkpoint, _name_of = training.save_checkpoint, checkpointing.get_checkpoint_name
_write_file, _write_metadata = FileSystemWriterAsync.write_preloaded_data, FileSystemWriterAsync.finish
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
    FileSystemWriterAsync.write_preloaded_data_multithread = staticmethod(_write)
    FileSystemWriterAsync.finish = lambda *given: _finish(hashed, *given)
    serialization.save_integrity_manifest = lambda folder: _publish(Path(folder), hashed.pop(folder), saves.written)


@dataclass(frozen=True)
class _Hashed(WriteResult):
    """What a rank tells of a tensor or object that it has written, with SHA-256 of its values and of its file."""

    sha256: str | None
    file_sha256: str


class _Hashes(NamedTuple):
    manifest: Manifest
    files: dict[str, str]


def _write(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
    """Write and hash this rank's files, one a bucket; failures reach all ranks through `results`."""
    try:
        with ThreadPoolExecutor(len(buckets)) as threads:
            results.put(dict(enumerate(threads.map(partial(_write_bucket, transforms, use_msc), buckets))))
    except Exception as error:
        results.put(error)


def _is_full(folder: Path, tensors: list[Any]) -> bool:
    """Whether these have no room; torch's writer of single tensors fails without the system's reason."""
    return shutil.disk_usage(folder).free < sum(tensor.nbytes for tensor in tensors)


def _write_bucket(transforms: list[Any], use_msc: bool, bucket: Any) -> list[_Hashed]:
    path, _, (objects, tensors) = bucket
    with ThreadPoolExecutor(THREADS) as threads:  # hash tensors while they are written
        hashes = threads.map(_hash, [tensor for _, tensor in tensors])
        _, found = _write_file(transforms, 0, bucket, None, None, use_fsync=True, use_msc=use_msc)
        if isinstance(found, RuntimeError) and _is_full(Path(path).parent, [tensor for _, tensor in tensors]):
            found = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if isinstance(found, OSError):
            raise cannot_write(Path(path), found)
        if isinstance(found, Exception):
            raise found
        digest = hash_file(Path(path))
        values = [None] * len(objects) + list(hashes)
    return [
        _Hashed(one.index, one.size_in_bytes, one.storage_data, sha256, digest)
        for one, sha256 in zip(found, values, strict=True)
    ]


def _hash(tensor: torch.Tensor) -> str:
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data if values.numel() else b"").hexdigest()


def _finish(hashed: dict[str, _Hashes], writer: Any, metadata: Any, results: list[list[_Hashed]]) -> None:
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
        copied = [_copied(*both) for both in zip(buckets, request.preload_fn(), strict=True)]
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


def _copied(before: Any, after: Any) -> Any:
    """A bucket whose tensors are on the CPU, with copies of those that were there: training changes them."""
    path, name, (objects, tensors) = after
    there = {tensor.data_ptr() for _, tensor in before[2][1] if tensor.device.type == "cpu"}
    return path, name, (objects, [(item, t.clone() if t.data_ptr() in there else t) for item, t in tensors])
