"""Starting the launchers, and looking at what they left."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = "slurm/pretrain_cherry_1p8b.sh"
TWO_BY_TWO = {"CLUSTER_NODES": "2", "CLUSTER_GPUS_PER_NODE": "2", "CLUSTER_CPUS_PER_TASK": "1"}


def launch(
    project: Path, env: dict[str, str], *args: str, by: tuple[str, ...] = ("bash",), script: str = SCRIPT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*by, script, *args], cwd=project, env=env, timeout=120, check=False, capture_output=True, text=True
    )


def job_id(done: subprocess.CompletedProcess[str]) -> str:
    assert "Submitted batch job" in done.stdout, done.stderr
    return done.stdout.split()[-1]


def logs(run: Path, job: str) -> dict[str, str]:
    """What each rank printed."""
    return {file.stem.rpartition("-")[2]: file.read_text() for file in (run / "logs").glob(f"slurm-{job}-*.out")}


def until(condition: Callable[[], Any], seconds: float) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def tail(run: Path) -> str:
    """The ends of all logs of a run, for the message of a test that failed."""
    files = [*sorted((run / "logs").glob("*")), run / "attempts.jsonl"]
    return "\n".join(f"--- {file.name}\n{file.read_text()[-1500:]}" for file in files if file.exists())


def small_chain(folder: Path, write_config: Callable[..., Path] | None = None) -> dict[str, str]:
    """Configurations of a chain of two experts for CPUs, and the environment that names them."""
    looped = {"pattern": "*-[*-*-]x3*-", "loop_scales": False}
    parts: dict[str, dict[str, Any]] = {
        "base": {"recurrence": {"pattern": "(*-)x8", "loop_scales": False}},
        "branch": {"recurrence": looped, "megatron": {"load": "runs/compressed", "finetune": True}},
        "mixture": {"recurrence": looped, "moee": {"experts": 2, "prefix": 4, "router_hidden": 8}},
    }
    selective = {"megatron": {"load": "runs/mixture", "finetune": True}, "sgt": {"top_loss": 0.5}}
    parts["sgt"] = {**parts["mixture"], **selective}
    env = {}
    for name, sections in parts.items():
        path = folder / f"{name}.yaml"
        content: dict[str, Any] = {"recurrence": {}, "megatron": {}, **sections}
        if write_config is not None:
            content = yaml.safe_load(write_config(folder / "written", **content).read_text())
        content["run"] = "runs/branch/${CHERRY_BRANCH:-0}" if name == "branch" else f"runs/{name}"
        content["megatron"] |= {"train-iters": 10, "save-interval": 5}
        path.write_text(yaml.safe_dump(content))
        env[f"{name.upper()}_CONFIG"] = str(path)
    return env


def submitted(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """The table of submit_cherry.sh: job and state by stage."""
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    return {stage: (job, state) for stage, job, state, _ in lines[1:]}
