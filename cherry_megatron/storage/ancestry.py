"""The records of checkpoints: written when training saves one, told and verified by `cherry lineage`."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cherry_megatron.errors import CherryError
from cherry_megatron.files import write_atomically
from cherry_megatron.storage.checkpoint import Checkpoint, open_checkpoint
from cherry_megatron.storage.integrity import THREADS, damage
from cherry_megatron.storage.lineage import (
    LINEAGE,
    MANIFEST,
    Manifest,
    chain,
    identity,
    manifest_text,
    parent,
    read_lineage,
    read_manifest,
    record,
)
from cherry_megatron.storage.weights import Weights, is_weights


def parents_of(loaded: Path | None, own: bool) -> list[dict[str, Any]]:
    """The records of what a training starts from.

    Args:
        loaded: the checkpoint that it loads, or None.
        own: whether that is the run's own: then it is not a parent, but its parents are.

    Raises:
        CherryError: if it is damaged.
    """
    if loaded is None:
        return []
    if own:
        parents: list[dict[str, Any]] = (read_lineage(loaded) or {"parents": []})["parents"]
        return parents
    source = Checkpoint(loaded)
    return [parent(loaded, source.manifest, {} if source.manifest else hash_all(source, source.model))]


def record_saved(
    folder: Path, operation: str, manifest: Manifest, parents: list[dict[str, Any]], **details: Any
) -> None:
    """Write manifest and lineage into a checkpoint folder that training is about to publish.

    Args:
        folder: it.
        operation: e.g. pretrain.
        manifest: hashes of its tensors.
        parents: from `parents_of`, when the training started: later they may be gone.
        details: what else to record.
    """
    write_atomically(folder / MANIFEST, manifest_text(manifest))
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
        path: see `open_checkpoint`; or weights in the form of Hugging Face.
        verify: read every tensor and every file of it, and compare; of an ancestor that is still there its manifest
            is compared.

    Raises:
        CherryError: if the checkpoint or an ancestor is not what its record says.
    """
    checkpoint = Weights(path) if is_weights(path) else open_checkpoint(path)
    lineage = read_lineage(checkpoint.folder)
    if lineage is None:
        raise CherryError(f"{checkpoint.folder} has no {LINEAGE}; only what this project saved has one")
    if checkpoint.manifest is None:
        raise CherryError(f"{checkpoint.folder}/{MANIFEST} is missing; restore it")
    if identity(checkpoint.manifest) != lineage["identity"]:
        raise CherryError(f"{checkpoint.folder}: {MANIFEST} and {LINEAGE} do not belong together; restore them")
    if verify:
        verify_whole(checkpoint)
    lines = []
    for depth, entry in chain(lineage):
        known = str(checkpoint.folder) if depth == 0 else entry["path"]
        state = ("verified" if verify else "not verified") if depth == 0 else _ancestor(Path(known), entry)
        made = f"{entry.get('role', '')} {entry['operation']}{_at(entry)}".lstrip()
        made = f"{entry['identity'][:12]}  {made:<26}  {_code(entry)}  {known}  "
        lines.append(f"{'  ' * depth}{made}{how(entry)}({state})")
    return lines


def how(entry: dict[str, Any]) -> str:
    """How a record's compression was made, and what its start had `changed`; with spaces behind."""
    options, found = entry.get("options", {}), []
    if {"method", "groups"} <= {*options}:
        found.append(f"{options['method']}, groups {options['groups']}")
        found += [f"align {options['align']}"] if options.get("align", "none") != "none" else []
    config = entry.get("config")
    changed = config.get("changed") if isinstance(config, dict) else None
    if isinstance(changed, list) and changed:
        found.append(f"changed {' '.join(map(str, changed))}")
    return f"{', '.join(found)}  " if found else ""


def _at(entry: dict[str, Any]) -> str:
    return f" step {entry['iteration']}" if "iteration" in entry else ""


def _code(entry: dict[str, Any]) -> str:
    git = entry.get("git", {})
    modified = "+" if git.get("modified") else ""
    # An installed package has no commit.
    code = str(git.get("commit") or entry.get("versions", {}).get("cherry-megatron"))
    return f"{entry.get('time', 'at an unknown time')}  code {code[:10]}{modified}"


def verify_whole(checkpoint: Checkpoint) -> None:
    """Read every tensor of a checkpoint that has a manifest, and compare; of Megatron's form every file too.

    Raises:
        CherryError: naming the first that is not what was saved.
    """
    assert checkpoint.manifest is not None
    missing = sorted(checkpoint.manifest.keys() ^ checkpoint.tensors.keys())
    if missing:
        raise CherryError(
            f"{checkpoint.folder}: the tensor {missing[0]} is not both in {MANIFEST} and in .metadata"
        )
    checkpoint.check(list(checkpoint.tensors))
    hash_all(checkpoint, tqdm(checkpoint.tensors, unit="tensor", desc="verify", disable=None))
    # Of all files, what is no tensor in them too. Weights lie among files that people change, such as the card.
    if not isinstance(checkpoint, Weights) and (why := damage(checkpoint.folder)):
        raise CherryError(f"{why}; restore the checkpoint")


def _ancestor(folder: Path, entry: dict[str, Any]) -> str:
    """Whether an ancestor is still where it was, and still the same."""
    if not (folder / ".metadata").is_file() and not is_weights(folder):
        return "no longer there"
    if entry.get("partial"):
        return "had no manifest: identity of what was read of it"
    manifest = read_manifest(folder)
    if manifest is None or identity(manifest) != entry["identity"]:
        raise CherryError(
            f"{folder} is no longer the checkpoint {entry['identity'][:12]} that this one was made from"
        )
    return "there, same manifest"
