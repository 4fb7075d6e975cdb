"""`cherry experiment run`: the tasks of an experiment, each a process of its own, on the devices there are."""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from cherry_megatron.cli import check_arguments
from cherry_megatron.config import load, outline
from cherry_megatron.errors import CherryError, naming
from cherry_megatron.experiments.plan import OUTPUTS, Experiment, Task, find, read
from cherry_megatron.experiments.records import Records
from cherry_megatron.experiments.schedule import PROGRAM, Schedule, Slot
from cherry_megatron.files import lock_or_refuse, make_folder
from cherry_megatron.platform.machine import inspect_machine


def run(
    name: str,
    out: Path,
    gpus: int | None = None,
    jobs_per_gpu: int = 1,
    only: Sequence[str] | None = None,
    limit: float | None = None,
    program: Sequence[str] = PROGRAM,
) -> int:
    """Run what is not done yet.

    Args:
        name: of the experiment, or its file.
        out: its folder.
        gpus: how many to use, by default all.
        jobs_per_gpu: tasks at once on each, or on the CPU.
        only: these stages, with what they need.
        limit: seconds after which to stop.
        program: the command that takes a verb.

    Returns:
        0 if all is done, 1 if something failed, 3 if it was stopped with something left.

    Raises:
        CherryError: bad input, before anything is run.
    """
    ends = math.inf if limit is None else time.monotonic() + limit
    experiment = read(find(name))
    tasks = experiment.tasks(only)
    places = slots(inspect_machine().devices, gpus, jobs_per_gpu)
    check(experiment, out)
    definitions = experiment.definitions()
    make_folder(out)
    handle = os.open(out, os.O_RDONLY)
    try:
        busy = f"another `cherry experiment run` works in {out}; wait for its end, or choose another --out"
        lock_or_refuse(handle, busy, out)
        records = Records(out)
        unchanged(experiment, tasks, definitions, records, out)
        return Schedule(out, tasks, definitions, records, places, ends, program).run()
    finally:
        os.close(handle)


def slots(devices: Sequence[str], gpus: int | None, jobs: int) -> list[Slot]:
    """Where tasks run, the first of every GPU first.

    Args:
        devices: names of the GPUs that can be seen.
        gpus: how many of them to use, by default all.
        jobs: tasks at once on each, or on the CPU.
    """
    count = len(devices) if gpus is None else gpus
    if not 0 <= count <= len(devices):
        raise CherryError(f"--gpus {count}: {len(devices)} can be seen here")
    if jobs < 1:
        raise CherryError(f"--jobs-per-gpu {jobs} must be positive")
    # OMP_NUM_THREADS: tasks side by side share the cores.
    threads = str(max(1, len(os.sched_getaffinity(0)) // (jobs * max(count, 1))))
    common = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    if count == 0:
        return [Slot(number, "CPU", {**common, "CUDA_VISIBLE_DEVICES": ""}) for number in range(jobs)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(devices))))).split(",")
    return [
        Slot(number, devices[number % count], {**common, "CUDA_VISIBLE_DEVICES": visible[number % count]})
        for number in range(count * jobs)
    ]


def check(experiment: Experiment, out: Path) -> None:
    """Look at the arguments and the configuration of every stage.

    Raises:
        CherryError: what a stage would be refused for when its turn comes.
    """
    for stage in experiment.stages.values():
        task = Task(stage, stage.seeds[0])
        with naming(f"{experiment.source}, stage {stage.name}"):
            check_arguments(stage.verb, task.arguments(out))
            if OUTPUTS[stage.verb] == "run":
                flags = load(stage.config, task.overrides(out)).flags
                if any(flag.partition("=")[0] == "--seed" for flag in flags):
                    raise CherryError(
                        f"{stage.config}: --seed among its flags would be that of every seed; take it out"
                    )
            else:
                outline(stage.config, task.overrides(out))


def unchanged(
    experiment: Experiment, tasks: list[Task], definitions: dict[str, str], records: Records, out: Path
) -> None:
    """See that what was made before is what the file still asks for.

    Raises:
        CherryError: which folders to remove.
    """
    for name in (task.name for task in tasks):
        if (out / name).exists() and name not in records.by_task:
            raise CherryError(f"{out / name} is in no record of {out}; remove it, or choose another --out")
    changed = [
        task
        for task in tasks
        if (out / task.name).exists() and records.by_task[task.name]["definition"] != definitions[task.name]
    ]
    if changed:
        folders = ", ".join(str(out / task.name) for task in changed)
        raise CherryError(
            f"{experiment.source}: the stage {changed[0].stage.name} is not what it was when it ran; remove "
            f"{folders} to run it again, or choose another --out"
        )
