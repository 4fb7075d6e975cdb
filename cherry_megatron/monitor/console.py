"""Keeps the terminal for our own lines: Megatron's output goes to a log file of each rank."""

import contextlib
import io
import logging
import os
import warnings
from pathlib import Path
from types import TracebackType
from typing import TextIO


def hide_warnings() -> None:
    """Keep what libraries warn their developers of from people who train; for every process that imports them."""
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # It warns of a CUDA toolkit without a GPU, which concerns nobody who does not build extensions.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


class Console(io.TextIOBase):
    """Takes the place of sys.stdout and of the root logger's stream while it is entered.

    What comes before `write_to` is held back, because the run's folder is made only after Megatron has
    accepted its flags; if that fails, it goes nowhere.
    """

    def __init__(self) -> None:
        self._targets: list[TextIO] = [io.StringIO()]
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Console":
        self._open.enter_context(contextlib.redirect_stdout(self))
        logging.basicConfig(stream=self, force=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.basicConfig(force=True)
        with contextlib.suppress(OSError):
            self._open.close()

    def write_to(self, log: Path, also: TextIO | None = None) -> None:
        """Append to a file from here on, and to a second stream if there is one."""
        held = self._targets[0]
        assert isinstance(held, io.StringIO)
        self._targets = [self._open.enter_context(log.open("a", encoding="utf-8", buffering=1))]
        if also is not None:
            self._targets.append(also)
        self.write(held.getvalue())

    def write(self, text: str) -> int:
        log, *also = self._targets
        with contextlib.suppress(OSError):  # a full disk is told by what is lost there
            log.write(text)
        for target in also:
            target.write(text)
        return len(text)

    def flush(self) -> None:
        log, *also = self._targets
        with contextlib.suppress(OSError):
            log.flush()
        for target in also:
            target.flush()
