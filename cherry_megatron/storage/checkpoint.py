"""A torch_dist checkpoint as a source: which tensors it holds, and any of them, whole, on request.

How many ranks wrote it does not matter: a tensor's chunks are put together, and every chunk is checked
against the checkpoint's manifest (see lineage.py) as it is read. Nothing that is not asked for is read.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cherry_megatron.errors import CherryError
from cherry_megatron.storage.integrity import check_description
from cherry_megatron.storage.lineage import Manifest, read_manifest
from cherry_megatron.storage.records import DTYPES, Array, load_pickle, read_object, read_tensor
from cherry_megatron.storage.tracker import newest, saved_folder, why_none

READ_AHEAD = 128 << 10  # Linux heeds no more of a request than its own window
OPTIMIZER = "optimizer."  # what begins so is the optimizer's
_CHAINED = re.compile(r"chained_\d+\.optimizer\.")  # of one of several


@dataclass(frozen=True)
class Place:
    """Where a record lies."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, as one rank wrote it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place

    @property
    def key(self) -> str:
        """Its name in the manifest: where it begins in the tensor."""
        return ",".join(map(str, self.offsets))


@dataclass(frozen=True)
class Tensor:
    """A stored tensor: torch's name of its type, its shape, its chunks."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype][1]).itemsize


class Checkpoint:
    """One checkpoint folder, the one that holds `.metadata`.

    Attributes:
        folder: it.
        tensors: by name.
        objects: what is no tensor, by name.
        manifest: hashes written when it was saved, or None.
        read_hashes: hashes of the chunks read so far, by tensor and chunk.
        described_in: what says where a file's tensors lie.

    Raises:
        CherryError: if it is none.
    """

    described_in = ".metadata"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest | None = read_manifest(folder)
        self.read_hashes: Manifest = {}
        try:
            state = load_pickle((folder / ".metadata").read_bytes()).state
            places = {
                (index.state["fqn"], _size(index.state.get("offset"))): Place(
                    str(info.state["relative_path"]), int(info.state["offset"]), int(info.state["length"])
                )
                for index, info in state["storage_data"].items()
            }
            self.objects = {name: place for (name, offset), place in places.items() if offset is None}
            self.tensors = {
                name: _tensor(name, described.state, places)
                for name, described in state["state_dict_metadata"].items()
                if described.path[1] == "TensorStorageMetadata"
            }
            self.tensors = {layer.name: layer for tensor in self.tensors.values() for layer in _unstacked(tensor)}
        except OSError as error:
            raise CherryError(f"{folder}/.metadata: {error.strerror}; name a torch_dist checkpoint") from None
        except (CherryError, KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
            raise CherryError(
                f"{folder}/.metadata is not that of a torch_dist checkpoint ({error}); restore the checkpoint"
            ) from None
        for name in sorted((self.manifest or {}).keys() - self.tensors.keys()):
            raise CherryError(f"{folder}/.metadata lacks the tensor {name} of its manifest; restore the checkpoint")

    @cached_property
    def model(self) -> dict[str, Tensor]:
        """The tensors of the model, without the optimizer's."""
        return {n: t for n, t in self.tensors.items() if not n.startswith(OPTIMIZER) and not _CHAINED.match(n)}

    @cached_property
    def experts(self) -> set[int]:
        """The numbers of the whole models that a mixture holds; of a single model none."""
        found = (re.match(r"experts\.(\d+)\.", name) for name in self.model)
        return {int(match[1]) for match in found if match}

    @property
    def experts_inside(self) -> int:
        """How many experts each layer `E` has; 0 without such layers."""
        end = ".mlp.experts.experts.linear_fc1.weight"
        return next((tensor.shape[0] for name, tensor in self.model.items() if name.endswith(end)), 0)

    def under(self, start: str) -> "Checkpoint":
        """The tensors whose names begin so, by the rest of their names, with the same objects."""
        found = copy(self)
        for known in ("model", "experts"):  # of all tensors
            found.__dict__.pop(known, None)
        found.tensors = {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}
        found.manifest, found.read_hashes = None, {}
        return found

    def check(self, names: list[str]) -> None:
        """See that all of these tensors' files are there and long enough.

        Raises:
            CherryError: naming the first that is not.
        """
        ends: dict[str, int] = {}
        for name in names:
            tensor = self.tensors[name]
            if not _is_whole(tensor):
                raise CherryError(f"{self.folder}: parts of the tensor {name} are missing; restore the checkpoint")
            for place in (chunk.place for chunk in tensor.chunks):
                ends[place.file] = max(ends.get(place.file, 0), place.offset + place.length)
        for file, end in ends.items():
            self._check_file(file, end)

    def _check_file(self, file: str, end: int) -> Path:
        """The path of a file that reaches to `end` at least."""
        path = self.folder / file
        if not path.is_file():
            raise CherryError(f"{path} is missing; restore the checkpoint")
        if (size := path.stat().st_size) < end:
            raise CherryError(
                f"{path} is truncated: it has {size} bytes, and at least {end} by {self.described_in}; restore the "
                "checkpoint"
            )
        return path

    def fetch(self, names: Iterable[str]) -> None:
        """Have the system read these tensors ahead, so that the disk works while the processor does."""
        if not hasattr(os, "posix_fadvise"):
            return
        for place in (chunk.place for name in names for chunk in self.tensors[name].chunks):
            with suppress(OSError), (self.folder / place.file).open("rb") as file:
                for at in range(place.offset, place.offset + place.length, READ_AHEAD):
                    os.posix_fadvise(file.fileno(), at, READ_AHEAD, os.POSIX_FADV_WILLNEED)

    def read(self, name: str) -> Array:
        """A tensor, whole.

        Raises:
            CherryError: if a chunk cannot be read or is not what was saved.
        """
        tensor = self.tensors[name]
        whole: Array | None = None
        for chunk in tensor.chunks:
            values = self._read_chunk(tensor, chunk)
            if values.shape == tensor.shape:
                return values
            if whole is None:
                whole = np.empty(tensor.shape, values.dtype)
            whole[tuple(slice(at, at + n) for at, n in zip(chunk.offsets, chunk.sizes, strict=True))] = values
        assert whole is not None
        return whole

    def _read_chunk(self, tensor: Tensor, chunk: Chunk) -> Array:
        path = self.folder / chunk.place.file
        try:
            with path.open("rb", buffering=0) as file:
                dtype, values = self._stored(file, tensor, chunk)
            if values.shape == (1, *chunk.sizes):  # a layer of a stack
                values = values[0]
            if dtype != tensor.dtype or values.shape != chunk.sizes:
                raise CherryError(f"it holds {dtype} {values.shape}, not {tensor.dtype} {chunk.sizes}")
        except (CherryError, OSError) as error:
            raise CherryError(
                f"{path}: cannot read the tensor {tensor.name}: {error}; restore the checkpoint"
            ) from None
        digest = hash_values(values)
        self.read_hashes.setdefault(tensor.name, {})[chunk.key] = digest
        if self.manifest is not None and self.manifest.get(tensor.name, {}).get(chunk.key) != digest:
            raise CherryError(
                f"{path}: the tensor {tensor.name} is not what was saved (SHA-256); restore the checkpoint"
            )
        return values

    def _stored(self, file: BinaryIO, tensor: Tensor, chunk: Chunk) -> tuple[str, Array]:
        """What lies at a chunk's place: torch's name of its type, and the values."""
        return read_tensor(file, chunk.place.offset, chunk.place.length)

    def arguments(self) -> dict[str, Any]:
        """Megatron's arguments of the training that saved it, by name.

        Raises:
            CherryError: if it holds none.
        """
        try:
            found = self.object("common_state")[0]["args"].state
        except (LookupError, TypeError, AttributeError):
            found = None
        if not isinstance(found, dict):
            raise CherryError(
                f"{self.folder} holds no arguments of a training; name a checkpoint that a training with "
                "Megatron-core 0.19 saved"
            )
        return found

    def object(self, name: str) -> Any:
        """An object that is no tensor; classes become stand-ins.

        Raises:
            CherryError: if there is none or it cannot be read.
        """
        place = next((place for found, place in self.objects.items() if found.split("/")[0] == name), None)
        if place is None:
            raise CherryError(f"{self.folder} holds no {name}; name a checkpoint that Megatron-core 0.19 saved")
        path = self._check_file(place.file, place.offset + place.length)
        try:
            with path.open("rb") as file:
                return read_object(file, place.offset, place.length)
        except (CherryError, OSError) as error:
            raise CherryError(f"{path}: cannot read {name}: {error}; restore the checkpoint") from None


def _is_whole(tensor: Tensor) -> bool:
    """Whether its chunks are all of it, and no two have a value in common."""
    edges = [
        sorted({0, size}.union(*((c.offsets[k], c.offsets[k] + c.sizes[k]) for c in tensor.chunks)))
        for k, size in enumerate(tensor.shape)
    ]
    if any(found[-1] != size for found, size in zip(edges, tensor.shape, strict=True)):
        return False
    places = [{at: place for place, at in enumerate(found)} for found in edges]
    times = np.zeros([len(found) - 1 for found in edges], np.int32)  # that each cell between edges is covered
    for chunk in tensor.chunks:
        spans = zip(places, chunk.offsets, chunk.sizes, strict=True)
        times[tuple(slice(place[at], place[at + size]) for place, at, size in spans)] += 1
    return bool((times == 1).all())


def together(parts: Mapping[str, Checkpoint]) -> Checkpoint:
    """Several checkpoints as one source.

    Args:
        parts: by what the names of their tensors get in front; one alone may have nothing there.

    Returns:
        One with the tensors of all, and a manifest if all have one. It has no objects.
    """
    if list(parts) == [""]:
        return parts[""]
    found = Checkpoint.__new__(Checkpoint)
    found.folder, found.objects, found.read_hashes = Path("/"), {}, {}  # places are absolute
    found.tensors, found.manifest = {}, {}
    for start, part in parts.items():
        for name, tensor in part.tensors.items():
            chunks = tuple(
                replace(chunk, place=replace(chunk.place, file=str(part.folder.absolute() / chunk.place.file)))
                for chunk in tensor.chunks
            )
            found.tensors[start + name] = replace(tensor, name=start + name, chunks=chunks)
        if part.manifest is None or found.manifest is None:
            found.manifest = None
        else:
            found.manifest |= {start + name: hashes for name, hashes in part.manifest.items()}
    return found


def open_checkpoint(path: Path) -> Checkpoint:
    """The newest checkpoint of a run or of a folder that Megatron saved to, or the checkpoint in a folder.

    Raises:
        CherryError: if there is none, or what describes it is damaged.
    """
    folder = path
    if not (path / ".metadata").is_file():
        saved = saved_folder(path)
        if saved is None:
            raise CherryError(why_none(path))
        folder = newest(saved)
    check_description(folder)
    return Checkpoint(folder)


def hash_values(values: Array) -> str:
    """SHA-256 of a tensor's values, row by row."""
    return hashlib.sha256(np.ascontiguousarray(values).data.cast("B") if values.size else b"").hexdigest()


def _tensor(name: str, state: dict[str, Any], places: dict[tuple[str, Any], Place]) -> Tensor:
    chunks = [(_size(c.state["offsets"]), _size(c.state["sizes"])) for c in state["chunks"]]
    chunks = list(dict.fromkeys(chunks))  # replicas may be named twice
    dtype = state["properties"].state[0].path[1]
    if dtype not in DTYPES:
        raise CherryError(f"{name} has the type {dtype}, which is not supported")
    shape = _size(state["size"]) or ()
    if any(len(found or ()) != len(shape) for chunk in chunks for found in chunk):
        raise CherryError(f"{name} has chunks of another number of dimensions")
    return Tensor(
        name,
        dtype,
        shape,
        tuple(Chunk(at or (), size or (), places[name, at]) for at, size in chunks),
    )


def _unstacked(tensor: Tensor) -> list[Tensor]:
    """A GPTModel's tensor of all layers, which has a chunk or more for each, as a tensor a layer."""
    found = re.fullmatch(r"(.*decoder\.layers\.)(\D.*)", tensor.name)
    if found is None or not tensor.shape or any(chunk.sizes[0] != 1 for chunk in tensor.chunks):
        return [tensor]
    layers: dict[int, list[Chunk]] = {}
    for chunk in tensor.chunks:
        layers.setdefault(chunk.offsets[0], []).append(Chunk(chunk.offsets[1:], chunk.sizes[1:], chunk.place))
    for layer in range(tensor.shape[0]):
        if layer not in layers:
            raise CherryError(f"{tensor.name} has no part for layer {layer}")
    return [
        Tensor(f"{found[1]}{layer}.{found[2]}", tensor.dtype, tensor.shape[1:], tuple(chunks))
        for layer, chunks in layers.items()
    ]


def _size(found: Any) -> tuple[int, ...] | None:
    """A torch.Size."""
    size = None if found is None else tuple(found.args[0]) if found.args else ()
    if any(type(number) is not int or number < 0 for number in size or ()):
        raise ValueError(f"{size} is no size")
    return size
