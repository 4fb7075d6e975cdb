"""Worker processes, each with a pipe of its own.

The pools of the standard library share one pipe among their processes: one that is killed while it writes
there leaves half a message, and the run waits for the other half for ever.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from cherry_megatron.errors import CherryError

Submit = Callable[..., "Future[Any]"]


@contextmanager
def worker_processes(count: int, prepare: Callable[..., Callable[..., Any]], *arguments: Any) -> Iterator[Submit]:
    """Start processes that work until the block ends, or until this process does.

    Args:
        count: of processes.
        prepare: called once in each with `arguments`, returns the function that answers requests.

    Returns:
        `submit(*request)`, which gives a future of the answer. Its result raises CherryError if the function
        did, or if the process died.
    """
    context = multiprocessing.get_context("spawn")
    idle: SimpleQueue[Connection] = SimpleQueue()
    processes = []
    with ThreadPoolExecutor(count) as threads:
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, prepare, arguments), daemon=True)
                with _without_interrupts():
                    process.start()
                theirs.close()  # the process has the only one, so that its end is the pipe's end
                processes.append(process)
                idle.put(ours)
            yield partial(threads.submit, _ask, idle)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
                process.join()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C waits, and for ever in a process that is started here: its imports would end in a traceback."""
    resource_tracker.ensure_running()  # or the first start would, and let Ctrl-C through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ask(idle: SimpleQueue[Connection], *request: Any) -> Any:
    """Have a request answered by a process that has nothing to do; there is one for every thread."""
    process = idle.get()
    try:
        process.send(request)
        answer = process.recv()
    except (OSError, EOFError):
        raise CherryError(
            "a worker process died (perhaps for want of memory); run the same command again to go on, "
            "with fewer --workers"
        ) from None
    finally:
        idle.put(process)
    if isinstance(answer, CherryError):
        raise answer
    return answer


def _has_parent() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and parent.is_alive()


def _serve(parent: Connection, prepare: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    """What a process does: answer what comes through the pipe, until the other side ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says that it was interrupted
    function: Callable[..., Any] | CherryError
    try:
        function = prepare(*arguments)
    except CherryError as error:
        function = error
    with suppress(EOFError, ConnectionError):
        while True:
            request = parent.recv()
            if not _has_parent():
                return  # it was killed, and somebody else may be at the same work now
            try:
                answer = function if isinstance(function, CherryError) else function(*request)
            except CherryError as error:
                answer = error
            except Exception as error:  # of this program's own; the traceback is printed here, where it is whole
                traceback.print_exc()
                answer = CherryError(f"a worker process failed ({type(error).__name__}: {error}); report it")
            parent.send(answer)
