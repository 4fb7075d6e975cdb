"""Loading a checkpoint runs nothing that its files name.

torch.distributed.checkpoint (2.11) unpickles `.metadata`, and whatever is no tensor, without a look at it: a pickle
may name any function, and it is called. Here `.metadata` may name what describes tensors and their places, and the
rest what `torch.load(weights_only=True)` takes, to which Megatron adds its own classes.
"""

import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, set_element
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_CHECKPOINT = "torch.distributed.checkpoint"
_METADATA = {
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_CHECKPOINT}.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device", *(str(kind).removeprefix("torch.") for kind in vars(torch).values()
                                  if isinstance(kind, torch.dtype))},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"Path", "PosixPath"},  # as Python 3.13 calls them
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA.get(module, ()):
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which describes no tensor")
        return super().find_class(module, name)


def _read(load: Callable[[], Any], what: str) -> Any:
    try:
        return load()
    except Exception as error:  # noise makes it raise nearly any
        first = str(error).partition("\n")[0] or type(error).__name__
        raise pickle.UnpicklingError(f"{what} cannot be read: {first}") from error


def refuse_foreign_pickles() -> None:
    """Put this in force in this process."""

    def read_metadata(self: FileSystemReader, *_: Any, **named: Any) -> Any:
        with self.fs.create_stream(self._get_metadata_path(named.get("rank")), "rb") as file:
            metadata = _read(_Unpickler(file).load, ".metadata")
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(".metadata does not describe a checkpoint")
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def load_bytes(self: DefaultLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        found = _read(partial(torch.load, value, weights_only=True), name)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], found)
        else:
            self.state_dict[name] = found

    FileSystemReader.read_metadata = read_metadata  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = load_bytes  # type: ignore[method-assign]
