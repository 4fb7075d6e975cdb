"""The whole chain: `cherry pretrain` writes what it promises, `cherry evaluate` reads it."""

import json
import math
from pathlib import Path

import pytest
import yaml

from tests.conftest import run_ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_config, train):
    folder = tmp_path_factory.mktemp("whole")
    path = write_config(
        folder, megatron={"train-iters": 12, "eval-interval": 6, "save-interval": 6, "eval-iters": 2}
    )
    train(path)
    return path, folder / "run", (folder / "output" / "rank0.out").read_text()


def test_one_line_an_interval(run):
    _, _, output = run
    lines = [line for line in output.splitlines() if line.startswith("step")]
    steps = [line for line in lines if "grad norm" in line]
    assert [line.split()[1] for line in steps] == ["5/12", "10/12", "12/12"]
    for word in ("loss", "grad norm", "lr", "tokens/s", "TFLOP/s", "MFU", "left"):
        assert word in steps[0]
    assert sum("held-out loss" in line for line in lines) >= 2
    assert "1: " in next(line for line in lines if "loss by loops" in line)


def test_the_resolved_configuration_is_recorded(run):
    path, folder, _ = run
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["recurrence"]["loops"] == 3
    assert resolved["megatron"]["calculate-per-token-loss"] is True
    (start,) = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert start["config"] == str(path)
    assert len(start["config_hash"]) == 12
    assert start["versions"]["megatron-core"].startswith("0.19")
    assert start["command"]


def test_tensorboard_reads_back(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, folder, _ = run
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"lm loss", "grad-norm", "learning-rate", "lm loss validation"} <= tags
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [e.step for e in events.Scalars("lm loss")] == [s["iteration"] for s in steps] == list(range(1, 13))
    assert [e.value for e in events.Scalars("lm loss")] == pytest.approx([s["loss"] for s in steps])
    for loops in (1, 2, 3):
        assert [e.step for e in events.Scalars(f"cherry/loss-by-loops/{loops}")] == [6, 12]
        for name in ("residual-norm", "relative-change", "token-correlation"):
            values = [e.value for e in events.Scalars(f"cherry/{name}/loop-{loops}")]
            assert len(values) == 2
            assert all(math.isfinite(v) for v in values)
    assert all(-1 <= e.value <= 1 for e in events.Scalars("cherry/token-correlation/loop-1"))
    assert {"cherry/throughput/tokens-per-second", "cherry/throughput/tflops-per-device"} <= tags


def test_the_learning_rate_is_that_of_the_step(run):
    """Two of warmup, then half a cosine; the schedule counts the steps that are done, so the first has none yet."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, folder, output = run
    wanted = [0.0, 5e-4, *(1e-3 * (1 + math.cos(math.pi * done / 10)) / 2 for done in range(10))]
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [s["learning_rate"] for s in steps[:12]] == pytest.approx(wanted, rel=1e-6)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [e.value for e in events.Scalars("learning-rate")][:12] == pytest.approx(wanted, rel=1e-6)
    assert f"lr {wanted[4]:.2e}" in next(line for line in output.splitlines() if line.startswith("step       5/12"))


def _evaluate(path: Path, loops: list[int], flags: list[str]) -> dict[int, float]:
    from cherry_megatron.config import load
    from cherry_megatron.platform.machine import prepare

    machine = prepare()
    from cherry_megatron.evaluate import evaluate

    return evaluate(load(path, (), flags), machine, loops).losses


def test_evaluate_reproduces_the_trainings_losses(run, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, folder, _ = run
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    (losses,) = run_ranks(tmp_path / "one", 1, _evaluate, path, [1, 2, 3, 6], [])
    assert set(losses) == {1, 2, 3, 6}
    for loops in (1, 2, 3):
        assert losses[loops] == pytest.approx(events.Scalars(f"cherry/loss-by-loops/{loops}")[-1].value, rel=1e-5)
    recorded = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert recorded[-1] == {
        "iteration": recorded[-2]["iteration"],
        "losses": {str(k): v for k, v in losses.items()},
    }
    # More loops than trained, and another layout.
    flags = ["--pipeline-model-parallel-size", "2"]
    staged = run_ranks(tmp_path / "two", 2, _evaluate, path, [1, 2, 3, 6], flags)[-1]
    assert staged == pytest.approx(losses, rel=1e-5)


def test_a_second_start_goes_on(run, train, tmp_path: Path):
    path, folder, _ = run
    steps = train(path, flags="--train-iters 14")
    assert [s["iteration"] for s in steps] == list(range(1, 15))
    assert len((folder / "starts.jsonl").read_text().splitlines()) == 2
