"""A step or a part of the start that does not end: the stack of every rank into its log, then the process ends.

Megatron's own timeout (--distributed-timeout-minutes) sees a collective that waits, not what each rank is at.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cherry_megatron.platform.leaving import AGAIN

_GRACE = 15.0  # seconds in which the others write theirs: the first rank to end takes all with it


class Watchdog:
    """Ends this process with status AGAIN if what is watched takes too long.

    It counts seconds in which this process ran, so a job that is suspended is not taken for one that hangs.

    Args:
        seconds: that a step may take; 0 watches nothing.
        log: where the stacks go, also those of a crash (SIGSEGV, or SIGABRT of NCCL's own watchdog).
        expired: is called with what is to be told, before the end.
    """

    def __init__(self, seconds: int, log: Path, expired: Callable[[str], None]) -> None:
        self._seconds, self._log, self._expired = seconds, log, expired
        self._watched: tuple[str, int, str] | None = None
        self._file = log.open("a", encoding="utf-8")
        faulthandler.enable(self._file)
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, what: str, seconds: int | None = None, setting: str = "guards.hang_seconds") -> None:
        """Watch what begins now.

        Args:
            what: it is, in words.
            seconds: that it may take, if not those of a step.
            setting: what says so.
        """
        self._watched = (what, seconds or self._seconds, setting)  # another object each time

    def end(self) -> None:
        """It has ended."""
        self._watched = None

    def _watch(self) -> None:
        tick = min(1.0, self._seconds / 10)
        seen: tuple[str, int, str] | None = None
        left = 0.0
        while True:
            time.sleep(tick)
            if (now := self._watched) is not seen:
                seen, left = now, float(now[1] if now else 0)
            elif seen is not None and (left := left - tick) < 0:
                self._expire(*seen)

    def _expire(self, what: str, seconds: int, setting: str) -> None:
        # First of all: what hangs may be the file system.
        threading.Thread(target=_leave, daemon=True).start()
        text = f"{what} did not end within {seconds} s ({setting}): ends, see the stacks in logs/"
        print(f"cherry: {text}{self._log.name}", file=sys.stderr, flush=True)
        self._file.write(f"\n{text}{self._log.name}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._expired(f"{text}rank*.log")
        threading.Event().wait()


def _leave() -> None:
    time.sleep(_GRACE)
    os._exit(AGAIN)
