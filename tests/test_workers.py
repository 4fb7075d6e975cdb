"""Worker processes that answer, refuse, and die."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest

from cherry_megatron import workers
from cherry_megatron.errors import CherryError


def adder(first: int) -> Callable[[int], int]:
    def add(second: int) -> int:
        if second < 0:
            raise CherryError(f"{second} is negative")
        if second == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return first + second

    return add


def refuser() -> Callable[[], None]:
    raise CherryError("nothing to work with")


def test_answers_come_back_and_refusals_are_raised():
    with workers.worker_processes(2, adder, 10) as submit:
        futures = [submit(number) for number in range(1, 30)]
        assert [future.result() for future in futures] == list(range(11, 40))
        with pytest.raises(CherryError, match="-1 is negative"):
            submit(-1).result()
        assert submit(5).result() == 15
    assert not multiprocessing.active_children()


def masked() -> Callable[[], bool]:
    return lambda: signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def first_workers() -> None:
    with workers.worker_processes(2, masked) as submit:
        print([submit().result() for _ in range(4)], masked()())


def test_ctrl_c_does_not_reach_a_worker_even_while_it_imports():
    """Its imports would end in a traceback; it has what the process that started it had blocked.

    The first start of a process starts the tracker of resources too, which lets Ctrl-C through.
    """
    command = [sys.executable, "-c", "from tests.test_workers import first_workers; first_workers()"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert said.strip() == f"{[True] * 4} False"


def test_a_worker_that_cannot_begin_says_why():
    with workers.worker_processes(1, refuser) as submit, pytest.raises(CherryError, match="nothing to work with"):
        submit().result()


def test_a_worker_that_is_killed_is_noticed():
    with (
        workers.worker_processes(1, adder, 10) as submit,
        pytest.raises(CherryError, match="a worker process died"),
    ):
        submit(0).result()
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_in_the_middle_of_its_answer_is_noticed():
    idle: SimpleQueue[Any] = SimpleQueue()
    ours, theirs = multiprocessing.Pipe()
    idle.put(ours)
    os.write(theirs.fileno(), (1000).to_bytes(4) + b"the first bytes of a thousand")
    theirs.close()
    for _ in range(2):  # others that find the worker dead must not wait for it either
        with pytest.raises(CherryError, match="a worker process died"):
            workers._ask(idle, [])
