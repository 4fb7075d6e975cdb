"""A section of a configuration as its dataclass."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from cherry_megatron.errors import CherryError, naming
from cherry_megatron.flags import nearest


def section_of(path: Path, name: str, cls: Any, values: Any) -> Any:
    """Build a section's dataclass, checking names and types.

    Args:
        path: the file, for messages.
        name: of the section.
        cls: the dataclass.
        values: what the file says.

    Raises:
        CherryError: naming the key.
    """
    if not isinstance(values, dict):
        raise CherryError(f"{path}: {name} must hold keys and values")
    known = {f.name: f for f in dataclasses.fields(cls)}
    types_ = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in known:
            raise CherryError(f"{path}: unknown key {name}.{key}{nearest(key, known)}")
        values = {**values, key: _typed(path, f"{name}.{key}", types_[key], value)}
    missing = [k for k, f in known.items() if f.default is dataclasses.MISSING and k not in values]
    if missing:
        raise CherryError(f"{path}: {name}.{missing[0]} is missing")
    with naming(path):
        return cls(**values)


def _typed(path: Path, name: str, kind: Any, value: Any) -> Any:
    """A YAML value as the annotated type: str, int, float, bool, Literal, tuple of int, or None."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, list) and all(type(v) is int for v in value):
        return tuple(value)
    if origin is typing.Literal:
        return value
    if origin is None and (type(value) is kind or (kind is float and type(value) is int)):
        return kind(value)
    expected = "a list of whole numbers" if origin is tuple else kind.__name__
    raise CherryError(f"{path}: {name} is {value!r}; expected {expected}")


def plain(value: Any) -> Any:
    """The same with lists for tuples, at any depth, as YAML and JSON have it."""
    if isinstance(value, dict):
        return {key: plain(found) for key, found in value.items()}
    return [plain(found) for found in value] if isinstance(value, tuple | list) else value
