"""The schedule: order, failures, limits, and what a later start makes of what is there."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from cherry_megatron.errors import CherryError
from tests.conftest import TINY, run_ranks

PROGRAM = [sys.executable, str(Path(__file__).with_name("verbs.py"))]
PARENT = {"verb": "pretrain"}
AVERAGED = {"verb": "compress-depth", "args": {"load": "{parent}"}}
RECOVERED = {"verb": "pretrain", "set": {"megatron.load": "{averaged}", "megatron.finetune": True}}


def write(folder: Path, stages: dict[str, dict], seeds: tuple[int, ...] = (1,), steps: int = 10) -> Path:
    base = {
        "run": "runs/x",
        "recurrence": {"pattern": "*-[*-*-]x3*-"},
        "evaluation": {"batches": 1},
        "megatron": {**TINY, "train-iters": steps, "tokenizer-model": "none", "data-path": ["none"]},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    experiment = {"about": "why", "config": "base.yaml", "seeds": list(seeds), "stages": stages}
    (folder / "it.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))
    return folder / "it.yaml"


def _terminate_at(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


def _run(path: Path, options: dict, terminate_at: Path | None) -> tuple[int, str]:
    from cherry_megatron.experiments.run import run

    if terminate_at is not None:
        threading.Thread(target=_terminate_at, args=(terminate_at,), daemon=True).start()
    try:
        return run(str(path), path.parent / "out", program=PROGRAM, **options), ""
    except CherryError as error:
        return 2, str(error)


def run(path: Path, terminate_at: Path | None = None, **options: object) -> tuple[int, str]:
    """Status, and what was printed or refused."""
    log = path.parent / "printed"
    ((status, refusal),) = run_ranks(log, 1, _run, path, options, terminate_at)
    return status, refusal or (log / "rank0.out").read_text()


def records(path: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (path.parent / "out/records.jsonl").read_text().splitlines()]
    return {f"{line['stage']}/seed-{line['seed']}": line for line in lines}


def starts(printed: str) -> list[str]:
    return [line.split()[1] for line in printed.splitlines() if " starts on " in line]


def test_tasks_run_in_order_once_what_they_need_is_done(tmp_path):
    # Written the wrong way round: the order is that of the file only among what is ready.
    path = write(tmp_path, {"recovered": RECOVERED, "averaged": AVERAGED, "parent": PARENT}, seeds=(1, 2))
    status, printed = run(path)
    assert status == 0 and "6 of 6 tasks are done" in printed
    assert starts(printed) == [
        "parent/seed-1", "averaged/seed-1", "recovered/seed-1",
        "parent/seed-2", "averaged/seed-2", "recovered/seed-2",
    ]  # fmt: skip
    made = records(path)["recovered/seed-1"]
    assert [evaluation["iteration"] for evaluation in made["evaluations"]] == [0, 10]
    assert (made["steps"], made["tokens_per_step"], made["median_step_seconds"]) == (10, 8 * 32, 0.02)
    assert "loss 3.9900" in printed


def test_tasks_run_side_by_side(tmp_path):
    path = write(tmp_path, {"parent": PARENT}, seeds=(1, 2, 3), steps=60)
    status, printed = run(path, jobs_per_gpu=2)
    words = [line.split()[2] for line in printed.splitlines() if "seed-" in line]
    assert status == 0 and words[:2] == ["starts", "starts"] and sorted(words[2:]) == [*["done,"] * 3, "starts"]


def test_what_is_done_is_not_repeated(tmp_path):
    path = write(tmp_path, {"parent": PARENT, "averaged": AVERAGED})
    assert starts(run(path, only=["parent"])[1]) == ["parent/seed-1"]
    assert starts(run(path, only=["averaged"])[1]) == ["averaged/seed-1"]
    shutil.rmtree(tmp_path / "out/parent/seed-1")  # to save space: nothing needs it any more
    assert starts(run(path)[1]) == []
    shutil.rmtree(tmp_path / "out/averaged/seed-1")
    again = write(tmp_path, {"parent": PARENT, "averaged": AVERAGED, "recovered": RECOVERED})
    assert starts(run(again)[1]) == ["parent/seed-1", "averaged/seed-1", "recovered/seed-1"]


def test_a_changed_definition_is_refused(tmp_path):
    run(write(tmp_path, {"parent": PARENT, "averaged": AVERAGED, "other": PARENT}))
    changed = {**PARENT, "set": {"megatron.lr": 5e-4}}
    path = write(tmp_path, {"parent": changed, "averaged": AVERAGED, "other": PARENT})
    before = records(path)
    status, sentence = run(path)
    assert status == 2 and "the stage parent is not what it was" in sentence
    assert f"remove {tmp_path}/out/parent/seed-1, {tmp_path}/out/averaged/seed-1 to run it again" in sentence
    assert records(path) == before
    for stage in ("parent", "averaged"):
        shutil.rmtree(tmp_path / "out" / stage / "seed-1")
    assert starts(run(path)[1]) == ["parent/seed-1", "averaged/seed-1"]


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "out/parent/seed-1").mkdir(parents=True)
    status, sentence = run(write(tmp_path, {"parent": PARENT}))
    assert status == 2 and "out/parent/seed-1 is in no record" in sentence


def test_a_failure_stops_only_what_needs_it(tmp_path):
    bad = {**AVERAGED, "args": {"load": "{parent}", "groups": "fail"}}
    after = {**RECOVERED, "set": {"megatron.load": "{bad}"}}
    stages = {"parent": PARENT, "bad": bad, "after": after, "averaged": AVERAGED}
    path = write(tmp_path, stages)
    status, printed = run(path)
    assert status == 1
    assert "failed: bad/seed-1: exit status 2: cherry compress-depth: this cannot be averaged" in printed
    assert "left: after/seed-1" in printed and "2 of 4 tasks are done, 1 failed" in printed
    assert records(path)["averaged/seed-1"]["finished"] and not records(path)["bad/seed-1"]["finished"]
    assert starts(run(path)[1]) == ["bad/seed-1"]  # it is tried again
    path = write(tmp_path, {**stages, "bad": AVERAGED})  # nothing was made of it, so it may change
    assert starts(run(path)[1]) == ["bad/seed-1", "after/seed-1"]


def test_a_task_that_leaves_nothing_fails_alone(tmp_path):
    odd = {"verb": "evaluate", "set": {"evaluation.batches": 9}}
    path = write(tmp_path, {"odd": odd, "parent": PARENT})
    status, printed = run(path, jobs_per_gpu=2)
    assert status == 1 and "odd/seed-1 failed (its folder does not hold what it should" in printed
    assert records(path)["parent/seed-1"]["finished"]


def test_the_seed_can_be_an_argument(tmp_path):
    drawn = {"verb": "compress-depth", "args": {"load": "{parent}", "method": "random", "seed": "{seed}"}}
    path = write(tmp_path, {"parent": PARENT, "drawn": drawn}, seeds=(1, 2))
    assert run(path)[0] == 0
    assert [records(path)[f"drawn/seed-{seed}"]["command"].count(f"--seed={seed}") for seed in (1, 2)] == [1, 1]


MIXTURE = {
    "verb": "assemble-moee",
    "args": {"load": ["{parent}", "{branch}"], "seed": "{seed}"},
    "set": {"moee.experts": 2},
}


def test_a_mixture_waits_for_all_of_its_experts(tmp_path):
    branch = {"verb": "pretrain", "set": {"megatron.load": "{parent}"}}
    mixture = {"verb": "pretrain", "set": {"megatron.load": "{mixed}", "moee.experts": 2, "moee.prefix": 8}}
    path = write(tmp_path, {"mixture": mixture, "mixed": MIXTURE, "branch": branch, "parent": PARENT}, seeds=(3,))
    status, printed = run(path, jobs_per_gpu=2)
    assert status == 0
    assert starts(printed) == ["parent/seed-3", "branch/seed-3", "mixed/seed-3", "mixture/seed-3"]
    loads = json.loads((tmp_path / "out/mixed/seed-3/loads.json").read_text())
    assert loads == [str(tmp_path / f"out/{name}/seed-3") for name in ("parent", "branch")]
    command = "cherry assemble-moee --config * --load parent/seed-3 branch/seed-3 --save=mixed/seed-3 --seed=3"
    assert fnmatch(records(path)["mixed/seed-3"]["command"], f"{command} --set moee.experts=2")


def test_a_search_gets_a_folder_of_the_experiment(tmp_path):
    searched = {"verb": "compress-depth", "args": {"load": "{parent}", "plan": "search"}}
    path = write(tmp_path, {"parent": PARENT, "searched": searched})
    assert run(path)[0] == 0
    assert "run=searched/seed-1.run" in records(path)["searched/seed-1"]["command"]


def test_a_limit_stops_and_a_later_start_goes_on(tmp_path):
    slow = {"verb": "compress-depth", "args": {"load": "x", "groups": "sleep"}}
    path = write(tmp_path, {"parent": PARENT, "slow": slow, "next": PARENT}, steps=600)
    status, printed = run(path, jobs_per_gpu=2, limit=6)
    assert status == 3 and "left: parent/seed-1, slow/seed-1, next/seed-1" in printed
    assert not (tmp_path / "out/next").exists()
    tracker = tmp_path / "out/parent/seed-1/checkpoints/latest_checkpointed_iteration.txt"
    first = records(path)["parent/seed-1"]
    assert not first["finished"] and 0 < int(tracker.read_text()) < 600
    status, printed = run(path, only=["parent"])
    made = records(path)["parent/seed-1"]
    assert status == 0 and made["finished"] and made["seconds"] > first["seconds"] > 0
    steps = [json.loads(line) for line in (tmp_path / "out/parent/seed-1/steps.jsonl").read_text().splitlines()]
    assert [step["iteration"] for step in steps] == list(range(1, 601))


def test_sigterm_stops_in_order(tmp_path):
    path = write(tmp_path, {"parent": PARENT}, steps=1000)
    status, printed = run(path, terminate_at=tmp_path / "out/parent/seed-1/steps.jsonl")
    assert status == 3 and "stopping, waiting for parent/seed-1" in printed and "left: parent/seed-1" in printed
    assert (tmp_path / "out/parent/seed-1/checkpoints/latest_checkpointed_iteration.txt").exists()


def test_surgery_that_was_not_recorded_is_taken_over(tmp_path):
    mixed = {**MIXTURE, "args": {"load": ["{parent}", "{parent}"]}}
    path = write(tmp_path, {"parent": PARENT, "averaged": AVERAGED, "mixed": mixed})
    run(path)
    lines = [{**record, "finished": record["verb"] == "pretrain"} for record in records(path).values()]
    (tmp_path / "out/records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, printed = run(path)
    assert status == 0 and starts(printed) == []
    assert all(records(path)[f"{stage}/seed-1"]["finished"] for stage in ("averaged", "mixed"))


def _second(path: Path) -> tuple[int, str]:
    import fcntl

    (path.parent / "out").mkdir()
    handle = os.open(path.parent / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return _run(path, {}, None)


def test_two_runners_are_refused(tmp_path):
    ((status, sentence),) = run_ranks(tmp_path / "log", 1, _second, write(tmp_path, {"parent": PARENT}))
    assert status == 2 and "another `cherry experiment run` works in" in sentence


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"verb": "pretrain", "set": {"megatron.train-itres": 3}}, "did you mean 'train-iters'"),
        ({"verb": "compress-depth"}, "the following arguments are required: --load"),
        ({"verb": "compress-depth", "args": {"load": "x", "align": "no"}}, "argument --align: invalid choice"),
        ({**MIXTURE, "set": {"moee.exprets": 2}}, "unknown key moee.exprets; did you mean 'experts'"),
        ({**MIXTURE, "set": {"moee.experts": 2, "mtp.depth": 1}}, "unknown key mtp.depth; did you mean 'depths'"),
        ({"verb": "pretrain", "config": "nowhere.yaml"}, "cannot read the configuration"),
    ],
)
def test_what_a_later_stage_would_be_refused_for_is_said_first(tmp_path, stage, says):
    path = write(tmp_path, {"parent": PARENT, "branch": PARENT, "bad": stage})
    status, sentence = run(path)
    assert status == 2 and f"{path}, stage bad: " in sentence and says in sentence
    assert not (tmp_path / "out").exists()


def test_slots_take_turns_over_the_gpus(monkeypatch):
    from cherry_megatron.experiments.run import slots

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = slots(("H100", "H100"), None, 2)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in found] == ["5", "7", "5", "7"]
    assert {slot.environment["OMP_NUM_THREADS"] for slot in found} == {"3"}
    assert [slot.device for slot in slots(("H100",), 0, 3)] == ["CPU"] * 3
    for gpus, jobs, says in ((3, 1, "--gpus 3: 2 can be seen"), (None, 0, "--jobs-per-gpu 0 must be positive")):
        with pytest.raises(CherryError, match=says):
            slots(("H100", "H100"), gpus, jobs)
