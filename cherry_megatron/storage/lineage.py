"""Where a checkpoint comes from: its manifest, its identity, and the record of how it was made.

- manifest.json: SHA-256 of the values of every stored chunk of every tensor
- lineage.json: the operation, its configuration, code and data, and the records of the parents, whole, so that
  the chain can be told when the parents are gone

A checkpoint's identity is the SHA-256 of its manifest. One that was saved without a manifest is hashed while it
is read: its identity then covers what was read, and the record calls it partial.
"""

import datetime
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cherry_megatron.errors import CherryError
from cherry_megatron.versions import git_state, installed_versions

MANIFEST, LINEAGE = "manifest.json", "lineage.json"
FORMAT = 1
# What makes other layers of some: two results of one source have no layer in common.
MAKES_LAYERS = ("compress-depth", "expand")
# tensor -> the chunk's place in it -> SHA-256
Manifest = dict[str, dict[str, str]]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint, or None if it has none.

    Raises:
        CherryError: if it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        tensors: Manifest = json.loads(path.read_text(encoding="utf-8"))["tensors"]
        if not all(isinstance(chunks, dict) for chunks in tensors.values()):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CherryError(f"{path} is damaged; restore the checkpoint") from None
    return tensors


def manifest_text(tensors: Manifest) -> str:
    """The content of manifest.json; its SHA-256 is the identity."""
    return json.dumps({"format": FORMAT, "algorithm": "sha256", "tensors": tensors}, sort_keys=True, indent=0)


def identity(tensors: Manifest) -> str:
    """What a checkpoint with these tensors is called."""
    return hashlib.sha256(manifest_text(tensors).encode()).hexdigest()


# What every record has, what one that is among the parents of another has besides, and what one may have.
_RECORD: dict[str, type[Any]] = {"operation": str, "identity": str, "parents": list}
_PARENT: dict[str, type[Any]] = {"path": str}
_DETAILS: dict[str, type[Any]] = {"role": str, "git": dict, "recurrence": dict, "expert": int, "options": dict}
_NAMES: dict[type[Any], str] = {str: "a text", list: "a list", dict: "keys and values", int: "a number"}


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """The record of a checkpoint, or None if it has none.

    Raises:
        CherryError: if it is damaged, naming the first key of it or of an ancestor that is not what it should be.
    """
    path = folder / LINEAGE
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _check(found, "", _RECORD)
    except (OSError, ValueError, RecursionError) as error:
        raise CherryError(f"{path} is damaged ({error}); restore the checkpoint") from None
    return found


def _check(entry: Any, place: str, kinds: dict[str, type[Any]]) -> None:
    """See that a record and all in it have what the rest of this project reads.

    Args:
        entry: the record.
        place: its key in the whole, with a point behind; nothing for the whole itself.
        kinds: the keys that it must have, and their types.

    Raises:
        ValueError: naming the key.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{place.rstrip('.') or 'the whole'} is {_short(entry)}, not a record")
    needed = {*kinds, "expert"} if entry.get("operation") == "extract-expert" else {*kinds}
    for key, kind in (_DETAILS | kinds).items():
        if (key in needed or key in entry) and not isinstance(entry.get(key), kind):
            raise ValueError(f"{place}{key} is {_short(entry.get(key))}, not {_NAMES[kind]}")
    settings = entry.get("config")
    if isinstance(settings, dict) and not isinstance(settings.get("recurrence", {}), dict):
        raise ValueError(f"{place}config.recurrence is {_short(settings['recurrence'])}, not {_NAMES[dict]}")
    for number, before in enumerate(entry["parents"]):
        _check(before, f"{place}parents[{number}].", _RECORD | _PARENT)


def _short(value: Any) -> str:
    """A value for a message; what is missing is null there."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."


def record(operation: str, tensors: Manifest, parents: list[dict[str, Any]], **details: Any) -> dict[str, Any]:
    """The record of a new checkpoint.

    Args:
        operation: e.g. pretrain or compress-depth.
        tensors: its manifest.
        parents: records of what it was made from, see `parent`.
        details: configuration, data, plan and so on.
    """
    return {
        "format": FORMAT,
        "operation": operation,
        "identity": identity(tensors),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "versions": installed_versions(),
        **details,
        "parents": parents,
    }


def parent(folder: Path, manifest: Manifest | None, hashes: Manifest) -> dict[str, Any]:
    """What a child's record says of a checkpoint that it was made from.

    Args:
        folder: where it lies.
        manifest: its manifest, or None.
        hashes: of what was read of it.
    """
    known = read_lineage(folder) or {"operation": "unknown", "parents": []}
    return {
        **known,
        "identity": identity(hashes if manifest is None else manifest),
        "partial": manifest is None,
        "path": str(folder.absolute()),
    }


def chain(lineage: dict[str, Any], depth: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """A record and all before it, with the number of generations back."""
    yield depth, lineage
    for before in lineage["parents"]:
        yield from chain(before, depth + 1)


def ancestors(lineage: dict[str, Any], expert: str | None = None) -> Iterator[dict[str, Any]]:
    """A record and those before it whose weights became its own, nearest first, back to where its layers were made.

    A teacher is left out, and of a mixture that an expert was taken out of all but what became that expert.

    Args:
        lineage: the record.
        expert: in a mixture of models the role of the one that is followed.
    """
    if expert is None:
        yield lineage
        if lineage["operation"] in MAKES_LAYERS:
            return
    if lineage["operation"] == "extract-expert":
        expert = f"experts.{lineage['expert']}"
    for before in lineage["parents"]:
        role = before.get("role")
        if role != "teacher" and (expert is None or role in (None, expert)):
            yield from ancestors(before, None if role == expert else expert)
