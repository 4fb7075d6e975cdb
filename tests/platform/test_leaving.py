"""A training that fails ends, whatever of it is still alive."""

import os
import sys
import threading
from pathlib import Path

from tests.conftest import _CONTEXT


def _fail(path: Path, said: Path) -> None:
    from cherry_megatron import cli
    from cherry_megatron.objective import Objective

    def forward_step(*_):
        raise RuntimeError("out of memory")

    Objective.forward_step = forward_step
    threading.Thread(target=threading.Event().wait).start()  # the interpreter would wait for it
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with said.open("w") as out:
        os.dup2(out.fileno(), 2)
    sys.stderr = os.fdopen(2, "w")
    cli.program(["pretrain", "--config", str(path)])


def test_a_failed_training_does_not_stay(tmp_path, write_config):
    path = write_config(tmp_path)
    process = _CONTEXT.Process(target=_fail, args=(path, tmp_path / "said"))
    process.start()
    process.join(120)
    ended = process.exitcode
    process.kill()
    assert ended == 1
    assert "RuntimeError: out of memory" in (tmp_path / "said").read_text()
