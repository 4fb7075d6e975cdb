"""Steps that go wrong: what is decided, and that a skipped step leaves no trace."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cherry_megatron.monitor.guards import Guard, History
from cherry_megatron.monitor.options import Guards
from tests.conftest import _train, run_ranks
from tests.sgt.conftest import marked, selective  # noqa: F401
from tests.test_bad_input import verb

DROPOUT = {"hidden-dropout": 0.1, "attention-dropout": 0.1, "lr-decay-style": "constant", "lr-warmup-iters": 0}


def test_a_jump_is_measured_against_earlier_steps():
    losses = [5.0, 5.2, 4.8, 5.1, 4.9]
    history = History(8, [{"iteration": i, "loss": loss} for i, loss in enumerate(losses[:3], start=1)])
    assert history.sigmas(50.0) == 0, "too few steps to tell"
    for i, loss in enumerate(losses[3:], start=4):
        history.add({"iteration": i, "loss": loss})
    assert history.sigmas(6.0) == pytest.approx(1.0 / math.sqrt(0.02))
    history.add({"iteration": 6, "loss": 50.0, "skipped": "the loss jumps"})
    assert history.sigmas(6.0) == pytest.approx(1.0 / math.sqrt(0.02)), "a skipped loss does not count"
    assert history.skipped(()) == 1 and history.skipped([6]) == 0
    history.add({"iteration": 7, "loss": None, "selected_loss": 5.0})
    assert history.skipped(()) == 0


def test_a_constant_loss_does_not_make_every_change_a_jump():
    history = History(4, [{"iteration": i, "loss": 2.0} for i in range(1, 5)])
    assert history.sigmas(2.1) == pytest.approx(5.0)


def poison(steps: dict[int, float]) -> None:
    """Have the loss of one rank's micro-batches multiplied at these steps."""
    from functools import wraps

    from megatron.training import get_args

    from cherry_megatron.objective import Objective

    healthy = Objective.forward_step

    @wraps(healthy)
    def forward_step(self, iterator, model):
        output, loss_of = healthy(self, iterator, model)
        step = get_args().curr_iteration + 1
        factor = steps.get(step, 1.0) if get_args().rank == get_args().world_size - 1 and model.training else 1.0

        def loss(tensor):
            numerator, count, report = loss_of(tensor)
            return numerator * factor, count, {k: v * v.new_tensor([factor, 1.0]) for k, v in report.items()}

        return output, (loss if factor != 1.0 else loss_of)

    Objective.forward_step = forward_step


def train_poisoned(path: Path, steps: dict[int, float], flags: list[str]) -> None:
    poison(steps)
    _train(path, [], flags)


def steps_of(path: Path) -> list[dict]:
    from cherry_megatron.runs import read_steps

    return read_steps(path.parent / "run")


def alarms_of(path: Path) -> list[dict]:
    from cherry_megatron.monitor.alarms import read_alarms

    return read_alarms(path.parent / "run")


def weights(path: Path) -> dict[str, bytes]:
    """Weights and the optimizer's state of a run's checkpoint."""
    from cherry_megatron.storage.checkpoint import open_checkpoint

    found = open_checkpoint(path.parent / "run")
    return {name: found.read(name).tobytes() for name in found.tensors}


NAN = math.nan


def stopped(path: Path, steps: dict[int, float]) -> tuple[int, str]:
    poison(steps)
    return verb(path.parent, ["pretrain", "--config", str(path)])


ENDS = {
    "stop": ({}, {3: NAN}, "the loss of step 3 is nan, and guards.not_finite is stop; set it to skip or rewind"),
    "skip": (
        {"not_finite": "skip", "most": 2},
        dict.fromkeys(range(2, 9), math.inf),
        "of step 4 is inf, and guards.most 2 steps in a row were skipped; look at the data",
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_run_stops_with_one_sentence(name, tmp_path, write_config):
    guards, steps, says = ENDS[name]
    path = write_config(tmp_path, guards=guards)
    ((status, errors),) = run_ranks(tmp_path / "output", 1, stopped, path, steps)
    (sentence,) = [line for line in errors.splitlines() if line.startswith("cherry pretrain: ")]
    assert status == 2 and says in sentence and str(tmp_path / "run") in sentence and "Traceback" not in errors
    assert alarms_of(path)[-1]["kind"] == "stop" and not (tmp_path / "run/checkpoints/iter_0000020").exists()


def test_there_is_an_end_to_rewinds(tmp_path):
    """Rewinds to another checkpoint do not count."""
    from cherry_megatron.monitor.alarms import read_alarms, record_alarm

    def alarm(kind, text, iteration, **details):
        record_alarm(tmp_path, kind, text, iteration, **details)

    config = SimpleNamespace(guards=Guards(not_finite="rewind", most=2, rewind_batches=9), run=tmp_path)
    guard = Guard(config, SimpleNamespace(alarm=alarm))
    alarm("rewind", "", 57, checkpoint=50, leaves_out=[57])
    assert guard._rewind(3, "the loss is nan") and guard._rewind(4, "the loss is nan")
    assert not guard._rewind(4, "the loss is nan")
    assert [found["leaves_out"] for found in read_alarms(tmp_path)] == [[57], [1, 2, 3], [1, 2, 3, 4]]


def train_without(path: Path, step: int, flags: list[str]) -> None:
    """Leave a step out by Megatron's own --iterations-to-skip, which reads its batch and does nothing else."""
    from megatron.training import training

    train = training.train

    def train_then(*args, **kwargs):
        training.get_args().iterations_to_skip = [step]
        return train(*args, **kwargs)

    training.train = train_then
    _train(path, [], flags)


def test_a_skipped_step_leaves_no_trace(tmp_path, selective):  # noqa: F811
    """Weights, moments, dropout and schedule go on as if only the batch had been read; after a resume too, with the
    next batch and its marks."""
    megatron = {**DROPOUT, "train-iters": 6, "lr-decay-style": "cosine", "save-interval": 4}
    guards = {"not_finite": "skip", "spike": "skip", "spike_window": 2, "spike_sigmas": 8.0}
    sections = {"megatron": megatron, "guards": guards}
    path = selective(tmp_path / "skipped", sections, marks="some")
    run_ranks(tmp_path / "skipped", 1, train_poisoned, path, {3: NAN, 5: 2.0}, [])
    steps = steps_of(path)
    assert [step["iteration"] for step in steps if "skipped" in step] == [3, 5]
    assert steps[2]["loss"] is None and "NaN" not in (tmp_path / "skipped/run/steps.jsonl").read_text()
    assert steps[2]["skipped"] == "the loss of step 3 is nan"
    assert "standard deviations above the mean" in steps[4]["skipped"]
    assert [(a["kind"], a["iteration"]) for a in alarms_of(path)] == [("skip", 3), ("skip", 5)]

    other = selective(tmp_path / "again", sections, marks="some")
    shutil.copytree(tmp_path / "skipped/run", tmp_path / "again/run")
    (tmp_path / "again/run/checkpoints/latest_checkpointed_iteration.txt").write_text("4")
    shutil.rmtree(tmp_path / "again/run/checkpoints/iter_0000006")
    run_ranks(tmp_path / "again", 1, train_poisoned, other, {5: 2.0}, [])
    assert weights(other) == weights(path)

    reference = selective(tmp_path / "without", {"megatron": megatron}, marks="some")
    run_ranks(tmp_path / "without", 1, train_without, reference, 3, ["--exit-interval", "4"])
    shutil.rmtree(tmp_path / "skipped/run/checkpoints/iter_0000006")
    (tmp_path / "skipped/run/checkpoints/latest_checkpointed_iteration.txt").write_text("4")
    assert weights(path) == weights(reference)


LAYOUTS = {
    "pp2": "--pipeline-model-parallel-size 2",
    "dp2": "",
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
}


@pytest.mark.parametrize(
    "name", ["pp2", pytest.param("dp2", marks=pytest.mark.full), pytest.param("tp2", marks=pytest.mark.full)]
)
def test_all_ranks_go_back_together(name, tmp_path, write_config):
    """Half of the ranks see what is wrong. All end to be started again, and leave the batch out."""
    megatron = {"train-iters": 5, "save-interval": 2}
    path = write_config(tmp_path / "run", megatron=megatron, guards={"not_finite": "rewind", "rewind_batches": 2})
    flags = LAYOUTS[name].split()
    with pytest.raises(AssertionError, match="exit 75"):
        run_ranks(tmp_path / "first", 2, train_poisoned, path, {4: math.inf}, flags)
    (alarm,) = alarms_of(path)
    assert (alarm["kind"], alarm["iteration"], alarm["checkpoint"], alarm["leaves_out"]) == ("rewind", 4, 2, [3, 4])
    run_ranks(tmp_path / "second", 2, train_poisoned, path, {4: math.inf}, flags)
    steps = steps_of(path)
    assert [step.get("skipped") for step in steps] == [None, None, "left out", "left out", None]
    reference = write_config(tmp_path / "reference", megatron=megatron, guards={"leave_out": [3, 4]})
    run_ranks(tmp_path / "third", 1, train_poisoned, reference, {}, [])
    for ours, theirs in zip(steps, steps_of(reference), strict=True):
        if ours["iteration"] != 4:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
