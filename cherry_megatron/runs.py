"""A run's folder: what was started when and with what, and the checkpoint to go on from.

config.yaml       the resolved configuration of the last start
starts.jsonl      one line a start: time, command, commit, versions, configuration hash, device
steps.jsonl       one line a step: loss, gradient norm, learning rate, seconds
saves.jsonl       one line a checkpoint: time, step
alarms.jsonl      one line an alarm: skipped steps, rewinds, hangs, loops, experts, damaged checkpoints
evaluations.jsonl one line an evaluation: held-out loss by number of loops
probes.jsonl      one line a probe of selective training: the gradient coupling
generations.jsonl one line an evaluation: continued prompts, their repetition, variety and length
checkpoints/      Megatron's torch_dist checkpoints
tensorboard/      events
logs/             Megatron's own output, one file a rank
cache/            Megatron's data set indices
tasks/            scores on tasks, one folder an evaluation, see harness/results.py
search/           logs of a search for the grouping that the run is to start from
lock              held by the training that writes here
"""

import datetime
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from cherry_megatron.config import Config
from cherry_megatron.errors import CherryError
from cherry_megatron.files import add_line, lock_or_refuse, read_last_lines, read_lines, write_atomically
from cherry_megatron.storage.fallback import newest_whole
from cherry_megatron.storage.tracker import newest, saved_folder, why_none
from cherry_megatron.versions import git_state, installed_versions

SAVES = "saves.jsonl"


def own_checkpoints(config: Config) -> Path | None:
    """The run's folder of checkpoints, if it holds one.

    Raises:
        CherryError: if it holds some that do not count, or what the run has saved is gone.
    """
    folder = config.run.absolute() / "checkpoints"
    saved = saved_folder(folder)
    if saved is None and any(folder.glob("iter_*")):
        raise CherryError(f"{why_none(folder)}, or choose another run")
    if saved is None and (why := why_lost(config.run)):
        raise CherryError(why)
    return saved


def why_lost(run: Path) -> str | None:
    """What to do about a run that has no checkpoint, if it has saved one; None if it never did."""
    lines = list(read_lines(run / SAVES)) if (run / SAVES).exists() else []
    if not lines:
        return None
    return (
        f"the run {run} has saved a checkpoint of step {lines[-1]['iteration']}, and now there is none; restore "
        f"{run.absolute() / 'checkpoints'}, or to begin anew choose another run"
    )


def record_saved_step(run: Path, iteration: int) -> None:
    """Remember that there is a checkpoint: without it the run must not begin anew."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    add_line(run / SAVES, {"time": now, "iteration": iteration})


def checkpoint_to_load(config: Config, training: bool = False) -> Path | None:
    """The checkpoint to start from: the run's own newest if it has one, else that of `megatron.load`.

    Args:
        config: of the run.
        training: take the newest of the run's own that is whole, if it falls back.

    Raises:
        CherryError: if there should be one and is not.
    """
    saved, named = own_checkpoints(config), config.megatron.get("load")
    if saved is not None:
        return newest_whole(saved) if training and config.checkpoints.fall_back else newest(saved)
    if named is None:
        return None
    saved = saved_folder(Path(str(named)).absolute())
    if saved is None:
        raise CherryError(f"megatron.load: {why_none(Path(str(named)))}")
    return newest(saved)


LOCK = "lock"


@contextmanager
def only_training(config: Config, rank: int) -> Iterator[None]:
    """Keep a second training out of the run's folder while this one is at it.

    Rank 0 asks; if it is refused, its exit must end the others, as it does under torchrun and our launchers.

    Raises:
        CherryError: if this is the second.
    """
    if rank != 0:
        yield
        return
    path = config.run / LOCK
    try:
        file = path.open("w")
    except OSError as error:
        raise CherryError(f"cannot write {path}: {error.strerror}") from None
    with file:
        lock_or_refuse(file.fileno(), f"another training writes to {config.run}; wait, or choose another run", path)
        yield


def make_run_folder(config: Config) -> None:
    """Create the run's folder and its logs/."""
    (config.run / "logs").mkdir(parents=True, exist_ok=True)


def record_start(config: Config, world_size: int, device: str, rho: float | None) -> None:
    """Write what is about to run.

    Args:
        config: of the run.
        world_size: ranks.
        device: the name of the GPU, or CPU.
        rho: of selective training: the marked share of the training split, or the share that `top_loss` asks for.
    """
    write_atomically(config.run / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "config": str(config.source),
        "config_hash": config.hash(),
        "git": git_state(),
        "versions": installed_versions(),
        "host": socket.gethostname(),
        "world_size": world_size,
        "device": device,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        **({} if rho is None else {"rho": rho}),
    }
    add_line(config.run / "starts.jsonl", start)


def read_steps(run: Path) -> list[dict[str, float]]:
    """The recorded steps of a run in order; of a step recorded twice (after a resume) the later."""
    steps = {step["iteration"]: step for step in read_lines(run / "steps.jsonl")}
    return [steps[iteration] for iteration in sorted(steps)]


def recent_steps(run: Path) -> list[dict[str, Any]]:
    """The same of the last 4 MiB, up to the step that was recorded last: those after it were before a rewind."""
    path = run / "steps.jsonl"
    lines = list(read_last_lines(path, 1 << 22)) if path.exists() else []
    steps = {line["iteration"]: line for line in lines}
    return [steps[iteration] for iteration in sorted(steps) if iteration <= lines[-1]["iteration"]]


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """The recorded evaluations of a run in order; of what was evaluated twice at a step the later.

    Returns:
        Of each: iteration, losses by number of loops, and by number of loops too parts, the losses of selected and
        unselected tokens, if some tokens were selected, and moee and mtp, what a mixture and multi-token prediction
        report.
    """
    found: dict[int, dict[str, Any]] = {}
    path = run / "evaluations.jsonl"
    for line in read_lines(path) if path.exists() else ():
        known = found.setdefault(line["iteration"], {"iteration": line["iteration"], "losses": {}})
        for key in ("losses", "parts", "moee", "mtp"):
            if key in line:
                known.setdefault(key, {}).update(line[key])
    return [found[iteration] for iteration in sorted(found)]


def read_probes(run: Path) -> list[dict[str, Any]]:
    """The recorded couplings of a run in order: iteration, and by part cos and ratio."""
    path = run / "probes.jsonl"
    probes = {line["iteration"]: line for line in read_lines(path)} if path.exists() else {}
    return [probes[iteration] for iteration in sorted(probes)]


def read_rho(run: Path) -> float | None:
    """The selected share that a selective run was trained with, see `record_start`."""
    found = [start["rho"] for start in read_lines(run / "starts.jsonl") if "rho" in start]
    return found[-1] if found else None
