"""A run's folder: what was started when and with what, and the checkpoint to go on from.

config.yaml       the resolved configuration of the last start
starts.jsonl      one line a start: time, command, commit, versions, configuration hash
steps.jsonl       one line a step: loss, gradient norm, learning rate, seconds
checkpoints/      Megatron's torch_dist checkpoints
tensorboard/      events
logs/             Megatron's own output, one file a rank
cache/            Megatron's data set indices
"""

import datetime
import json
import os
import shlex
import socket
import sys
from pathlib import Path

import yaml

from cherry_megatron.config import Config
from cherry_megatron.errors import CherryError
from cherry_megatron.files import write_atomically
from cherry_megatron.surgery.checkpoint import TRACKER, saved_folder
from cherry_megatron.versions import git_state, installed_versions


def own_checkpoints(config: Config) -> Path | None:
    """The run's folder of checkpoints, if it holds one."""
    return saved_folder(config.run.absolute() / "checkpoints")


def checkpoint_to_load(config: Config) -> Path | None:
    """The folder of checkpoints to start from: the run's own if it has one, else `megatron.load`.

    Raises:
        CherryError: if `megatron.load` names a folder without a checkpoint.
    """
    named = config.megatron.get("load")
    found = own_checkpoints(config)
    if found is not None or named is None:
        return found
    found = saved_folder(Path(named).absolute())
    if found is None:
        raise CherryError(
            f"megatron.load {named}: no checkpoint there ({TRACKER} is missing); name the folder that holds it"
        )
    return found


def make_run_folder(config: Config) -> None:
    """Create the run's folder and its logs/."""
    (config.run / "logs").mkdir(parents=True, exist_ok=True)


def record_start(config: Config, rank: int, world_size: int) -> None:
    """Write what is about to run, on rank 0."""
    if rank != 0:
        return
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
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    with (config.run / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def read_steps(run: Path) -> list[dict[str, float]]:
    """The recorded steps of a run in order; of a step recorded twice (after a resume) the later."""
    steps = {}
    with (run / "steps.jsonl").open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # a killed run may leave half a line
                step = json.loads(line)
                steps[step["iteration"]] = step
    return [steps[iteration] for iteration in sorted(steps)]
