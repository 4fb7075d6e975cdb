"""A rank's files: what is hashed is what was written, and a disk that is full says so."""

import hashlib
import queue
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from cherry_megatron.errors import CherryError
from cherry_megatron.platform import shards
from cherry_megatron.platform.staging import Staging


def item_of(name: str, tensor: torch.Tensor) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.size())
    data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), tensor.size())
    return WriteItem(MetadataIndex(name), WriteItemType.SHARD, tensor_data=data)


def buckets_of(folder: Path, *files: dict[str, torch.Tensor]) -> list:
    return [
        (str(folder / f"{number}.distcp"), f"{number}.distcp", ([], [(item_of(k, t), t) for k, t in file.items()]))
        for number, file in enumerate(files)
    ]


def written(buckets: list) -> dict | Exception:
    results: queue.Queue = queue.Queue()
    shards.write_shards([_StorageWriterTransforms()], False, 0, buckets, results)
    return results.get_nowait()


def test_hashes_of_values_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_BLOCK", 1000)
    tensors = {"a": torch.randn(70, 30), "b": torch.randn(5).bfloat16(), "none": torch.empty(0)}
    found = written(buckets_of(tmp_path, tensors, {"one": torch.tensor(3)}))
    assert {number: [one.index.fqn for one in of_file] for number, of_file in found.items()} == {
        0: ["a", "b", "none"],
        1: ["one"],
    }
    for one in (one for of_file in found.values() for one in of_file):
        place = one.storage_data
        content = (tmp_path / place.relative_path).read_bytes()
        assert one.file_sha256 == hashlib.sha256(content).hexdigest()
        (tmp_path / "record").write_bytes(content[place.offset : place.offset + place.length])
        value = torch.load(tmp_path / "record", weights_only=True)
        assert torch.equal(value, {**tensors, "one": torch.tensor(3)}[one.index.fqn])
        assert one.sha256 == hashlib.sha256(value.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def test_a_full_disk_is_told_with_the_systems_reason(tmp_path):
    ((path, name, content),) = buckets_of(tmp_path, {"a": torch.randn(70, 30)})
    Path(path).symlink_to("/dev/full")
    error = written([(path, name, content)])
    assert isinstance(error, CherryError) and "no space left for " in str(error)


@pytest.mark.parametrize(("size", "files"), [(0, 1), (1, 1), (256 << 20, 2), (3 << 30, shards.THREADS)])
def test_a_large_part_is_several_files(size, files):
    assert shards.files_of([item_of("a", torch.empty(size, dtype=torch.uint8, device="meta"))]) == files


def test_copies_are_of_the_moment_and_their_memory_is_used_again(tmp_path):
    alive, staging = {"a": torch.randn(9, 7), "b": torch.ones(3).bfloat16(), "c": torch.tensor(1.5)}, Staging()
    places = []
    for _ in range(2):
        expected = {name: one.clone() for name, one in alive.items()}
        ((_, _, (_, pairs)),) = staging.staged(buckets_of(tmp_path, alive), alive=True)
        for one in alive.values():
            one += 1
        for item, copy in pairs:
            assert torch.equal(copy, expected[item.index.fqn])
            assert copy.untyped_storage().nbytes() == copy.nbytes, "torch.save writes storages whole"
        places.append([copy.data_ptr() for _, copy in pairs])
    assert places[0] == places[1]
    ((_, _, (_, pairs)),) = staging.staged(buckets_of(tmp_path, alive), alive=False)
    assert all(one is alive[item.index.fqn] for item, one in pairs), "nothing goes on while they are written"
