"""The end of a process."""

import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

INTERRUPTED = 130  # the exit status after Ctrl-C, as of shells
AGAIN = 75  # the exit status of a training that is to be started again (EX_TEMPFAIL of sysexits.h)


def end_on_user_signal() -> None:
    """Take SIGUSR1, which schedulers send before a time limit, for SIGTERM, on which a training saves and ends."""
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def leave(status: int) -> NoReturn:
    """End this process; one with a process group at once.

    The interpreter would take process group and CUDA graphs apart first. After an error that can wait for
    ever, as it did when a GPU's memory had run out: the job then keeps its GPUs, and the other ranks wait with it.
    After a good end threads of the group's library were now and then still there, and the process was aborted.
    After Ctrl-C too it ends at once: the interpreter would tell of a second one by a traceback.
    """
    distributed = sys.modules.get("torch.distributed")
    if status == INTERRUPTED or (distributed is not None and distributed.is_initialized()):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # who read it may have ended by the same Ctrl-C
                stream.flush()
        os._exit(status)
    sys.exit(status)
