"""Which code this is: the commit and the versions of what it stands on."""

import importlib.metadata
import shutil
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
    """Commit of this code and whether the tree differs from it; empty for an installed package."""
    commit = _git("rev-parse", "HEAD")
    return {"commit": commit.strip(), "modified": bool(_git("status", "--porcelain"))} if commit else {}


def git_difference() -> str:
    """What the tree has otherwise than the commit, as `git diff` prints it; empty for an installed package."""
    return _git("diff", "HEAD") or ""


def _git(*args: str) -> str | None:
    """What git prints of this code's repository; None if there is none, or no git."""
    if shutil.which("git") is None:
        return None
    here = Path(__file__)
    # A virtual environment may lie in a repository of something else, whose commit says nothing of this code.
    for command in (["ls-files", "--error-unmatch", here.name], args):
        done = subprocess.run(["git", "-C", str(here.parent), *command], capture_output=True, check=False)
        if done.returncode:
            return None
    return done.stdout.decode(errors="replace")
