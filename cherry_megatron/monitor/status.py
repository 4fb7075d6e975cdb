"""What a run's folder says of the run, on one screen; also while it is written."""

import datetime
import statistics
import time
from pathlib import Path
from typing import Any

from cherry_megatron.config import outline
from cherry_megatron.errors import CherryError
from cherry_megatron.files import read_lines
from cherry_megatron.jobs.attempts import ATTEMPTS
from cherry_megatron.monitor.alarms import ALARMS, read_alarms
from cherry_megatron.runs import read_evaluations, recent_steps
from cherry_megatron.storage.ancestry import describe
from cherry_megatron.storage.checkpoint import open_checkpoint
from cherry_megatron.storage.lineage import read_lineage
from cherry_megatron.storage.tracker import newest, saved_folder

_STEPS = 50  # the last ones, of which speed and loss are told
_SHOWN = 5  # alarms and restarts


def status(run: Path, verify: bool = False) -> list[str]:
    """Lines to print.

    Args:
        run: its folder.
        verify: read the newest checkpoint and compare its hashes.

    Raises:
        CherryError: if the folder is none of a run, or the checkpoint that is verified is damaged.
    """
    if not (run / "config.yaml").is_file():
        return [_no_training(run)]
    steps = recent_steps(run)
    sections = {
        "run": [str(run)],
        **_progress(run, steps),
        "held out": _held_out(run),
        "saved": _checkpoint(run, verify),
        "starts": _starts(run),
        "alarms": _alarms(run),
    }
    return [
        f"{name if number == 0 else '':<10}{line}"
        for name, lines in sections.items()
        for number, line in enumerate(lines)
    ]


def _no_training(run: Path) -> str:
    """What a folder is that no training has written to."""
    if saved_folder(run) is None and not (run / ".metadata").is_file():
        why = "has no config.yaml yet" if run.exists() else "does not exist"
        raise CherryError(f"{run} is no run's folder: it {why}; name the `run` of a configuration")
    made = read_lineage(open_checkpoint(run).folder) or {}
    by = f"by cherry {made['operation']}, {_ago(made.get('time'))}" if "operation" in made else "elsewhere"
    return f"{run} is a checkpoint made {by}, and nothing has trained in it; `cherry lineage {run}` tells more"


def _progress(run: Path, steps: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Step, speed and loss."""
    flags = outline(run / "config.yaml").megatron
    batch, last = flags.get("global-batch-size"), flags.get("train-iters")
    if last is None and batch and flags.get("train-samples"):
        last = flags["train-samples"] // batch
    of = f" of {last}" if last else ""
    if not steps:
        return {"step": [f"none yet{of}"]}
    done = steps[-1]["iteration"]
    written = time.time() - (run / "steps.jsonl").stat().st_mtime
    told = [f"{done}{of}{f' ({done / last:.1%})' if last else ''}, {_span(written)} ago"]
    recent = steps[-_STEPS:]
    seconds = statistics.median(step["seconds"] for step in recent)
    speed = f"{seconds:.3g} s a step"
    if batch and seconds:
        speed = f"{batch * flags['seq-length'] / seconds:,.0f} tokens/s, {speed}"
    if last and done < last:
        speed += f", left {_span((last - done) * seconds)}"
    found = {"step": told, "speed": [speed], "loss": [_loss(recent)]}
    if ranks := next((step["ranks"] for step in reversed(recent) if "ranks" in step), None):
        found["ranks"] = [
            f"the slowest is {ranks['rank']}: {ranks['slowest']:.3g} s a step, the median {ranks['median']:.3g} s"
        ]
    return found


def _loss(recent: list[dict[str, Any]]) -> str:
    learned = [step for step in recent if "skipped" not in step]
    losses = [step["loss"] if step["loss"] is not None else step.get("selected_loss") for step in learned]
    known = [loss for loss in losses if loss is not None]
    if not known:
        return f"none in the last {len(recent)} steps"
    step = learned[-1]
    mean = f"{known[-1]:.4f}, mean of the last {len(known)} steps {statistics.fmean(known):.4f}"
    return f"{mean}, gradient norm {step['grad_norm'] or 0:.3f}, learning rate {step['learning_rate'] or 0:.2e}"


def _held_out(run: Path) -> list[str]:
    evaluations = read_evaluations(run)
    if not evaluations:
        return ["not evaluated yet"]
    losses = "  ".join(f"{loops}: {loss:.4f}" for loops, loss in evaluations[-1]["losses"].items())
    return [f"loss by loops at step {evaluations[-1]['iteration']}  {losses}"]


def _checkpoint(run: Path, verify: bool) -> list[str]:
    saved = saved_folder(run / "checkpoints")
    if saved is None:
        return ["no checkpoint yet"]
    try:
        folder = newest(saved)
        made = read_lineage(folder)
    except CherryError as error:
        if verify:
            raise
        return [f"damaged: {error}"]
    if verify:
        describe(run, verify=True)
    told = "verified: every tensor has its recorded hash" if verify else "hashes recorded, --verify compares them"
    if made is None:
        told = "without a record of its hashes"
    iteration = int(folder.name.removeprefix("iter_"))
    return [f"step {iteration}, {_ago((made or {}).get('time'))}, {folder}", told]


def _starts(run: Path) -> list[str]:
    """Starts, and of those by a launcher what followed each."""
    path, attempts = run / "starts.jsonl", run / ATTEMPTS
    starts = list(read_lines(path)) if path.exists() else []
    told = ["none recorded"]
    if starts:
        host, ranks = starts[-1].get("host"), starts[-1].get("world_size")
        told = [f"{len(starts)}, the last {_ago(starts[-1].get('time'))} on {host}, {ranks} rank(s)"]
    lines = list(read_lines(attempts)) if attempts.exists() else []
    ended = [line for line in lines if line.get("event") == "end"]
    told += [
        f"job {line.get('job')}, {_ago(line.get('time'))}: {line.get('decision')}, {line.get('reason')}"
        for line in ended[-_SHOWN:]
    ]
    if lines and lines[-1].get("event") == "start":
        told.append(f"job {lines[-1].get('job')}, {_ago(lines[-1].get('time'))}: started, has not ended")
    return told


def _alarms(run: Path) -> list[str]:
    found = read_alarms(run)
    if not found:
        return ["none"]
    told = [f"step {alarm['iteration']}, {_ago(alarm['time'])}: {alarm['text']}" for alarm in found[-_SHOWN:]]
    left = len(found) - len(told)
    return [*told, *([f"and {left} before, see {run / ALARMS}"] if left else [])]


def _ago(when: str | None) -> str:
    """How long ago a recorded time was."""
    try:
        then = datetime.datetime.fromisoformat(str(when))
        return f"{_span((datetime.datetime.now(datetime.UTC) - then).total_seconds())} ago"
    except (ValueError, TypeError):
        return "at an unknown time"


def _span(seconds: float) -> str:
    minutes = max(int(seconds), 0) // 60
    if minutes < 2:
        return f"{max(int(seconds), 0)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
