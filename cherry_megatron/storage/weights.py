"""Weights as Hugging Face keeps them: safetensors files, perhaps with an index, read and laid out without torch.

A file begins with the length of its header (8 bytes, little-endian) and the header: JSON with type, shape and place
of each tensor. The values follow, back to back.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from cherry_megatron.errors import CherryError
from cherry_megatron.storage.checkpoint import Checkpoint, Chunk, Place, Tensor
from cherry_megatron.storage.lineage import read_manifest
from cherry_megatron.storage.records import DTYPES, Array, StandIn, fill, new

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Their names of types -> torch's.
TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_NAMES = {ours: theirs for theirs, ours in TYPES.items()}
LONGEST_HEADER = 100_000_000  # what the format's own library allows
ALIGNMENT = 8


def is_weights(folder: Path) -> bool:
    """Whether a folder is of the form of Hugging Face."""
    return (folder / CONFIG).is_file()


class Weights(Checkpoint):
    """A folder of safetensors as a source of tensors, verified against its manifest where it has one.

    Attributes:
        common_state: what stands for Megatron's common state, once it is known what the weights are.

    Raises:
        CherryError: if files are missing or damaged, naming the first.
    """

    described_in = "its header"

    def __init__(self, folder: Path) -> None:
        self.folder, self.objects, self.read_hashes = folder, {}, {}
        self.manifest = read_manifest(folder)
        self.common_state: dict[str, Any] | None = None
        self.tensors: dict[str, Tensor] = {}
        for file, names in _files(folder).items():
            found = _tensors(folder / file)
            for name in names if names is not None else found:
                if name not in found:
                    raise CherryError(
                        f"{folder / file} lacks the tensor {name}, which {INDEX} says it has; restore it"
                    )
                self.tensors[name] = found[name]
        for name in sorted((self.manifest or {}).keys() ^ self.tensors.keys() if self.manifest else ()):
            raise CherryError(
                f"{folder}: the tensor {name} is not both in manifest.json and in the weights; restore them"
            )

    def _stored(self, file: BinaryIO, tensor: Tensor, chunk: Chunk) -> tuple[str, Array]:
        values: Array = np.empty(chunk.sizes, DTYPES[tensor.dtype][1])
        file.seek(chunk.place.offset)
        if values.size and not fill(file, memoryview(values.reshape(-1).view(np.uint8))):
            raise CherryError("the file is too short")
        return tensor.dtype, values

    def object(self, name: str) -> Any:
        """See Checkpoint; here of the common state alone."""
        if name == "common_state" and self.common_state is not None:
            return [self.common_state]
        return super().object(name)


def arguments_of(values: dict[str, Any]) -> StandIn:
    """Megatron's arguments, as they lie in a common state."""
    return new("argparse", "Namespace", values)


def _files(folder: Path) -> dict[str, list[str] | None]:
    """The files that hold the weights, each with the names that are taken from it; None: all."""
    if not (folder / INDEX).is_file():
        if (folder / WHOLE).is_file():
            return {WHOLE: None}
        others = sorted(path.name for path in folder.glob("*.bin"))
        has = f"{others[0]}, which is a pickle" if others else "none"
        raise CherryError(
            f"{folder} holds no {WHOLE} and no {INDEX} (there is {has}); save the model as safetensors"
        )
    try:
        placed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        found: dict[str, list[str] | None] = {}
        for name, file in placed.items():
            if Path(file).name != file:
                raise ValueError(f"{file!r} is not beside it")
            names = found.setdefault(file, [])
            assert names is not None
            names.append(name)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CherryError(f"{folder / INDEX} is damaged ({error}); restore it") from None
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    """What a file's header says."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LONGEST_HEADER:
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(file.read(length))
        found = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items() if name[:2] != "__"}
    except CherryError:
        raise
    except OSError as error:
        raise CherryError(f"cannot read {path}: {error.strerror}; restore it") from None
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise CherryError(f"{path} is no safetensors file ({error}); restore it") from None
    return found


def _tensor(path: Path, name: str, entry: dict[str, Any], begin: int) -> Tensor:
    if entry["dtype"] not in TYPES:
        raise CherryError(f"{path}: the tensor {name} is of the type {entry['dtype']}, which is not supported")
    dtype, shape, (start, end) = TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, start, end)):
        raise ValueError(f"the place of {name} is none")
    place = Place(path.name, begin + start, end - start)
    tensor = Tensor(name, dtype, shape, (Chunk((0,) * len(shape), shape, place),))
    if tensor.nbytes != place.length:
        raise ValueError(f"{name} of {list(shape)} has {place.length} bytes")
    return tensor


class Described(Protocol):
    """A tensor that is to be written."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class Shard:
    """A file that is to be written: its name, its beginning, its size, and where each tensor goes."""

    file: str
    header: bytes
    size: int
    places: dict[str, int]


def shards(groups: Sequence[Sequence[Described]], most: int) -> list[Shard]:
    """Lay tensors out in files.

    Args:
        groups: tensors that stay together in one file, in order.
        most: bytes of values in a file; only a group that is larger by itself makes it larger.
    """
    cut: list[list[Described]] = [[]]
    for group in groups:
        size = sum(one.nbytes for one in group)
        if cut[-1] and sum(one.nbytes for one in cut[-1]) + size > most:
            cut.append([])
        cut[-1] += group
    if len(cut) == 1:
        return [_shard(WHOLE, cut[0])]
    return [_shard(f"model-{k:05}-of-{len(cut):05}.safetensors", part) for k, part in enumerate(cut, start=1)]


def _shard(file: str, tensors: Sequence[Described]) -> Shard:
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, places = 0, {}
    for one in tensors:
        described[one.name] = {
            "dtype": _NAMES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [at, at + one.nbytes],
        }
        places[one.name] = at
        at += one.nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return Shard(file, header, len(header) + at, {name: len(header) + place for name, place in places.items()})


def index_of(laid: Sequence[Shard]) -> str:
    """The content of the index."""
    placed = {name: shard.file for shard in laid for name in shard.places}
    total = sum(shard.size - len(shard.header) for shard in laid)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2)
