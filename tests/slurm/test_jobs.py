"""The launchers on a real SLURM: ranks, failures, requeues, preemption, the chain."""

import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cherry_megatron.jobs.attempts import read_attempts
from tests.slurm.cluster import Cluster
from tests.slurm.launching import TWO_BY_TWO, job_id, launch, logs, small_chain, submitted, tail, until

Stub = Callable[[str], dict[str, str]]
# Each rank says what it was given.
SAYS = """\
echo "$SLURM_PROCID $SLURM_LOCALID $SLURM_NTASKS $MASTER_ADDR $MASTER_PORT $CUDA_VISIBLE_DEVICES ${RANK:-none}"
printf '%q ' "$@"
saved "$run/checkpoints" 20000
"""
# Waits for SIGTERM or SIGUSR1 the first time, and takes a while to save on it.
WAITS = """\
echo "start ${SLURM_RESTART_COUNT:-0}"
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    trap 'sleep 1; saved "$run/checkpoints" 5; echo saved; exit 0' TERM USR1
    while :; do sleep 0.1; done
fi
saved "$run/checkpoints" 20000
"""
# Rank 3 fails while the others wait.
FAILS = """\
[ "$SLURM_PROCID" != 3 ] || exit 7
sleep 100
"""


def test_ranks_share_one_master(cluster: Cluster, project: Path, stub: Stub) -> None:
    """`sbatch` of the script itself: it finds the rest; srun gives each task its rank and its node's GPUs."""
    sbatch = ("sbatch", "--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1")
    env = {**cluster.env, **stub(SAYS), "RANK": "9"}
    given = ["configs/cherry_tiny.yaml", "--set", "megatron.data-path=['my  text', $HOME]", "--", "--lr", "1e-4"]
    job = job_id(launch(project, env, *given, by=sbatch))
    assert until(lambda: cluster.state(job) == "COMPLETED", 30), tail(project / "runs/tiny")
    output = logs(project / "runs/tiny", job)
    assert sorted(output) == ["0", "1", "2", "3"]
    port = str(10000 + int(job))
    for rank, text in output.items():
        told, arguments = text.splitlines()
        assert told.split() == [rank, str(int(rank) % 2), "4", cluster.nodes[0], port, "0,1", "none"]
        assert shlex.split(arguments) == ["pretrain", "--config", f"{project}/{given[0]}", *given[1:]]
    assert f"master {cluster.nodes[0]}:{port}" in (project / f"slurm-{job}.out").read_text()


def test_what_fails_twice_is_not_tried_again(cluster: Cluster, project: Path, stub: Stub) -> None:
    """A rank's failure ends the others; once more without its node; then the job fails with the rank's status."""
    env = {
        **cluster.env, **stub(FAILS), **TWO_BY_TWO,
        "CLUSTER_MODULES": "gcc cuda", "BASH_FUNC_module%%": '() { echo "module $*"; }',
    }  # fmt: skip
    job, run = job_id(launch(project, env)), project / "runs/cherry_1p8b"
    assert until(lambda: cluster.state(job) == "FAILED", 60), tail(run)
    assert "ExitCode=7:0" in cluster.call("scontrol", "show", "job", job)
    first, second = read_attempts(run)
    assert (first.decision, first.node, first.status) == ("requeue", cluster.nodes[1], 7)
    assert (second.decision, second.node, second.status) == ("stop", cluster.nodes[2], 7), "another node"
    assert second.reason.startswith(f"two attempts failed after step 0 ({cluster.nodes[2]}: task 3: Exited with")
    told = (run / f"logs/slurm-{job}.out").read_text()
    assert f"requeued without {cluster.nodes[1]}" in told
    assert f"pretrain: stop, {second.reason}" in told
    assert "module load gcc cuda" in told
    assert (run / f"jobs/{job}-1/environment.txt").exists()


@pytest.mark.full
def test_without_other_nodes_it_is_tried_on_the_same(cluster: Cluster, project: Path, stub: Stub) -> None:
    env = {**cluster.env, **stub(FAILS), **TWO_BY_TWO, "CLUSTER_NODES": "3"}
    job, run = job_id(launch(project, env)), project / "runs/cherry_1p8b"
    assert until(lambda: cluster.state(job) == "FAILED", 60), tail(run)
    first, second = read_attempts(run)
    assert (first.node, first.nodes) == (cluster.nodes[1], second.nodes)
    assert f"not enough nodes to do without {cluster.nodes[1]}" in (run / f"logs/slurm-{job}.out").read_text()


def test_nodes_without_gpus(cluster: Cluster, project: Path, stub: Stub) -> None:
    sbatch = ("sbatch", "--nodes=1", "--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1")
    job, run = job_id(launch(project, {**cluster.env, **stub(SAYS)}, by=sbatch)), project / "runs/cherry_1p8b"
    assert until(lambda: cluster.state(job) == "COMPLETED", 30), tail(run)
    assert sorted(logs(run, job)) == ["0", "1"]


def test_mistake_in_a_job(cluster: Cluster, project: Path) -> None:
    sbatch = ("sbatch", "--wait", "--nodes=1", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1")
    done = launch(project, cluster.env, "none.yaml", by=sbatch)
    assert done.returncode == 2
    told = (project / f"slurm-{job_id(done)}.out").read_text()
    assert told.count("\n") == 1
    assert "no configuration none.yaml" in told


@pytest.mark.parametrize(
    ("command", "decision"),
    [
        (("scontrol", "requeue"), "left to SLURM"),
        pytest.param(("scancel", "--signal=TERM"), "requeue", marks=pytest.mark.full),
        pytest.param(("scancel", "--signal=USR1"), "requeue", marks=pytest.mark.full),
        pytest.param(("scancel", "--signal=TERM", "--batch"), "requeue", marks=pytest.mark.full),
        pytest.param(("scancel", "--signal=USR1", "--batch"), "requeue", marks=pytest.mark.full),
    ],
)
def test_told_to_stop(cluster: Cluster, project: Path, stub: Stub, command: tuple[str, ...], decision: str) -> None:
    """The ranks have their time to save; then the job runs a second time and adds to the same logs."""
    job = job_id(launch(project, {**cluster.env, **stub(WAITS), **TWO_BY_TWO}))
    run = project / "runs/cherry_1p8b"
    assert until(lambda: sum("start 0" in text for text in logs(run, job).values()) == 4, 20)
    cluster.call(*command, job)
    assert until(lambda: cluster.state(job) == "COMPLETED", 60), tail(run)
    for text in logs(run, job).values():
        said = [line for line in text.splitlines() if line.startswith(("start", "saved"))]
        assert said == ["start 0", "saved", "start 1"]
    assert [(a.step, a.saved, a.decision) for a in read_attempts(run)] == [
        (0, 5, decision), (5, 20000, "finished"),
    ]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("requeue", [True, False])
def test_ended_for_good(cluster: Cluster, project: Path, stub: Stub, requeue: bool) -> None:
    """What is cancelled, or may not be requeued, has saved and does not come back; it does not count as done."""
    job = job_id(launch(project, {**cluster.env, **stub(WAITS), **TWO_BY_TWO}))
    run = project / "runs/cherry_1p8b"
    assert until(lambda: sum("start 0" in text for text in logs(run, job).values()) == 4, 20)
    if requeue:
        cluster.call("scancel", job)
    else:
        cluster.call("scontrol", "update", f"JobId={job}", "Requeue=0")
        cluster.call("scancel", "--signal=TERM", job)
    wanted = "CANCELLED" if requeue else "FAILED"
    assert until(lambda: cluster.state(job) == wanted, 60), tail(run)
    time.sleep(8)  # it would be back by now
    assert cluster.state(job) == wanted
    (attempt,) = read_attempts(run)
    assert (attempt.saved, attempt.decision) == (5, "left to SLURM" if requeue else "requeue")


# Is still loading what it needs the first two times.
LOADS = """\
echo start
[ "${SLURM_RESTART_COUNT:-0}" = 2 ] || exec sleep 100
saved "$run/checkpoints" 20000
"""


@pytest.mark.full
@pytest.mark.parametrize("how", ["--signal=TERM", "--signal=USR1 --batch"])
def test_told_to_stop_while_it_starts(cluster: Cluster, project: Path, stub: Stub, how: str) -> None:
    """Also twice; no failure, and nothing that a node is to blame for."""
    job = job_id(launch(project, {**cluster.env, **stub(LOADS), **TWO_BY_TWO}))
    run = project / "runs/cherry_1p8b"
    for count in (1, 2):
        assert until(lambda n=4 * count: sum(text.count("start") for text in logs(run, job).values()) == n, 60)
        cluster.call("scancel", *how.split(), job)
    assert until(lambda: cluster.state(job) == "COMPLETED", 60), tail(run)
    told = "was told to stop before its first step, goes on from step 0 of 20000"
    assert [(a.reason, a.node) for a in read_attempts(run)] == [
        (told, ""), (told, ""), ("finished at step 20000 of 20000", ""),
    ]  # fmt: skip


# Needs longer for its save than it is given notice.
SLOW = """\
echo "start ${SLURM_RESTART_COUNT:-0}"
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    trap '' TERM USR1
    while :; do sleep 0.1; done
fi
saved "$run/checkpoints" 20000
"""


@pytest.mark.full
def test_the_time_limit_comes_while_it_saves(cluster: Cluster, project: Path, stub: Stub) -> None:
    """SLURM kills ranks and launcher and requeues nothing by itself."""
    options = {"CLUSTER_SBATCH_OPTIONS": "--time=1 --signal=TERM@30"}
    job = job_id(launch(project, {**cluster.env, **stub(SLOW), **TWO_BY_TWO, **options}))
    run = project / "runs/cherry_1p8b"
    assert until(lambda: cluster.state(job) == "COMPLETED", 180), tail(run)
    assert [a.decision for a in read_attempts(run)][-1] == "finished" and len(read_attempts(run)) == 2
    assert "requeued at its time limit" in (run / f"logs/slurm-{job}.out").read_text()


# Makes what each stage would.
MAKES = """\
echo "$*"
while [ $# -gt 0 ]; do
    [ "$1" != --save ] || output=$2
    shift
done
saved "${output:-$run/checkpoints}" 10
"""


def test_chain(cluster: Cluster, project: Path, stub: Stub) -> None:
    """Every launcher through sbatch, each after the one before; what is queued or done is not submitted again."""
    env = {**cluster.env, **stub(MAKES), **TWO_BY_TWO, "CLUSTER_NODES": "1", "CLUSTER_GPUS_PER_NODE": "1"}
    env |= small_chain(project)
    script = "slurm/submit_cherry.sh"
    table = submitted(launch(project, env, script=script))
    names = ["base", "compress", "recover", "assemble", "mixture", "sgt", "evaluate"]
    assert [(name, state) for name, (_, state) in table.items()] == [(name, "submitted") for name in names]
    again = submitted(launch(project, env, script=script))
    assert {name: job for name, (job, _) in again.items() if job != "-"}.items() <= {
        name: job for name, (job, _) in table.items()
    }.items(), "nothing is submitted twice"
    last = table["evaluate"][0]
    assert until(lambda: cluster.state(last) in ("COMPLETED", "CANCELLED"), 90)
    assert cluster.state(last) == "COMPLETED", tail(project / "runs/mixture") + tail(project / "runs/sgt")
    assert (project / "runs/branch/1/logs").is_dir() and (project / "runs/branch/1/checkpoints").is_dir()
    assert [a.verb for a in read_attempts(project / "runs/mixture")] == ["assemble-moee", "pretrain"]
    assert [a.verb for a in read_attempts(project / "runs/sgt")] == ["pretrain", "evaluate"]
    given = (project / f"runs/sgt/logs/slurm-{table['sgt'][0]}-0.out").read_text().split()
    assert given[-4:] == ["--set", "megatron.load=runs/mixture", "--set", "megatron.finetune=true"]
    told = (project / f"runs/mixture/logs/slurm-{table['mixture'][0]}.out").read_text()
    assert "pretrain from runs/mixture/assembled\n" in told
    given = (project / f"runs/branch/0/logs/slurm-{table['compress'][0]}-0.out").read_text().split()
    assert given[-4:] == ["--load", "runs/base", "--save", "runs/compressed"]
    given = (project / f"runs/mixture/logs/slurm-{table['assemble'][0]}-0.out").read_text().split()
    assert given[-5:] == ["--load", "runs/branch/0", "runs/branch/1", "--save", "runs/mixture/assembled"]
    finished = submitted(launch(project, env, script=script))
    assert finished == dict.fromkeys(names, ("-", "finished"))
