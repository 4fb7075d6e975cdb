"""Ranks that do not find one another say so in one sentence."""

import socket
from pathlib import Path

import pytest
import torch

from cherry_megatron.errors import CherryError
from cherry_megatron.platform.joining import joining
from tests.conftest import run_ranks
from tests.test_bad_input import verb


@pytest.mark.parametrize("error", [torch.distributed.DistStoreError, torch.distributed.DistNetworkError])
@pytest.mark.parametrize(
    ("rank", "says"), [("0", "rank 0 cannot open there:1"), ("1", "rank 1 does not find rank 0")]
)
def test_the_address_is_named(error, rank, says, monkeypatch):
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "there", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CherryError, match=rf"c.yaml: {says}.*start all ranks again"), joining(Path("c.yaml")):
        raise error("timed out")


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="other"), joining(Path("c.yaml")):
        raise RuntimeError("other")


def _alone(path: Path, rank: str, port: str) -> tuple[int, str]:
    import os

    os.environ.update(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2", MASTER_PORT=port)
    return verb(path.parent, ["pretrain", "--config", str(path), "--", "--distributed-timeout-minutes", "1"])


@pytest.mark.full
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_alone_ends_with_a_sentence(rank, tmp_path, write_config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if rank == "0":
            taken.listen()
        port = str(taken.getsockname()[1])
        ((status, errors),) = run_ranks(tmp_path / "output", 1, _alone, write_config(tmp_path), rank, port)
    assert status == 2 and "start all ranks again" in errors and "Traceback" not in errors
    assert not list((tmp_path / "run").glob("checkpoints/*"))
