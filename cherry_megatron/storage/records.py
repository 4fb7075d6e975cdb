"""The files of a torch_dist checkpoint, read and written without torch.

A checkpoint folder holds `.metadata` (a pickle: the tensors' names, shapes and chunks, and where each lies)
and `.distcp` files, which are records of torch.save one after another: zip archives of a small pickle and
the raw bytes. Two reasons not to let torch.distributed.checkpoint read them: importing torch takes longer
from a cold disk than the surgery of a billion parameters, and it unpickles whatever a file holds.
Here classes that a pickle names become inert stand-ins (`StandIn`), which can be looked into, changed and
written back, and never run.
"""

import copyreg
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from functools import cache
from typing import Any, BinaryIO, ClassVar

import numpy as np

from cherry_megatron.errors import CherryError

Array = np.ndarray[Any, np.dtype[Any]]
# torch's name of a type -> its storage class, and the numpy type of the same bytes.
DTYPES: dict[str, tuple[str, Any]] = {
    "float64": ("DoubleStorage", np.float64),
    "float32": ("FloatStorage", np.float32),
    "float16": ("HalfStorage", np.float16),
    "bfloat16": ("BFloat16Storage", np.uint16),  # numpy has none: its bits
    "int64": ("LongStorage", np.int64),
    "int32": ("IntStorage", np.int32),
    "int16": ("ShortStorage", np.int16),
    "int8": ("CharStorage", np.int8),
    "uint8": ("ByteStorage", np.uint8),
    "bool": ("BoolStorage", np.bool_),
}
_BY_STORAGE = {storage: name for name, (storage, _) in DTYPES.items()}


class StandIn:
    """An object of a class that was not imported: what it was made from.

    Attributes:
        path: (module, name) of the class or function; of the class, not of the object.
        args: what it was called with.
        called: whether it was called, or only its `__new__` (pickle has an opcode for each).
        state: what pickle would hand to `__setstate__`.
    """

    path: tuple[str, str]
    args: tuple[Any, ...]
    called: bool
    state: Any

    def __new__(cls, *args: Any) -> "StandIn":
        self = super().__new__(cls)
        self.args, self.called, self.state = args, False, None
        return self

    def __init__(self, *args: Any) -> None:
        self.called = True

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        made = (type(self), self.args) if self.called else (copyreg.__newobj__, (type(self), *self.args))  # type: ignore[attr-defined]
        return made if self.state is None else (*made, self.state)


@cache
def stand_in(module: str, name: str) -> type[StandIn]:
    """The stand-in for a class or function."""
    return type(name, (StandIn,), {"path": (module, name)})


def new(module: str, name: str, state: Any) -> StandIn:
    """An object made without a call, with a state."""
    made = stand_in(module, name).__new__(stand_in(module, name))
    made.state = state
    return made


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else stand_in(module, name)

    def persistent_load(self, found: Any) -> Any:
        return found


_PythonPickler: Any = pickle._Pickler  # the one in C refuses classes that cannot be imported


class _Pickler(_PythonPickler):
    def save_global(self, obj: Any, name: str | None = None) -> None:
        if isinstance(obj, type) and issubclass(obj, StandIn):
            self.write(pickle.GLOBAL + "{}\n{}\n".format(*obj.path).encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    dispatch: ClassVar = {**_PythonPickler.dispatch, type: save_global}

    def persistent_id(self, found: Any) -> Any:
        return found.found if isinstance(found, _Storage) else None


class _Storage:
    """A tensor's storage, which torch.save names by a tuple and keeps beside the pickle."""

    def __init__(self, *found: Any) -> None:
        self.found = ("storage", *found)


def load_pickle(data: bytes) -> Any:
    """Python values; objects of any other class as stand-ins.

    Raises:
        CherryError: if it is no pickle.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # noise makes it raise nearly any
        raise CherryError(f"not a pickle that torch writes ({error})") from None


def dump_pickle(value: Any) -> bytes:
    """The reverse of `load_pickle`."""
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump(value)
    return out.getvalue()


class _Part(io.RawIOBase):
    """A file from some place on, for `length` bytes if it is read."""

    def __init__(self, file: BinaryIO, begin: int, length: int = 0) -> None:
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._begin + self._at)
        count: int = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])  # type: ignore[attr-defined]
        self._at += count
        return count

    def write(self, data: Any) -> int:
        self._file.seek(self._begin + self._at)
        left = memoryview(data)
        while left.nbytes:  # the system takes 2 GiB at once at most, and less when it likes
            left = left[self._file.write(left) :]
        self._at += len(data)
        return len(data)


def read_tensor(file: BinaryIO, offset: int, length: int) -> tuple[str, Array]:
    """A tensor that torch.save wrote at a place of a file.

    Returns:
        torch's name of its type, and the values (of bfloat16 the bits, as uint16).

    Raises:
        CherryError: if there is something else at this place, or the file is too short.
    """
    try:
        return _read_tensor(file, offset, length)
    except CherryError:
        raise
    except Exception as error:  # a damaged record makes it raise nearly any
        raise CherryError(f"not a tensor of a known type ({error})") from None


def _read_tensor(file: BinaryIO, offset: int, length: int) -> tuple[str, Array]:
    archive, described = _open(file, offset, length)
    (_, storage, key, _, count), start, shape, stride = described.args[:4]
    name = _BY_STORAGE[storage.path[1]]
    info = archive.getinfo(_pickle_name(archive).replace("data.pkl", f"data/{key}"))
    values = np.empty(count, DTYPES[name][1])
    last = start + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if min((start, *shape, *stride)) < 0 or (0 not in shape and last >= count):
        raise CherryError("its shape reaches beyond its values")
    # Past the archive member's own header, whose name and padding vary in length.
    file.seek(offset + info.header_offset + 26)
    lengths = np.frombuffer(file.read(4), np.uint16)
    file.seek(offset + info.header_offset + 30 + int(lengths.sum()))
    if info.file_size != values.nbytes or not fill(file, memoryview(values.view(np.uint8))):
        raise CherryError("the file is too short")
    if stride != tuple(np.cumprod((1, *shape[:0:-1]))[::-1]) and values.size > 1:
        strides = tuple(step * values.itemsize for step in stride)
        return name, np.lib.stride_tricks.as_strided(values[start:], shape, strides).copy()
    return name, values[start : start + int(np.prod(shape))].reshape(shape)


def fill(file: BinaryIO, buffer: memoryview) -> bool:
    """Read until a buffer is full; False if the file ends before. The system gives 2 GiB at once at most."""
    while buffer.nbytes:
        count: int = file.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            return False
        buffer = buffer[count:]
    return True


def read_object(file: BinaryIO, offset: int, length: int) -> Any:
    """An object that torch.save wrote at a place of a file; classes become stand-ins."""
    return _open(file, offset, length)[1]


def _open(file: BinaryIO, offset: int, length: int) -> tuple[zipfile.ZipFile, Any]:
    try:
        archive = zipfile.ZipFile(io.BufferedReader(_Part(file, offset, length), 1 << 12))
        return archive, load_pickle(archive.read(_pickle_name(archive)))
    except Exception as error:  # a damaged archive makes it raise nearly any
        raise CherryError(f"not a record of torch.save ({error})") from None


def _pickle_name(archive: zipfile.ZipFile) -> str:
    return next(name for name in archive.namelist() if name.endswith("data.pkl"))


def write_tensor(file: BinaryIO, name: str, values: Array) -> int:
    """Write a tensor as torch.save does.

    Args:
        name: torch's name of the type.
        values: of numpy's type of the same size.

    Returns:
        The number of bytes written.
    """
    strides = tuple(int(step) for step in np.cumprod((1, *values.shape[:0:-1]))[::-1]) if values.ndim else ()
    storage = _Storage(stand_in("torch", DTYPES[name][0]), "0", "cpu", values.size)
    rebuild = stand_in("torch._utils", "_rebuild_tensor_v2")
    described = rebuild(storage, 0, tuple(values.shape), strides, False, OrderedDict())
    return _write(file, described, np.ascontiguousarray(values).data.cast("B") if values.size else b"")


def write_object(file: BinaryIO, value: Any) -> int:
    """Write an object as torch.save does; returns the number of bytes written."""
    return _write(file, value, None)


def _write(file: BinaryIO, value: Any, data: Any) -> int:
    begin = file.seek(0, os.SEEK_END)
    # The zip format can be read from any place of a file only if its own offsets begin there.
    with zipfile.ZipFile(_Part(file, begin), "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", dump_pickle(value))
        archive.writestr("archive/byteorder", "little")
        if data is not None:
            archive.writestr("archive/data/0", data)
        archive.writestr("archive/version", "3\n")
    return file.seek(0, os.SEEK_END) - begin
