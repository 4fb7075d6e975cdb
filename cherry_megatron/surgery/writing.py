"""Writing a torch_dist checkpoint: a file a job, by worker processes, and all or nothing.

Everything, the tracker file too, is written into a folder with a hidden name beside the target, flushed to the
disk, and renamed at the end. Whatever dies on the way leaves no checkpoint, and the next run begins anew.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from cherry_megatron.files import cannot_write, sync_folder
from cherry_megatron.storage import records
from cherry_megatron.storage.checkpoint import Checkpoint, hash_values
from cherry_megatron.storage.integrity import INTEGRITY, hash_file
from cherry_megatron.storage.lineage import LINEAGE, MANIFEST, Manifest, manifest_text
from cherry_megatron.storage.records import DTYPES, Array, stand_in
from cherry_megatron.storage.tracker import TRACKER
from cherry_megatron.workers import worker_processes

CHECKPOINT = "iter_0000000"
AHEAD = 2  # jobs a worker whose tensors are being read from the disk
_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"


@dataclass(frozen=True)
class Spec:
    """A tensor to be written: name, torch's name of its type, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype][1]).itemsize


class Job(Protocol):
    """A part of the surgery that one process does: what it reads, what it writes, and how."""

    @property
    def reads(self) -> Sequence[str]: ...

    @property
    def writes(self) -> Sequence[Spec]: ...

    def make(self, source: Checkpoint) -> Iterator[Array]:
        """The tensors of `writes`, in that order."""
        ...


@dataclass(frozen=True)
class Report:
    """What a process did: the file, its hash, where its tensors lie, and the hashes of what it read."""

    file: str
    sha256: str
    tensors: tuple[tuple[Spec, int, int, str], ...]
    read: Manifest


def carry_out(checkpoint: Checkpoint, folder: Path) -> Callable[[int, Job], Report]:
    """What a worker process does: a job, into a file of its own."""

    def do(number: int, job: Job) -> Report:
        checkpoint.read_hashes.clear()
        path = folder / f"__{number}_0.distcp"
        written = []
        try:
            with path.open("x+b", buffering=0) as file:
                for spec, values in zip(job.writes, job.make(checkpoint), strict=True):
                    assert values.shape == spec.shape, (spec, values.shape)
                    at = file.seek(0, os.SEEK_END)
                    length = records.write_tensor(file, spec.dtype, values)
                    written.append((spec, at, length, hash_values(values)))
        except OSError as error:
            raise cannot_write(path, error) from None
        return Report(path.name, hash_file(path), tuple(written), dict(checkpoint.read_hashes))

    return do


def run_jobs(
    source: Checkpoint,
    folder: Path,
    jobs: Sequence[Job],
    workers: int,
    work: Callable[..., Callable[[int, Job], Report]] = carry_out,
    *further: Any,
) -> list[Report]:
    """Do all jobs, the largest first, and flush their files; one bar for the bytes read and written.

    While the workers compute, this process has the system read the next jobs' tensors and write the last ones'
    files: the disk is never idle.

    Args:
        source: what they read.
        folder: where they write.
        jobs: in the order of the reports.
        workers: processes.
        work: what each of them does, from the source, the folder and what is `further` given.
    """
    sizes = [
        sum(source.tensors[name].nbytes for name in job.reads) + sum(spec.nbytes for spec in job.writes)
        for job in jobs
    ]
    order = sorted(range(len(jobs)), key=lambda k: -sizes[k])
    ahead = iter(order)
    with (
        tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="surgery", disable=None) as bar,
        ThreadPoolExecutor(workers) as flushing,
        worker_processes(min(workers, len(jobs)), work, source, folder, *further) as submit,
    ):
        numbers = {submit(number, jobs[number]): number for number in order}
        for number in islice(ahead, AHEAD * workers):
            source.fetch(jobs[number].reads)
        reports, flushed = {}, []
        for future in as_completed(numbers):
            number = numbers[future]
            reports[number] = future.result()
            flushed.append(flushing.submit(_flush, folder / reports[number].file))
            source.fetch([name for following in islice(ahead, 1) for name in jobs[following].reads])
            bar.update(sizes[number])
        for done in flushed:
            done.result()
    return [reports[number] for number in range(len(jobs))]


def _flush(path: Path) -> None:
    try:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from None


def publish(
    partial: Path,
    save: Path,
    reports: Sequence[Report],
    objects: dict[str, Any],
    lineage: Callable[[Manifest], dict[str, Any]],
) -> Path:
    """Complete a checkpoint that jobs have written, and let it appear at once.

    Args:
        partial: from `new_folder`; the jobs wrote to its CHECKPOINT.
        save: where it is to lie.
        reports: of the jobs.
        objects: what is no tensor, by its name in the checkpoint.
        lineage: makes the record from the manifest.

    Returns:
        The checkpoint's folder.
    """
    folder = partial / CHECKPOINT
    manifest = manifest_of(reports)
    places: dict[str, tuple[str, int, int]] = {}
    with (folder / "__objects.distcp").open("w+b", buffering=0) as file:
        for name, value in objects.items():
            at = file.seek(0, os.SEEK_END)
            places[name] = ("__objects.distcp", at, records.write_object(file, value))
        os.fsync(file.fileno())
    files = {
        ".metadata": records.dump_pickle(metadata(reports, places)),
        "metadata.json": b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}',
        MANIFEST: manifest_text(manifest).encode(),
        LINEAGE: json.dumps(lineage(manifest), indent=1, ensure_ascii=False).encode(),
    }
    for name, content in files.items():
        write_flushed(folder / name, content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    hashes |= {report.file: report.sha256 for report in reports}
    hashes["__objects.distcp"] = hash_file(folder / "__objects.distcp")
    # What Megatron's --verify-integrity reads.
    write_flushed(folder / INTEGRITY, json.dumps({"algorithm": "sha256", "files": hashes}, indent=1).encode())
    sync_folder(folder)
    write_flushed(partial / TRACKER, b"0")
    sync_folder(partial)
    partial.rename(save)
    sync_folder(save.parent)
    return save / CHECKPOINT


def manifest_of(reports: Iterable[Report]) -> Manifest:
    """The hashes of what was written."""
    return {spec.name: {_origin(spec): digest} for report in reports for spec, _, _, digest in report.tensors}


def write_flushed(path: Path, content: bytes) -> None:
    """Write a file of a folder that will be renamed."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())


def _origin(spec: Spec) -> str:
    return ",".join("0" for _ in spec.shape)


def metadata(reports: Iterable[Report], objects: dict[str, tuple[str, int, int]]) -> Any:
    """What torch.distributed.checkpoint keeps in `.metadata`; every tensor is one chunk."""
    described: dict[str, Any] = {}
    storage: dict[Any, Any] = {}

    def size(numbers: Sequence[int]) -> Any:
        return stand_in("torch", "Size")(tuple(numbers))

    def place(name: str, file: str, at: int, length: int, offset: Any, index: int | None) -> None:
        key = records.new(_METADATA, "MetadataIndex", {"fqn": name, "offset": offset, "index": index})
        info = {"relative_path": file, "offset": at, "length": length, "transform_descriptors": None}
        storage[key] = records.new(_FILESYSTEM, "_StorageInfo", info)

    for report in reports:
        for spec, at, length, _ in report.tensors:
            origin = (0,) * len(spec.shape)
            chunk = {"offsets": size(origin), "sizes": size(spec.shape)}
            described[spec.name] = records.new(
                _METADATA,
                "TensorStorageMetadata",
                {
                    "properties": _properties(spec.dtype),
                    "size": size(spec.shape),
                    "chunks": [records.new(_METADATA, "ChunkStorageMetadata", chunk)],
                },
            )
            place(spec.name, report.file, at, length, size(origin), 0)
    for name, (file, at, length) in objects.items():
        described[name] = records.new(_METADATA, "BytesStorageMetadata", None)
        place(name, file, at, length, None, None)
    meta: dict[str, Any] = {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
    return records.new(
        _METADATA,
        "Metadata",
        {
            "state_dict_metadata": described,
            "planner_data": None,
            "storage_data": storage,
            "storage_meta": records.new(_METADATA, "StorageMeta", meta),
            "version": "1.0.0",
        },
    )


def _properties(dtype: str) -> Any:
    layout = stand_in("torch.serialization", "_get_layout")("torch.strided")
    memory_format = stand_in(_METADATA, "_MEM_FORMAT_ENCODING")(0)
    state = (stand_in("torch", dtype), layout, False, memory_format, False)
    return records.new(_METADATA, "TensorProperties", state)
