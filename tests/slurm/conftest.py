"""Fixtures of the launchers' tests."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, Unavailable


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A SLURM of 2 nodes with 2 CPUs and 2 stand-in GPUs each."""
    try:
        running = Cluster(nodes=2, cpus=2, gpus=2)
    except Unavailable as why:
        pytest.skip(f"no SLURM here: {why}")
    yield running
    running.stop()
