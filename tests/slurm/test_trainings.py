"""Real trainings on a real SLURM: stopped in every way they go on by themselves, bit for bit; the whole chain."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cherry_megatron.jobs.attempts import Attempt, read_attempts
from cherry_megatron.runs import read_evaluations, read_steps
from cherry_megatron.storage.ancestry import describe
from tests.slurm.cluster import Cluster
from tests.slurm.launching import TWO_BY_TWO, job_id, launch, small_chain, submitted, tail, until

Write = Callable[..., Path]
Undisturbed = Callable[..., list[dict[str, float]]]
STEPS = 14
LONG = 300  # more than SLURM takes to miss a node


def slow(steps: int) -> dict[str, Any]:
    """A step takes a third of a second. Dropout: a resumed training needs the state of its random numbers."""
    return {"megatron": {"train-iters": steps, "hidden-dropout": 0.1, "global-batch-size": 32, "save-interval": 6}}


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, write_config: Write, train: Callable[..., Any]
) -> Undisturbed:
    """The steps of a training without a stop, by numbers of ranks and steps."""
    found: dict[tuple[int, int], list[dict[str, float]]] = {}

    def get(ranks: int, steps: int = STEPS) -> list[dict[str, float]]:
        if (ranks, steps) not in found:
            path = write_config(tmp_path_factory.mktemp("undisturbed"), **slow(steps))
            found[ranks, steps] = train(path, ranks)
        return found[ranks, steps]

    return get


def start(
    cluster: Cluster, project: Path, write_config: Write, wait: int, steps: int = STEPS, **settings: str
) -> tuple[str, Path]:
    """Submit a training on 2 nodes; returns its job and its run once `wait` steps are done."""
    path = write_config(project, **slow(steps))
    env = {**cluster.env, **TWO_BY_TWO, "CLUSTER_VENV": sys.prefix, **settings}
    job, run = job_id(launch(project, env, str(path))), Path(yaml.safe_load(path.read_text())["run"])
    assert until(lambda: done(run) >= wait or over(cluster, job), 240), tail(run)
    return job, run


def done(run: Path) -> int:
    return len(read_steps(run)) if (run / "steps.jsonl").exists() else 0


def over(cluster: Cluster, job: str) -> bool:
    return cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def ends_like(cluster: Cluster, job: str, run: Path, steps: list[dict[str, float]]) -> list[Attempt]:
    """Wait for the end, and hold losses, norms and rates against another training's, bit for bit."""
    assert until(lambda: over(cluster, job), 500), tail(run)
    assert cluster.state(job) == "COMPLETED", tail(run)
    values = ("iteration", "loss", "grad_norm", "learning_rate")
    assert [[step[v] for v in values] for step in read_steps(run)] == [[step[v] for v in values] for step in steps]
    describe(run, True)  # every tensor of the last checkpoint is what was saved
    return read_attempts(run)


def test_preempted(cluster: Cluster, write_config: Write, project: Path, undisturbed: Undisturbed) -> None:
    """Told to stop it saves, is requeued, and ends with the trace of a training without a stop."""
    job, run = start(cluster, project, write_config, 3, CLUSTER_GPUS_PER_NODE="1")
    cluster.call("scancel", "--signal=TERM", job)
    first, second = ends_like(cluster, job, run, undisturbed(2))
    assert 0 < first.saved == first.reached == second.step < STEPS == second.saved
    assert first.reason == f"was told to stop, saved at step {first.saved} of {STEPS}"
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [(start["world_size"], start["slurm_job"]) for start in starts] == [(2, job), (2, job)]


@pytest.mark.full
@pytest.mark.parametrize("how", ["--signal=USR1", "--signal=TERM --batch", "requeue"])
def test_stopped_on_two_nodes_of_two_tasks(
    how: str, cluster: Cluster, write_config: Write, project: Path,
    undisturbed: Undisturbed,
) -> None:  # fmt: skip
    job, run = start(cluster, project, write_config, 3)
    cluster.call(*(("scontrol", "requeue") if how == "requeue" else ("scancel", *how.split())), job)
    first, second = ends_like(cluster, job, run, undisturbed(4))
    assert second.saved == STEPS
    if how != "requeue":  # which leaves KillWait to save, here 5 s
        assert 0 < first.saved == first.reached == second.step


@pytest.mark.full
def test_time_limit(cluster: Cluster, write_config: Write, project: Path, undisturbed: Undisturbed) -> None:
    """SLURM's signal before the limit, after 45 s here or up to half a minute earlier, as often as it takes."""
    steps = 120
    settings = {"CLUSTER_GPUS_PER_NODE": "1", "CLUSTER_SBATCH_OPTIONS": "--time=2 --signal=TERM@75"}
    job, run = start(cluster, project, write_config, 1, steps, **settings)
    attempts = ends_like(cluster, job, run, undisturbed(2, steps))
    assert 0 < attempts[0].saved == attempts[1].step < steps
    assert attempts[0].reason.startswith("was told to stop")


@pytest.mark.full
def test_rank_killed(cluster: Cluster, write_config: Write, project: Path, undisturbed: Undisturbed) -> None:
    """A rank that is killed takes its node out of the next attempt, which goes on from the last checkpoint."""
    job, run = start(cluster, project, write_config, 8, CLUSTER_GPUS_PER_NODE="1")
    cluster.call("scancel", "--signal=KILL", f"{job}.0")
    first, second = ends_like(cluster, job, run, undisturbed(2))
    assert (first.decision, first.step, second.step) == ("requeue", 0, 6)
    assert 8 <= first.reached < STEPS


@pytest.mark.full
@pytest.mark.parametrize(("node", "all_of_it"), [(0, True), (1, True), (0, False), (1, False)])
def test_node_lost(
    node: int, all_of_it: bool, write_config: Write, project: Path,
    undisturbed: Undisturbed,
) -> None:  # fmt: skip
    """A slurmd that is killed, alone or with all that it runs: the job goes on without that node."""
    cluster = Cluster(nodes=3, cpus=2, gpus=2)
    try:
        steps = STEPS if all_of_it else LONG
        job, run = start(cluster, project, write_config, 8, steps, CLUSTER_GPUS_PER_NODE="1")
        cluster.kill_node(cluster.nodes[node], all_of_it)
        attempts = ends_like(cluster, job, run, undisturbed(2, steps))
        assert attempts[-1].step >= 6
        left = [name for name in cluster.nodes if name != cluster.nodes[node]]
        assert cluster.call("scontrol", "show", "hostnames", attempts[-1].nodes).split() == left
    finally:
        cluster.stop()


@pytest.mark.full
def test_chain_ends_with_an_evaluated_mixture(cluster: Cluster, write_config: Write, project: Path) -> None:
    env = {**cluster.env, "CLUSTER_NODES": "1", "CLUSTER_GPUS_PER_NODE": "1", "CLUSTER_CPUS_PER_TASK": "1"}
    env |= {"CLUSTER_VENV": sys.prefix, **small_chain(project, write_config)}
    table = submitted(launch(project, env, script="slurm/submit_cherry.sh"))
    last = table["evaluate"][0]
    assert until(lambda: over(cluster, last), 600)
    run = project / "runs/sgt"
    assert cluster.state(last) == "COMPLETED", tail(project / "runs/mixture") + tail(run)
    (evaluation,) = (found for found in read_evaluations(run) if found["iteration"] == 10)
    assert set(evaluation["losses"]) == {"1", "2", "3"} and evaluation["moee"]
    made = [line.split()[1] for line in describe(run, True)]
    assert made[:3] == ["pretrain", "pretrain", "assemble-moee"] and made.count("compress-depth") == 2
    assert read_steps(run)[-1]["selected_loss"] > 0
    finished = submitted(launch(project, env, script="slurm/submit_cherry.sh"))
    assert {state for _, state in finished.values()} == {"finished"}
