"""A training ends, whatever of it is still alive."""

import io
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from cherry_megatron.platform.leaving import end_on_user_signal
from tests.conftest import _CONTEXT

ERRORS = {
    "error": (RuntimeError("out of memory"), 1, "RuntimeError: out of memory"),
    "no Exception": (BaseException("no checkpoint"), 1, "BaseException: no checkpoint"),
    "exit": (SystemExit(17), 17, ""),
    "said": (SystemExit("enough"), 1, "enough"),
    "well": (None, 0, ""),
}


def _fail(path: Path, said: Path, error: BaseException | None) -> None:
    from cherry_megatron import cli
    from cherry_megatron.objective import Objective

    def forward_step(*_):
        raise error

    if error is not None:
        Objective.forward_step = forward_step
    threading.Thread(target=threading.Event().wait).start()  # the interpreter would wait for it
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with said.open("w") as out:
        os.dup2(out.fileno(), 2)
    sys.stderr = os.fdopen(2, "w")
    cli.program(["pretrain", "--config", str(path), "--set", "megatron.train-iters=3"])


@pytest.mark.parametrize("name", ERRORS)
def test_a_training_that_is_over_does_not_stay(name, tmp_path, write_config):
    error, status, text = ERRORS[name]
    path = write_config(tmp_path)
    process = _CONTEXT.Process(target=_fail, args=(path, tmp_path / "said", error))
    process.start()
    process.join(120)
    ended = process.exitcode
    process.kill()
    assert ended == status
    assert text in (tmp_path / "said").read_text()


def _interrupt_twice(said: Path) -> None:
    """Once in a verb, again while that is told, at the very end, and when what the verb has open is taken apart."""
    from cherry_megatron import cli
    from cherry_megatron.monitor import status

    class Told(io.StringIO):
        def write(self, text: str) -> int:
            with said.open("a") as out:
                out.write(text)
            signal.raise_signal(signal.SIGINT)
            return len(text)

        def flush(self) -> None:
            signal.raise_signal(signal.SIGINT)

    class Loader:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def interrupted(*_: object) -> None:
        opened = Loader()
        signal.raise_signal(signal.SIGINT)
        del opened

    signal.signal(signal.SIGINT, signal.default_int_handler)
    status.status = interrupted  # type: ignore[assignment]
    threading.Thread(target=threading.Event().wait).start()
    reading, writing = os.pipe()
    os.close(reading)  # by the same Ctrl-C
    sys.unraisablehook = lambda found: said.write_text(str(found))
    sys.stdout, sys.stderr = os.fdopen(writing, "w"), Told()
    print("to be read")
    cli.program(["status", "run"])


def test_two_interrupts_are_one_line(tmp_path):
    process = _CONTEXT.Process(target=_interrupt_twice, args=(tmp_path / "said",))
    process.start()
    process.join(60)
    ended = process.exitcode
    process.kill()
    assert ended == 130
    assert (tmp_path / "said").read_text().strip() == "cherry status: interrupted"


def test_user_signal_is_a_request_to_end():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    heard = []
    try:
        signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
        end_on_user_signal()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
