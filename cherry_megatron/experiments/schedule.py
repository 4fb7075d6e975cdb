"""Runs tasks in order on a number of slots, until all is done, or it is told to stop."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cherry_megatron.errors import CherryError
from cherry_megatron.experiments.plan import OUTPUTS, Task
from cherry_megatron.experiments.records import Records, results
from cherry_megatron.versions import git_state

PROGRAM = (sys.executable, "-m", "cherry_megatron.cli")
_POLL = 0.1  # seconds


@dataclass(frozen=True)
class Slot:
    """Where one task at a time runs: its number, a device's name, and the variables that choose it."""

    number: int
    device: str
    environment: dict[str, str]


@dataclass
class _Running:
    """A task that has begun."""

    task: Task
    slot: Slot
    log: BinaryIO
    began: float
    process: subprocess.Popen[bytes]


class Schedule:
    """Tasks and slots: the first task that is ready goes to the first slot that is free.

    Args:
        out: the experiment's folder.
        tasks: in order.
        definitions: of the tasks.
        records: of the folder.
        slots: where tasks run.
        ends: the time of time.monotonic() to stop at.
        program: the command that takes a verb.
    """

    def __init__(
        self,
        out: Path,
        tasks: list[Task],
        definitions: dict[str, str],
        records: Records,
        slots: list[Slot],
        ends: float,
        program: Sequence[str],
    ) -> None:
        self._out, self._tasks, self._definitions, self._records = out, tasks, definitions, records
        self._ends, self._program = ends, program
        self._waiting = _to_do(out, tasks, definitions, records)
        self._free = list(slots)
        self._running: list[_Running] = []
        self._failed: dict[str, str] = {}  # task -> why
        self._signals = 0
        self._stopping = False

    def run(self) -> int:
        """Run all that can be; returns the exit status, see run.py."""
        began, before = time.monotonic(), len(self._tasks) - len(self._waiting)
        print(f"{len(self._tasks)} tasks, {before} done before, {len(self._free)} at once", flush=True)
        with self._listening():
            try:
                while self._begin_ready() or self._running:
                    time.sleep(_POLL)
                    self._stop_if_asked()
                    for running in list(self._running):
                        self._look_at(running)
            finally:
                for running in self._running:  # a second signal
                    os.killpg(running.process.pid, signal.SIGKILL)
                    running.process.wait()
        return self._summary(time.monotonic() - began)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C stop in order; a second one at once."""

        def hear(*_: Any) -> None:
            self._signals += 1
            if self._signals > 1:
                raise KeyboardInterrupt

        before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_if_asked(self) -> None:
        if self._stopping or not (self._signals or time.monotonic() >= self._ends):
            return
        self._stopping = True
        names = ", ".join(running.task.name for running in self._running)
        print(f"{_clock()}  stopping, waiting for {names or 'nothing'}", flush=True)
        for running in self._running:
            running.process.terminate()

    def _begin_ready(self) -> bool:
        """Start what can start; whether something was."""
        started = False
        while self._free and not self._stopping:
            undone = {task.name for task in self._waiting} | {r.task.name for r in self._running} | {*self._failed}
            task = next((task for task in self._waiting if not undone & {*task.needs}), None)
            if task is None:
                break
            self._waiting.remove(task)
            self._begin(task, min(self._free, key=lambda slot: slot.number))
            started = True
        return started

    def _begin(self, task: Task, slot: Slot) -> None:
        self._put(task, slot, 0.0, finished=False)
        if OUTPUTS[task.stage.verb] != "run" and (self._out / task.name).exists():
            # It is there whole or not at all; what had begun it was killed before it could say so.
            self._end(task, slot, 0.0, "")
            return
        print(f"{_clock()}  {task.name} starts on {slot.device}", flush=True)
        log = _log(self._out, task)
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("ab")
        process = self._start(task, slot, file)
        self._running.append(_Running(task, slot, file, time.monotonic(), process))
        self._free.remove(slot)

    def _start(self, task: Task, slot: Slot, log: BinaryIO) -> subprocess.Popen[bytes]:
        command = [*self._program, task.stage.verb, *task.arguments(self._out)]
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        # One process a task, whatever this one was started by; see platform/machine.py for the port.
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**_own_environment(), **alone, **address, **slot.environment},
            start_new_session=True,  # Ctrl-C is for the one that waits
        )

    def _look_at(self, running: _Running) -> None:
        status = running.process.poll()
        if status is None:
            return
        running.log.close()
        self._running.remove(running)
        self._free.append(running.slot)
        problem = f"exit status {status}: {_last_line(_log(self._out, running.task))}" if status else ""
        self._end(running.task, running.slot, time.monotonic() - running.began, problem)

    def _end(self, task: Task, slot: Slot, seconds: float, problem: str) -> None:
        """Record and say how a task ended; `problem` is empty if its commands ended well."""
        found: dict[str, Any] = {}
        if not problem:
            try:
                found = results(task.stage.verb, self._out / task.name)
            except CherryError as error:
                problem = str(error)
            except (OSError, ValueError, LookupError) as error:  # one task's odd files must not end the others
                problem = f"its folder does not hold what it should ({type(error).__name__}: {error})"
        self._put(task, slot, seconds, finished=not problem, **found)
        if not problem:
            said = f"done, {_last_loss(found)}"
        elif self._stopping:
            self._waiting.append(task)
            said = "stopped, "
        else:
            self._failed[task.name] = problem
            said = f"failed ({problem}), "
        print(f"{_clock()}  {task.name} {said}{seconds:.0f} s", flush=True)

    def _put(self, task: Task, slot: Slot, seconds: float, finished: bool, **found: Any) -> None:
        definition, before = self._definitions[task.name], self._records.by_task.get(task.name, {})
        goes_on = before.get("definition") == definition and not before["finished"]
        record = {
            "stage": task.stage.name,
            "label": task.stage.label,
            "seed": task.seed,
            "verb": task.stage.verb,
            "finished": finished,
            "definition": definition,
            "command": shlex.join(["cherry", task.stage.verb, *task.arguments(Path())]),
            **git_state(),
            "device": slot.device,
            "seconds": round(seconds + (before["seconds"] if goes_on else 0.0), 3),
            **found,
        }
        self._records.put(task.name, record)

    def _summary(self, seconds: float) -> int:
        left = [task.name for task in self._tasks if task in self._waiting]
        done = len(self._tasks) - len(left) - len(self._failed)
        print(f"{done} of {len(self._tasks)} tasks are done, {len(self._failed)} failed, {seconds:.0f} s")
        for name, why in self._failed.items():
            print(f"failed: {name}: {why}")
        if left:
            print(f"left: {', '.join(left)}")
        if self._stopping and left:
            return 3
        return 1 if self._failed else 0


def _to_do(out: Path, tasks: list[Task], definitions: dict[str, str], records: Records) -> list[Task]:
    """The tasks that are not done, and those that are but whose folder is gone and is needed."""
    by_name = {task.name: task for task in tasks}
    wanted = [name for name in by_name if not records.finished(name, definitions[name])]
    for name in wanted:  # which grows meanwhile
        wanted += [need for need in by_name[name].needs if need not in wanted and not (out / need).exists()]
    return [task for task in tasks if task.name in wanted]


def _log(out: Path, task: Task) -> Path:
    return out / f"{task.name}.log"


def _own_environment() -> dict[str, str]:
    """Without what torchrun leaves: with it a process looks for the store of the one that it was started by."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _last_loss(found: dict[str, Any]) -> str:
    if not found.get("evaluations"):
        return ""
    losses = found["evaluations"][-1]["losses"]
    return f"loss {losses[max(losses, key=int)]:.4f}, "


def _clock() -> str:
    return time.strftime("%H:%M:%S")
