"""alarms.jsonl of a run's folder: what was noticed and what was done, a line each.

time, iteration, text and kind: skip, rewind, stop (monitor/guards.py), hang (platform/watchdog.py), straggler,
expert, loops, fallback (loading.py; its iteration is the step gone back to). A rewind has checkpoint, the step gone
back to, and leaves_out, the steps whose batches are left out.
"""

import datetime
from pathlib import Path
from typing import Any

from cherry_megatron.files import add_line, read_lines

ALARMS = "alarms.jsonl"


def record_alarm(run: Path, kind: str, text: str, iteration: int, **details: Any) -> None:
    """Add a line, which is on the disk when this returns."""
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    add_line(run / ALARMS, {"time": time, "iteration": iteration, "kind": kind, "text": text, **details})


def read_alarms(run: Path) -> list[dict[str, Any]]:
    """All lines, the oldest first; of a hang, which every rank tells, one."""
    path, found = run / ALARMS, list[dict[str, Any]]()
    for alarm in read_lines(path) if path.exists() else ():
        if not (found and alarm["kind"] == "hang" and _place(alarm) == _place(found[-1])):
            found.append(alarm)
    return found


def _place(alarm: dict[str, Any]) -> tuple[str, int]:
    return alarm["kind"], alarm["iteration"]
