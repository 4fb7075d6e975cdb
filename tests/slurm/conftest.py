"""Fixtures of the launchers' tests."""

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Unavailable
from tests.slurm.launching import ROOT

# Stands in for `cherry`; what the launchers ask is answered by the real one. A stand-in's ranks may say
# `saved FOLDER STEP`, which makes a checkpoint as far as its place goes, `run` being the run's folder.
STAND_IN = f"""\
#!/bin/bash
export PYTHONPATH='{ROOT}'
[ "$1" != job ] || exec '{sys.executable}' -m cherry_megatron.cli "$@"
eval "run=$(sed -nE 's/^run: ([^ ]*).*/\\1/p' "$3")"
saved() {{
    mkdir -p "$1/iter_$(printf %07d "$2")"
    touch "$1/iter_$(printf %07d "$2")/.metadata"
    echo "$2" >"$1/latest_checkpointed_iteration.txt"
}}
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A SLURM of 3 nodes with 2 CPUs and 2 stand-in GPUs each."""
    try:
        running = Cluster(nodes=3, cpus=2, gpus=2)
    except Unavailable as why:
        pytest.skip(f"no SLURM here: {why}")
    yield running
    running.stop()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Launchers and configurations in a folder of their own, where no cluster.env of the user's counts."""
    root = tmp_path / "the project"
    (root / "slurm").mkdir(parents=True)
    for file in (ROOT / "slurm").glob("*.sh"):
        shutil.copy(file, root / "slurm")
    shutil.copytree(ROOT / "configs", root / "configs")
    return root


@pytest.fixture
def stub(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Makes a bash script that stands in for `cherry` on each rank; returns the environment that names it."""

    def make(text: str) -> dict[str, str]:
        path = tmp_path / "stub.sh"
        path.write_text(STAND_IN + text)
        path.chmod(0o755)
        return {"CHERRY": str(path)}

    return make


@pytest.fixture(scope="session")
def no_slurm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose PATH holds the usual tools and no SLURM."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("bash", "basename", "dirname", "head", "mkdir", "sed", "tr"):
        found = shutil.which(name)
        assert found, f"{name} is missing"
        (folder / name).symlink_to(found)
    return {"PATH": str(folder), "HOME": "/home/someone"}
