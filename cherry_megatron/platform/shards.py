"""Writing a rank's part of a checkpoint: in several files at once if it is large, each hashed as it is written."""

import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from cherry_megatron.files import cannot_write
from cherry_megatron.storage.integrity import THREADS

_LARGE = 256 << 20  # bytes for which another file is worth it
_BLOCK = 4 << 20  # bytes hashed and written before the next are looked at


@dataclass(frozen=True)
class Hashed(WriteResult):
    """What a rank tells of a tensor or object that it has written, with SHA-256 of its values and of its file."""

    sha256: str | None
    file_sha256: str


def files_of(items: list[WriteItem]) -> int:
    """How many files a rank's part is to have; all of them are written, and verified, at once."""
    size = sum(filesystem_async._item_size(item) for item in items if item.type != WriteItemType.BYTE_IO)
    return min(THREADS, 1 + size // _LARGE)


def write_shards(transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
    """Write and hash this rank's files, one a bucket; failures reach all ranks through `results`."""
    try:
        with ThreadPoolExecutor(THREADS) as hashing, ThreadPoolExecutor(len(buckets)) as writing:
            results.put(dict(enumerate(writing.map(partial(_write_bucket, transforms, hashing), buckets))))
    except Exception as error:
        results.put(error)


def _write_bucket(transforms: list[Any], hashing: ThreadPoolExecutor, bucket: Any) -> list[Hashed]:
    path, name, (objects, tensors) = bucket
    hashes = hashing.map(_hash, [tensor for _, tensor in tensors])  # while they are written
    file = _HashedFile(Path(path))
    try:
        found = [
            filesystem_async._write_item(*transforms, file, data, item, name, SerializationFormat.TORCH_SAVE)
            for item, data in (*objects, *tensors)
        ]
        file.sync()
    except Exception as error:
        if file.failure is not None:  # torch's writer of single tensors fails without the system's reason
            raise cannot_write(Path(path), file.failure) from error
        raise
    finally:
        file.close()
    values = [None] * len(objects) + list(hashes)
    return [
        Hashed(one.index, one.size_in_bytes, one.storage_data, sha256, file.sha256)
        for one, sha256 in zip(found, values, strict=True)
    ]


def _hash(tensor: torch.Tensor) -> str:
    values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data if values.numel() else b"").hexdigest()


class _HashedFile(io.RawIOBase):
    """A new file that hashes what it is given.

    Attributes:
        failure: why the system did not take something.
    """

    def __init__(self, path: Path) -> None:
        self.failure: OSError | None = None
        self._hash = hashlib.sha256()
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise cannot_write(path, error) from None

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: Any) -> int:
        values = memoryview(data).cast("B")
        for at in range(0, len(values), _BLOCK):
            block = values[at : at + _BLOCK]
            self._hash.update(block)
            with self._noting_failure():
                self._file.write(block)
        return len(values)

    def sync(self) -> None:
        with self._noting_failure():
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # what was buffered when the disk was full
            self._file.close()
        super().close()

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error
            raise
