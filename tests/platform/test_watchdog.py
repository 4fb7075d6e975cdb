"""A step that does not end ends the run, and says where each rank was."""

import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from cherry_megatron.monitor.alarms import read_alarms, record_alarm
from cherry_megatron.platform import watchdog
from cherry_megatron.platform.leaving import AGAIN
from tests.conftest import _CONTEXT

PROGRAM = """
import sys, time
from pathlib import Path
from cherry_megatron.platform import watchdog
watchdog._GRACE = 0.5
watch = watchdog.Watchdog(1, Path(sys.argv[1]), print)
for step in (1, 2):
    watch.begin(f"step {step}")
    time.sleep(0.6)
    watch.end()
time.sleep(1.2)  # an evaluation
def stuck():
    time.sleep(60)
watch.begin("step 3")
print("ready", flush=True)
time.sleep(0.5)
watch.begin("step 4")
stuck()
"""


def test_what_hangs_is_ended_with_its_stack_in_the_log(tmp_path):
    """Not so short steps, what is no step, and a job that is suspended."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "rank0.log")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=30)
    log = (tmp_path / "rank0.log").read_text()
    sentence = "step 4 did not end within 1 s (guards.hang_seconds): ends, see the stacks in logs/rank"
    assert process.returncode == AGAIN
    assert sentence + "0.log" in err and sentence + "0.log" in log and sentence + "*.log" in out
    assert " in stuck" in log and log.count("did not end") == 1


def _hang(rank: int, path: Path, port: int, frozen: str) -> None:
    from megatron.training import get_args

    from cherry_megatron import around_step, cli, pretrain
    from cherry_megatron.objective import Objective

    healthy = Objective.forward_step

    def never_ends_on_one_rank():
        time.sleep(100)

    def forward_step(self, *given):
        if frozen == "step" and rank == 1 and get_args().curr_iteration == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        if not frozen and rank == 0 and get_args().curr_iteration == 2:
            never_ends_on_one_rank()
        return healthy(self, *given)

    def freezes_before(function):
        def call(*given, **named):
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            return function(*given, **named)

        return call

    Objective.forward_step = forward_step
    if frozen in ("build_model", "build_datasets"):
        setattr(pretrain, frozen, freezes_before(getattr(pretrain, frozen)))
        around_step._SECONDS = 0.4  # of 10 minutes
    watchdog._GRACE = 2.0
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    cli.program(["pretrain", "--config", str(path)])


def _two_ranks(path: Path, frozen: str = "") -> list[BaseProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks: list[BaseProcess] = [
        _CONTEXT.Process(target=_hang, args=(rank, path, port, frozen)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    return ranks


def test_every_rank_says_where_it_was(tmp_path, write_config):
    ranks = _two_ranks(write_config(tmp_path, guards={"hang_seconds": 5}))
    for process in ranks:
        process.join(120)
    ends = [process.exitcode for process in ranks]
    assert AGAIN in ends and set(ends) <= {AGAIN, 1}, "one may see the other go, which is an error"
    logs = [(tmp_path / f"run/logs/rank{rank}.log").read_text() for rank in range(2)]
    assert " in never_ends_on_one_rank" in logs[0]
    assert "did not end within 5 s" in logs[1] and " in never_ends" not in logs[1] and "train_step" in logs[1]
    (alarm,) = read_alarms(tmp_path / "run")
    assert (alarm["kind"], alarm["iteration"]) == ("hang", 3)


def test_a_hang_of_the_rank_that_keeps_the_records_is_recorded(tmp_path, write_config):
    ranks = _two_ranks(write_config(tmp_path, guards={"hang_seconds": 3}), "step")
    ranks[0].join(120)
    ranks[1].kill()
    ranks[1].join()
    assert ranks[0].exitcode == AGAIN
    (alarm,) = read_alarms(tmp_path / "run")
    assert (alarm["kind"], alarm["iteration"]) == ("hang", 3)


@pytest.mark.parametrize(
    ("where", "what"),
    [("build_model", "building and loading the model"), ("build_datasets", "building the data sets")],
)
def test_a_rank_that_is_frozen_before_the_first_step(where, what, tmp_path, write_config):
    """Also where a step may take for ever as far as this test goes."""
    ranks = _two_ranks(write_config(tmp_path), where)
    ranks[0].join(120)
    assert ranks[1].is_alive()
    ranks[1].kill()
    ranks[1].join()
    assert ranks[0].exitcode == AGAIN
    (alarm,) = read_alarms(tmp_path / "run")
    assert (alarm["kind"], alarm["iteration"]) == ("hang", 0)
    told = (
        f"{what} did not end within 4 s (nine tenths of distributed-timeout-minutes): ends, see the stacks in logs/"
    )
    assert alarm["text"] == f"{told}rank*.log"
    log = (tmp_path / "run/logs/rank0.log").read_text()
    assert told in log and " in _pretrain" in log


def test_a_hang_that_every_rank_tells_is_one(tmp_path):
    for kind, step in (("skip", 3), ("skip", 3), ("hang", 3), ("hang", 3), ("hang", 4)):
        record_alarm(tmp_path, kind, "", step)
    told = [(alarm["kind"], alarm["iteration"]) for alarm in read_alarms(tmp_path)]
    assert told == [("skip", 3), ("skip", 3), ("hang", 3), ("hang", 4)]
