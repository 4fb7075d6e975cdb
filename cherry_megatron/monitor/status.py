"""What a run's folder says of the run, on one screen; also while it is written."""

import datetime
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cherry_megatron.config import outline
from cherry_megatron.errors import CherryError
from cherry_megatron.files import is_locked, read_lines
from cherry_megatron.jobs.attempts import ATTEMPTS
from cherry_megatron.monitor.alarms import ALARMS, read_alarms
from cherry_megatron.runs import LOCK, read_evaluations, recent_steps, why_lost
from cherry_megatron.storage.ancestry import describe
from cherry_megatron.storage.checkpoint import open_checkpoint
from cherry_megatron.storage.fallback import candidates, step_of, whole
from cherry_megatron.storage.lineage import read_lineage
from cherry_megatron.storage.tracker import newest, saved_folder, why_none

_STEPS = 50  # the last ones, of which speed and loss are told
_SHOWN = 5  # alarms and restarts
_VERIFIED = "verified: every tensor has its recorded hash"
_RUNNING = {
    True: "running",
    False: "not running: no training holds its lock",
    None: f"running or not, which cannot be told: {LOCK} cannot be looked at",
}


def status(run: Path, verify: bool = False) -> tuple[list[str], bool]:
    """Lines to print, and whether no damage to the newest checkpoint was seen.

    Args:
        run: its folder.
        verify: read the newest checkpoint and compare its hashes; else its small files and sizes are looked at.

    Raises:
        CherryError: if the folder is none of a run.
    """
    # A start writes its configuration when all is loaded; one that was refused has none.
    if not any((run / name).is_file() for name in ("config.yaml", ATTEMPTS, LOCK)):
        return _no_training(run, verify)
    config = outline(run / "config.yaml") if (run / "config.yaml").is_file() else None
    steps, running = recent_steps(run), is_locked(run / LOCK)
    attempts = list(read_lines(run / ATTEMPTS)) if (run / ATTEMPTS).exists() else []
    falls_back = (config.settings if config else {}).get("checkpoints", {}).get("fall_back", True)
    saved, undamaged = _checkpoint(run, running, verify, falls_back)
    sections = {
        "run": [str(run), _RUNNING[running]],
        **_progress(run, steps, config.megatron if config else {}),
        "held out": _held_out(run),
        "saved": saved,
        "starts": _starts(run, attempts, running),
        "alarms": _alarms(run),
    }
    lines = [
        f"{name if number == 0 else '':<10}{line}"
        for name, found in sections.items()
        for number, line in enumerate(found)
    ]
    return lines, undamaged


def _no_training(run: Path, verify: bool) -> tuple[list[str], bool]:
    """What a folder is that holds a checkpoint and nothing else of a run, and whether no damage to it was seen."""
    if saved_folder(run) is None and not (run / ".metadata").is_file():
        why = "has no config.yaml yet" if run.exists() else "does not exist"
        raise CherryError(f"{run} is no run's folder: it {why}; name the `run` of a configuration")
    made = read_lineage(open_checkpoint(run).folder) or {}
    by = f"by cherry {made['operation']}, {_ago(made.get('time'))}" if "operation" in made else "elsewhere"
    told = [f"{run} is a checkpoint made {by}, and no run's folder; `cherry lineage {run}` tells more"]
    if not verify:
        return told, True
    try:
        describe(run, verify=True)
    except CherryError as error:
        return [*told, f"damaged: {error}"], False
    return [*told, _VERIFIED], True


def _progress(run: Path, steps: list[dict[str, Any]], flags: dict[str, Any]) -> dict[str, list[str]]:
    """Step, speed and loss."""
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


def _checkpoint(run: Path, running: bool | None, verify: bool, falls_back: bool) -> tuple[list[str], bool]:
    """The newest checkpoint, and whether no damage to it was seen."""
    folder = run / "checkpoints"
    saved = saved_folder(folder)
    if saved is None:
        if running and (parts := sorted(folder.glob("iter_*"))):
            return [f"no checkpoint yet: {parts[-1].name} is being saved"], True
        if why := why_none(folder) if any(folder.glob("iter_*")) else why_lost(run):
            return [f"WARNING: {why}"], False
        return ["no checkpoint yet"], True
    try:
        folder = newest(saved)
        made = read_lineage(folder)
        whole(folder, own=True)
        if verify:
            describe(run, verify=True)
    except CherryError as error:
        return [f"damaged: {error}", *(_older(saved, verify) if falls_back else [])], False
    told = _VERIFIED if verify else "hashes recorded, --verify compares them"
    if made is None:
        told = "without a record of its hashes"
    return [f"step {step_of(folder)}, {_ago((made or {}).get('time'))}, {folder}", told], True


def _older(saved: Path, verify: bool) -> list[str]:
    """What a start does about a damaged newest checkpoint."""
    try:
        _, *older = candidates(saved)
    except CherryError:  # the tracker file names none
        return []
    for folder in older:
        with suppress(CherryError):
            whole(folder, own=True)
            if verify:
                describe(folder, verify=True)
            so_far = "" if verify else " as far as its sizes tell (--verify compares hashes)"
            return [
                f"or start again: a start falls back to the newest older one that is whole, {folder.name}{so_far}"
            ]
    return ["no older checkpoint of the run is whole, so a start stops"]


def _starts(run: Path, attempts: list[dict[str, Any]], running: bool | None) -> list[str]:
    """Starts, and of those by a launcher what followed each."""
    path = run / "starts.jsonl"
    starts = list(read_lines(path)) if path.exists() else []
    told = ["none recorded"]
    if starts:
        host, ranks = starts[-1].get("host"), starts[-1].get("world_size")
        told = [f"{len(starts)}, the last {_ago(starts[-1].get('time'))} on {host}, {ranks} rank(s)"]
    opened: dict[tuple[Any, Any], dict[str, Any]] = {}
    for line in attempts:
        key = line.get("job"), line.get("start")
        opened.pop(key, None)
        if line.get("event") == "start":
            opened[key] = line
    ended = [line for line in attempts if line.get("event") == "end"]
    told += [
        f"job {line.get('job')}, {_ago(line.get('time'))}: {line.get('decision')}, {line.get('reason')}"
        for line in ended[-_SHOWN:]
    ]
    for line in [*opened.values()][-_SHOWN:]:
        # Other verbs hold no lock.
        nothing = running is False and line.get("verb") == "pretrain"
        told.append(
            f"job {line.get('job')}, {_ago(line.get('time'))}: started, has not ended"
            f"{'; nothing runs now (lost, or still starting)' if nothing else ''}"
        )
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
