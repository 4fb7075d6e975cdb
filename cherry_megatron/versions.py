"""Which code this is: the commit and the versions of what it stands on."""

import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

_RECORDED = (
    "cherry-megatron",
    "megatron-core",
    "torch",
    "transformer-engine",
    "tokenizers",
    "transformers",
    "numpy",
)


def installed_version(distribution: str) -> str | None:
    """A distribution's version, or None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """The versions that a record names."""
    return {name: version for name in _RECORDED if (version := installed_version(name))}


def git_state() -> dict[str, Any]:
    """Commit of this code and whether the tree differs from it; empty outside a repository."""
    root = Path(__file__).parent

    def git(*args: str) -> str | None:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "modified": bool(git("status", "--porcelain"))} if commit else {}
