"""`cherry board`: TensorBoard on one or several runs, each under its own name."""

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from cherry_megatron.errors import CherryError

EVENTS = "tensorboard"  # where a run's folder has them
_PAGE = "#custom_scalars"


def find_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """Name -> folder of events, of runs and of those below folders of runs.

    Names are paths below the innermost folder that has all of the runs in it.

    Raises:
        CherryError: if there is nothing to show in one.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise CherryError(f"{folder} is no folder; name the folder of a run, or one with runs in it")
        events = sorted(path for path in _below(folder.absolute()) if any(path.glob("events.out.tfevents.*")))
        if not events:
            raise CherryError(
                f"{folder} has no {EVENTS}/ with events, nor has a folder in it, so nothing has trained there; "
                "name the `run` of a configuration that has"
            )
        found += events
    runs = {path.parent: path for path in found}
    for run in runs:
        if outer := next((other for other in runs if other in run.parents), None):
            raise CherryError(f"{run} lies in the folder of the run {outer}; name one of them")
    shared = Path(os.path.commonpath([run.parent for run in runs]))
    return {str(run.relative_to(shared)): events for run, events in runs.items()}


def _below(folder: Path) -> list[Path]:
    """The folders of events of a run, or of the runs below a folder: inside a run there are no others."""
    if (folder / EVENTS).is_dir():
        return [folder / EVENTS]
    inside = (Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    return [events for path in inside for events in _below(path)]


def serve(folders: Sequence[Path], host: str, port: int) -> None:
    """Serve TensorBoard until Ctrl-C or SIGTERM.

    Args:
        folders: of runs, or with runs in them.
        host: name or address to listen on.
        port: to listen on; 0 takes a free one.

    Raises:
        CherryError: bad input, or the port is taken.
    """
    runs = find_runs(folders)
    _check_address(host, port)
    from tensorboard import default, program

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="cherry-board-") as links:
        for name, events in runs.items():
            link = Path(links, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(events)
        server = program.TensorBoard(default.get_plugins())
        server.configure(argv=[None, "--logdir", links, "--host", host, "--port", str(port)])
        url = server.launch()
        print(f"{len(runs)} run(s): {', '.join(runs)}\n{url}{_PAGE}\nCtrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


def _check_address(host: str, port: int) -> None:
    """See that TensorBoard can listen there; it would say so in a traceback."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        why = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise CherryError(
            f"cannot listen on --host {host} --port {port} ({why}); choose others, --port 0 takes a free one"
        ) from None
