"""Trainings and other verbs that are stopped by a signal at a place that is chosen beforehand."""

import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from tests.conftest import _CONTEXT, _rank_main

SIGNALS = ("SIGKILL", "SIGTERM", "SIGUSR1")
WHO = ("one", "all")
PATIENCE = 20  # seconds that the ranks beside one that is gone have to end by themselves


class Trigger:
    """Sends the signal when it was pulled so often.

    Args:
        name: of the signal.
        at: the count.
        who: one, this process, or all that `others` finds besides.
        others: finds them.
    """

    def __init__(self, name: str, at: int, who: str, others: Callable[[], list[int]]) -> None:
        self._signal, self._at, self._who, self._others = getattr(signal, name), at, who, others
        self._counts = count(1)

    def pull(self) -> None:
        if next(self._counts) != self._at:
            return
        for process in self._others() if self._who == "all" else ():
            os.kill(process, self._signal)
        os.kill(os.getpid(), self._signal)

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with a pull before each call."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.pull()
            return function(*args, **kwargs)

        return call

    def at_files(self) -> None:
        """From now on a pull before each change to files: opening to write, renaming, removing, syncing."""

        def watch(event: str, arguments: tuple) -> None:
            writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writing or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.fsync"):
                self.pull()

        fsync = os.fsync

        def audited_fsync(file: int) -> None:
            sys.audit("os.fsync", file)
            fsync(file)

        os.fsync = audited_fsync
        sys.addaudithook(watch)


def _pids(folder: Path, rank: int, world: int) -> list[int]:
    return [int((folder / f"pid{other}").read_text()) for other in range(world) if other != rank]


def _train(path: Path, phase: str, name: str, who: str, victim: int, seed: int, flags: list[str]) -> None:
    rank, world, draw = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), random.Random(seed)
    (path.parent / f"pid{rank}").write_text(str(os.getpid()))
    from cherry_megatron import objective
    from cherry_megatron.cli import main
    from cherry_megatron.platform import saving, steps

    def trigger(at: int) -> Trigger:
        return Trigger(name, at, who, lambda: _pids(path.parent, rank, world))

    if rank == victim:
        if phase == "first step":
            steps._train_step = trigger(1).before(steps._train_step)
        elif phase == "mid-step":
            forward = objective.Objective.forward_step
            objective.Objective.forward_step = trigger(draw.randint(3, 9)).before(forward)
        elif phase == "during save":
            from megatron.core.dist_checkpointing.strategies import filesystem_async

            filesystem_async._write_item = trigger(draw.randint(2, 40)).before(filesystem_async._write_item)
        elif phase == "between shard and tracker":
            publish, chosen = saving._publish, trigger(draw.randint(1, 14))

            def publish_and_watch(*given: Any) -> None:
                chosen.at_files()
                publish(*given)

            saving._publish = publish_and_watch
    main(["pretrain", "--config", str(path), "--", *flags])


def train_and_stop(
    path: Path, world: int, phase: str, name: str, who: str, victim: int, seed: int, flags: str
) -> None:
    """A training of which one rank, or all, get a signal; it returns when all are gone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1] if world > 1 else 0
    queue = _CONTEXT.Queue()
    given = (path, phase, name, who, victim, seed, flags.split())
    ranks = [
        _CONTEXT.Process(
            target=_rank_main,
            args=(rank, world, port, str(path.parent / f"stopped{rank}.out"), _train, given, queue),
        )
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + 120
    while any(rank.is_alive() for rank in ranks):
        if any(rank.exitcode for rank in ranks):
            end = min(end, time.monotonic() + PATIENCE)
        assert time.monotonic() < end or any(rank.exitcode for rank in ranks), "the training hangs"
        if time.monotonic() > end:  # as a launcher does
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)


def _run(arguments: list[str], name: str, who: str, at: int, counts: Any) -> None:
    os.setpgrp()
    from cherry_megatron.cli import main
    from tests.data.conftest import small_parts

    small_parts()

    def children() -> list[int]:
        return [child.pid for child in multiprocessing.active_children() if child.pid]

    trigger = Trigger(name, at, who, children)
    if who == "one":  # a worker, if there are some

        def pull() -> None:
            if next(trigger._counts) == at:
                os.kill((children() or [os.getpid()])[0], getattr(signal, name))

        trigger.pull = pull  # type: ignore[method-assign]
    trigger.at_files()
    status = main(arguments)
    counts.put(next(trigger._counts))
    counts.close()
    counts.join_thread()
    os._exit(status)


def run_and_stop(arguments: list[str], name: str, who: str, at: int) -> tuple[int | None, int]:
    """A verb whose process and its workers, or one of these, get a signal before the at-th change to files.

    Returns:
        The exit status, and how many changes there were; 0 if it did not come to its end.
    """
    counts = _CONTEXT.Queue()
    process = _CONTEXT.Process(target=_run, args=(arguments, name, who, at, counts))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode, 0 if counts.empty() else counts.get()
