"""The SLURM launch scripts: what they would submit, and what they do on a real SLURM."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cherry_megatron.runs import TRACKER, read_steps
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
SCRIPT = "slurm/pretrain_cherry_1p8b.sh"
TWO_BY_TWO = {"CLUSTER_NODES": "2", "CLUSTER_GPUS_PER_NODE": "2", "CLUSTER_CPUS_PER_TASK": "1"}

# Stands in for `cherry`: each rank says what it was given.
STUB = """\
#!/bin/sh
echo "$SLURM_PROCID $SLURM_LOCALID $SLURM_NTASKS $MASTER_ADDR $MASTER_PORT $CUDA_VISIBLE_DEVICES ${RANK:-none}"
echo "$*"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Launchers and configurations in a folder of their own, where no cluster.env of the user's counts."""
    root = tmp_path / "the project"
    (root / "slurm").mkdir(parents=True)
    for file in (ROOT / "slurm").glob("*.sh"):
        shutil.copy(file, root / "slurm")
    shutil.copytree(ROOT / "configs", root / "configs")
    return root


@pytest.fixture
def stub(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Makes a script that takes the place of `cherry`; returns the environment that names it."""

    def make(text: str) -> dict[str, str]:
        path = tmp_path / "stub.sh"
        path.write_text(text)
        path.chmod(0o755)
        return {"CHERRY": str(path)}

    return make


@pytest.fixture(scope="session")
def no_slurm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose PATH holds the usual tools and no SLURM."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("bash", "basename", "dirname", "head", "mkdir", "sed"):
        found = shutil.which(name)
        assert found, f"{name} is missing"
        (folder / name).symlink_to(found)
    return {"PATH": str(folder), "HOME": "/home/someone"}


def launch(
    project: Path, env: dict[str, str], *args: str, by: tuple[str, ...] = ("bash",)
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*by, SCRIPT, *args], cwd=project, env=env, timeout=120, check=False, capture_output=True, text=True
    )


def dry_run(project: Path, env: dict[str, str], *args: str) -> tuple[list[str], list[str]]:
    """The words of the printed sbatch and srun commands."""
    done = launch(project, {**env, "DRY_RUN": "1"}, *args)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert not (project / "runs").exists(), "a dry run leaves nothing behind"
    commands = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    assert [command[0] for command in commands] == ["sbatch", "srun"]
    return commands[0], commands[1]


def options(words: list[str]) -> dict[str, str]:
    """The long options up to the script or command."""
    found = {}
    for word in words[1:]:
        if not word.startswith("--"):
            break
        name, _, value = word[2:].partition("=")
        assert name not in found, f"--{name} is given twice"
        found[name] = value
    return found


def logs(run: Path, job: str) -> dict[str, str]:
    """What each rank printed."""
    return {file.stem.rpartition("-")[2]: file.read_text() for file in (run / "logs").glob(f"slurm-{job}-*.out")}


def job_id(done: subprocess.CompletedProcess[str]) -> str:
    assert "Submitted batch job" in done.stdout, done.stderr
    return done.stdout.split()[-1]


# --- dry runs ---


def test_defaults_are_the_sbatch_lines(project: Path, no_slurm: dict[str, str]) -> None:
    sbatch, srun = dry_run(project, no_slurm)
    assert options(sbatch) == {
        "job-name": "cherry-pretrain", "nodes": "1", "gpus-per-node": "8", "ntasks-per-node": "8",
        "cpus-per-task": "8", "time": "24:00:00", "signal": "TERM@120", "requeue": "", "open-mode": "append",
        "output": f"{project}/runs/cherry_1p8b/logs/slurm-%j.out",
    }  # fmt: skip
    assert sbatch[-2:] == [f"{project}/{SCRIPT}", f"{project}/configs/cherry_1p8b.yaml"]
    assert options(srun) == {
        "nodes": "1", "ntasks": "8", "ntasks-per-node": "8", "cpus-per-task": "8", "kill-on-bad-exit": "1",
        "open-mode": "append", "output": f"{project}/runs/cherry_1p8b/logs/slurm-%j-%t.out",
    }  # fmt: skip
    assert srun[-4:] == ["cherry", "pretrain", "--config", f"{project}/configs/cherry_1p8b.yaml"]


def test_settings_from_the_environment(project: Path, no_slurm: dict[str, str]) -> None:
    settings = {
        "CLUSTER_ACCOUNT": "physics", "CLUSTER_PARTITION": "gpu", "CLUSTER_TIME": "1-0", "CLUSTER_NODES": "16",
        "CLUSTER_GPUS_PER_NODE": "h100:4", "CLUSTER_CPUS_PER_TASK": "12", "CLUSTER_VENV": "/venv",
        "CLUSTER_SBATCH_OPTIONS": "--qos=long --dependency=singleton", "CLUSTER_SRUN_OPTIONS": "--mpi=none",
    }  # fmt: skip
    sbatch, srun = dry_run(project, {**no_slurm, **settings})
    found = options(sbatch)
    expected = {
        "account": "physics", "partition": "gpu", "time": "1-0", "nodes": "16", "gpus-per-node": "h100:4",
        "ntasks-per-node": "4", "cpus-per-task": "12", "qos": "long", "dependency": "singleton",
    }  # fmt: skip
    assert expected.items() <= found.items()
    expected = {"nodes": "16", "ntasks": "64", "ntasks-per-node": "4", "cpus-per-task": "12", "mpi": "none"}
    assert expected.items() <= options(srun).items()
    assert srun[-4] == "/venv/bin/cherry"


def test_settings_from_the_file(project: Path, no_slurm: dict[str, str]) -> None:
    (project / "slurm/cluster.env").write_text(
        '# ours\nCLUSTER_ACCOUNT=physics  # the group\'s\nCLUSTER_NODES=4\nCHERRY="$PWD/it -v"\n'
    )
    sbatch, srun = dry_run(project, {**no_slurm, "CLUSTER_NODES": "2", "CHERRY": "mine"})
    assert {"account": "physics", "nodes": "2"}.items() <= options(sbatch).items(), "the environment wins"
    assert "mine" in srun
    sbatch, srun = dry_run(project, no_slurm)
    assert options(sbatch)["nodes"] == "4"
    assert options(srun)["ntasks"] == "32"


def test_configuration_and_overrides(project: Path, no_slurm: dict[str, str]) -> None:
    arguments = ["configs/dense_566m.yaml", "--set", "recurrence.order=cycle", "--", "--lr", "1e-4"]
    sbatch, srun = dry_run(project, no_slurm, *arguments)
    assert options(srun)["output"] == f"{project}/runs/dense_566m/logs/slurm-%j-%t.out"
    assert sbatch[-6:] == [f"{project}/{arguments[0]}", *arguments[1:]]
    assert srun[-8:] == ["pretrain", "--config", f"{project}/{arguments[0]}", *arguments[1:]]


def test_run_folder(project: Path, no_slurm: dict[str, str]) -> None:
    """Logs go where `cherry pretrain` keeps the run: as the file says, what it extends, or --set."""
    _, srun = dry_run(project, no_slurm, "configs/base_1b.yaml", "--set", "run=runs/second")
    assert options(srun)["output"] == f"{project}/runs/second/logs/slurm-%j-%t.out"
    (project / "child.yaml").write_text("extends: configs/cherry_tiny.yaml\n")
    _, srun = dry_run(project, no_slurm, "child.yaml")
    assert options(srun)["output"] == f"{project}/runs/tiny/logs/slurm-%j-%t.out"
    (project / "child.yaml").write_text("extends: configs/cherry_tiny.yaml\nrun: '/runs/my own'  # here\n")
    _, srun = dry_run(project, no_slurm, "child.yaml")
    assert options(srun)["output"] == "/runs/my own/logs/slurm-%j-%t.out"


def test_container(project: Path, no_slurm: dict[str, str]) -> None:
    settings = {"CLUSTER_CONTAINER": "image.sqsh", "CLUSTER_CONTAINER_MOUNTS": "/data:/data"}
    _, srun = dry_run(project, {**no_slurm, **settings})
    expected = {
        "container-image": "image.sqsh", "container-workdir": str(project),
        "container-mounts": f"{project}:{project},/data:/data",
    }  # fmt: skip
    assert expected.items() <= options(srun).items()
    assert srun[-4] == "cherry", "the image's own"


@pytest.mark.parametrize(
    ("arguments", "settings", "told"),
    [
        (["configs/none.yaml"], {}, "no configuration configs/none.yaml"),
        (["configs/none.yaml"], {"DRY_RUN": "1"}, "no configuration configs/none.yaml"),
        (["--lr", "1"], {}, "'--lr'; Megatron's flags follow after --"),
        (["--set"], {}, "--set needs KEY=VALUE"),
        (["unnamed.yaml"], {}, "names no run folder"),
        (["variable.yaml"], {}, "depends on the environment"),
        ([], {"CLUSTER_NODES": "two"}, "CLUSTER_NODES is 'two'"),
        ([], {"CLUSTER_GPUS_PER_NODE": "0"}, "CLUSTER_GPUS_PER_NODE is '0'"),
        ([], {}, "there is no sbatch here"),
    ],
)
def test_mistakes_are_one_sentence(
    project: Path, no_slurm: dict[str, str], arguments: list[str], settings: dict[str, str], told: str
) -> None:
    (project / "unnamed.yaml").write_text("megatron: {}\n")
    (project / "variable.yaml").write_text("run: ${HOME}/runs\n")
    done = launch(project, {**no_slurm, **settings}, *arguments)
    assert done.returncode == 2
    assert not done.stdout
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (project / "runs").exists(), "nothing was started"


def test_settings_are_known_and_documented(project: Path, no_slurm: dict[str, str]) -> None:
    """A misspelled setting is refused; the example names every one, and works as it is."""
    settings = project / "slurm/cluster.env"
    settings.write_text("CLUSTER_NODE=4\n")
    done = launch(project, {**no_slurm, "DRY_RUN": "1"})
    assert done.returncode == 2
    told, _, known = done.stderr.partition("; known are ")
    assert told.endswith("slurm/cluster.env: unknown setting CLUSTER_NODE")
    example = (ROOT / "slurm/cluster.env.example").read_text()
    assert sorted(known.split()) == sorted(re.findall(r"^#(CLUSTER_\w+)=", example, re.MULTILINE))
    for text in (example, example.replace("#CLUSTER_", "CLUSTER_")):
        settings.write_text(text)
        dry_run(project, no_slurm)


# --- on a real SLURM ---


def test_ranks_share_one_master(cluster: Cluster, project: Path, stub: Callable[[str], dict[str, str]]) -> None:
    """`sbatch` of the script itself: it finds the rest; srun gives each task its rank and its node's GPUs."""
    sbatch = ("sbatch", "--wait", "--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1")
    env = {**cluster.env, **stub(STUB), "RANK": "9"}
    done = launch(project, env, "configs/cherry_tiny.yaml", "--", "--lr", "1e-4", by=sbatch)
    assert done.returncode == 0, done.stderr
    job = job_id(done)
    output = logs(project / "runs/tiny", job)
    assert sorted(output) == ["0", "1", "2", "3"]
    port = str(10000 + int(job))
    for rank, text in output.items():
        given, arguments = text.splitlines()
        assert given.split() == [rank, str(int(rank) % 2), "4", cluster.nodes[0], port, "0,1", "none"]
        assert arguments == f"pretrain --config {project}/configs/cherry_tiny.yaml -- --lr 1e-4"
    assert f"master {cluster.nodes[0]}:{port}" in (project / f"slurm-{job}.out").read_text()


def test_failure_reaches_sbatch(cluster: Cluster, project: Path, stub: Callable[[str], dict[str, str]]) -> None:
    """One failing rank ends the others, and its status is the job's. Submitted by the script itself."""
    fails = (
        STUB
        + """\
[ "$SLURM_PROCID" != 3 ] || exit 7
trap 'exit 0' TERM
while :; do sleep 0.1; done
"""
    )
    env = {
        **cluster.env, **stub(fails), **TWO_BY_TWO, "CLUSTER_SBATCH_OPTIONS": "--wait",
        "CLUSTER_MODULES": "gcc cuda", "BASH_FUNC_module%%": '() { echo "module $*"; }',
    }  # fmt: skip
    begin = time.monotonic()
    done = launch(project, env)
    assert done.returncode == 7, done.stderr
    assert time.monotonic() - begin < 40
    job = job_id(done)
    assert len(logs(project / "runs/cherry_1p8b", job)) == 4
    told = (project / f"runs/cherry_1p8b/logs/slurm-{job}.out").read_text()
    assert "exit code 7" in told
    assert "module load gcc cuda" in told


def test_nodes_without_gpus(cluster: Cluster, project: Path, stub: Callable[[str], dict[str, str]]) -> None:
    sbatch = ("sbatch", "--wait", "--nodes=1", "--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1")
    done = launch(project, {**cluster.env, **stub(STUB)}, by=sbatch)
    assert done.returncode == 0, done.stderr
    assert sorted(logs(project / "runs/cherry_1p8b", job_id(done))) == ["0", "1"]


def test_mistake_in_a_job(cluster: Cluster, project: Path) -> None:
    sbatch = ("sbatch", "--wait", "--nodes=1", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1")
    done = launch(project, cluster.env, "none.yaml", by=sbatch)
    assert done.returncode == 2
    told = (project / f"slurm-{job_id(done)}.out").read_text()
    assert told.count("\n") == 1
    assert "no configuration none.yaml" in told


def test_requeued_job_starts_again(cluster: Cluster, project: Path, stub: Callable[[str], dict[str, str]]) -> None:
    """The ranks are told with SIGTERM, then the job runs a second time and adds to the same logs."""
    waits = """\
#!/bin/bash
echo "start ${SLURM_RESTART_COUNT:-0}"
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
trap 'echo saved; exit 0' TERM
while :; do sleep 0.1; done
"""
    done = launch(project, {**cluster.env, **stub(waits), **TWO_BY_TWO})
    job, run = job_id(done), project / "runs/cherry_1p8b"
    assert _until(lambda: sum("start 0" in text for text in logs(run, job).values()) == 4, 20)
    cluster.call("scontrol", "requeue", job)
    assert _until(lambda: cluster.state(job) == "COMPLETED", 60)
    for text in logs(run, job).values():
        said = [line for line in text.splitlines() if line.startswith(("start", "saved"))]
        assert said == ["start 0", "saved", "start 1"]


def test_training_is_saved_by_a_signal(cluster: Cluster, write_config: Callable[..., Path], project: Path) -> None:
    """A real training on 2 nodes: SLURM's SIGTERM saves its last step and ends the job well."""
    path = write_config(project, megatron={"train-iters": 3000})
    run = Path(yaml.safe_load(path.read_text())["run"])
    one_each = {**TWO_BY_TWO, "CLUSTER_GPUS_PER_NODE": "1", "CLUSTER_VENV": sys.prefix}
    job = job_id(launch(project, {**cluster.env, **one_each}, str(path)))
    steps = run / "steps.jsonl"
    assert _until(lambda: steps.exists() and steps.read_text().count("\n") > 2, 180), _tail(run, job)
    cluster.call("scancel", "--signal=TERM", job)
    assert _until(lambda: cluster.state(job) == "COMPLETED", 120), _tail(run, job)
    start = json.loads((run / "starts.jsonl").read_text())
    assert (start["world_size"], start["slurm_job"]) == (2, job)
    saved = int((run / "checkpoints" / TRACKER).read_text())
    assert [step["iteration"] for step in read_steps(run)] == list(range(1, saved + 1))


def _until(condition: Callable[[], Any], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _tail(run: Path, job: str) -> str:
    return "\n".join(text[-2000:] for text in logs(run, job).values())
