"""The records of checkpoints: written when training saves one, told and verified by `cherry lineage`."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cherry_megatron.errors import CherryError
from cherry_megatron.files import write_atomically
from cherry_megatron.surgery.checkpoint import Checkpoint, open_checkpoint
from cherry_megatron.surgery.lineage import (
    LINEAGE,
    MANIFEST,
    Manifest,
    chain,
    identity,
    manifest_text,
    parent,
    read_lineage,
    record,
)

THREADS = 8  # reading and hashing both let other threads go on


def record_saved(folder: Path, operation: str, loaded: Path | None, **details: Any) -> None:
    """Write manifest and lineage into a checkpoint folder that training has just saved.

    Args:
        folder: it.
        operation: e.g. pretrain.
        loaded: the checkpoint that the run started from, or None. A run's own earlier checkpoint is not a
            parent: its parents are.
        details: what else to record.
    """
    for name in (MANIFEST, LINEAGE):  # of an older checkpoint that this one was written over
        (folder / name).unlink(missing_ok=True)
    checkpoint = Checkpoint(folder)
    manifest = hash_all(checkpoint, checkpoint.tensors)
    write_atomically(folder / MANIFEST, manifest_text(manifest))
    parents = []
    if loaded is not None and loaded.parent == folder.parent:
        parents = (read_lineage(loaded) or {"parents": []})["parents"]
    elif loaded is not None:
        source = Checkpoint(loaded)
        hashes = {} if source.manifest else hash_all(source, source.model)
        parents = [parent(loaded, source.manifest, hashes)]
    content = record(operation, manifest, parents, **details)
    write_atomically(folder / LINEAGE, json.dumps(content, indent=1, ensure_ascii=False))


def hash_all(checkpoint: Checkpoint, names: Iterable[str]) -> Manifest:
    """Read tensors and hash them; compares with the manifest if there is one.

    Raises:
        CherryError: if one cannot be read or is not what was saved.
    """
    checkpoint.read_hashes = {}
    with ThreadPoolExecutor(THREADS) as threads:
        # One after the other within a thread: what was read is dropped at once.
        for _ in threads.map(lambda name: checkpoint.read(name).size, names):
            pass
    return dict(checkpoint.read_hashes)


def describe(path: Path, verify: bool) -> list[str]:
    """The chain of a checkpoint's ancestors, a line each, newest first.

    Args:
        path: see `open_checkpoint`.
        verify: read every tensor of it, and compare; of an ancestor that is still there its manifest is compared.

    Raises:
        CherryError: if the checkpoint or an ancestor is not what its record says.
    """
    checkpoint = open_checkpoint(path)
    lineage = read_lineage(checkpoint.folder)
    if lineage is None:
        raise CherryError(f"{checkpoint.folder} has no {LINEAGE}; only what this project saved has one")
    if checkpoint.manifest is None:
        raise CherryError(f"{checkpoint.folder}/{MANIFEST} is missing; restore it")
    if identity(checkpoint.manifest) != lineage["identity"]:
        raise CherryError(f"{checkpoint.folder}: {MANIFEST} and {LINEAGE} do not belong together; restore them")
    if verify:
        _verify(checkpoint)
    lines = []
    for depth, entry in chain(lineage):
        known = str(checkpoint.folder) if depth == 0 else entry["path"]
        state = ("verified" if verify else "not verified") if depth == 0 else _ancestor(Path(known), entry)
        made = f"{entry['operation']}{_at(entry)}"
        lines.append(f"{'  ' * depth}{entry['identity'][:12]}  {made:<26}  {_code(entry)}  {known}  ({state})")
    return lines


def _at(entry: dict[str, Any]) -> str:
    return f" step {entry['iteration']}" if "iteration" in entry else ""


def _code(entry: dict[str, Any]) -> str:
    git = entry.get("git", {})
    modified = "+" if git.get("modified") else ""
    return f"{entry.get('time', 'at an unknown time')}  code {str(git.get('commit'))[:10]}{modified}"


def _verify(checkpoint: Checkpoint) -> None:
    assert checkpoint.manifest is not None
    missing = sorted(checkpoint.manifest.keys() ^ checkpoint.tensors.keys())
    if missing:
        raise CherryError(
            f"{checkpoint.folder}: the tensor {missing[0]} is not both in {MANIFEST} and in .metadata"
        )
    checkpoint.check(list(checkpoint.tensors))
    hash_all(checkpoint, tqdm(checkpoint.tensors, unit="tensor", desc="verify", disable=None))


def _ancestor(folder: Path, entry: dict[str, Any]) -> str:
    """Whether an ancestor is still where it was, and still the same."""
    if not (folder / ".metadata").is_file():
        return "no longer there"
    if entry.get("partial"):
        return "had no manifest: identity of what was read of it"
    manifest = Checkpoint(folder).manifest
    if manifest is None or identity(manifest) != entry["identity"]:
        raise CherryError(
            f"{folder} is no longer the checkpoint {entry['identity'][:12]} that this one was made from"
        )
    return "there, same manifest"
