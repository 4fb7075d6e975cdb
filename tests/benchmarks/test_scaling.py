"""The trainings of scaling.py are allowed, its figures follow from what was measured, and it runs to its end."""

import argparse
import math
import subprocess
import sys
from pathlib import Path

import pytest

from cherry_megatron import rules
from cherry_megatron.config import load
from tests.benchmarks.conftest import FOLDER
from tests.benchmarks.test_profile_step import kernel


@pytest.mark.parametrize("small", [False, True], ids=["full width", "tiny"])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_trainings_are_allowed(count, small, benchmark_script):
    rows = benchmark_script("scaling_rows")
    for group, trainings in rows.groups(count).items():
        (_, alone), *others = trainings.items()
        assert alone.ranks == 1
        assert others
        for training in (rows.tiny(one) if small else one for one in trainings.values()):
            rules.check(training.config, training.ranks)
            assert training.ranks in (1, count), group
    assert all(name in rows.groups(count)[group] for group, name in rows.exchanging(count))


def test_pipeline_stages_have_many_micro_batches(benchmark_script):
    training = benchmark_script("scaling_rows").groups(8)["base_1b"]["PP=4 x DP=2"]
    assert training.sequences == 32 * 2 * training.config.value("micro-batch-size")


def test_efficiency_is_of_tokens_of_a_gpu(tmp_path, benchmark_script):
    script = benchmark_script("scaling")
    options = argparse.Namespace(
        only=None, tiny=False, predict="h100", work=tmp_path, output=tmp_path / "r.md", seconds=0, steps=2
    )
    scaling = script.Scaling(options, 8)
    scaling.measuring.keep("cherry_227m: one GPU", [9.0, 9.0, 0.5, 0.5], 30.0)
    scaling.measuring.keep("cherry_227m: PP=2 x DP=4", [9.0, 9.0, 5.0, 5.0], 20.0)  # 512 sequences, not 64
    *_, first, _, _, _, second, _, _ = scaling._table("cherry_227m", scaling.groups["cherry_227m"])
    assert first.startswith("| one GPU | 0.500 | 65,536 | 65,536 | 100.0% | 30.0 | ")
    assert second.startswith("| PP=2 x DP=4 | 5.000 | 419,430 | 52,429 | 80.0% | 20.0 | ")
    assert "nan" not in first + second


def test_exchange_beside_nothing_else(benchmark_script):
    exposed = benchmark_script("profile_step").exposed
    events = [
        kernel("nvjet", 0, 60),
        kernel("ncclDevKernel_ReduceScatter", 40, 40),  # the later half beside nothing
        kernel("Memcpy DtoD", 90, 10, "gpu_memcpy"),
        kernel("ncclDevKernel_AllGather", 95, 5),
        kernel("cudaLaunchKernel", 0, 500, "cuda_runtime"),
    ]
    assert math.isclose(exposed(events), 20 / 100)


@pytest.fixture
def scaling(tmp_path, benchmark_script):
    """Of two GPUs, with no time to run anything."""
    options = argparse.Namespace(
        only=["cherry_227m"], tiny=False, predict=None, work=tmp_path, output=tmp_path / "r.md", seconds=0, steps=2
    )
    return benchmark_script("scaling").Scaling(options, 2)


def test_what_time_did_not_allow_is_for_another_start(scaling):
    scaling.measure()
    assert scaling.measuring.late
    assert "cherry_227m: DP=2: not run, no time left" in scaling.options.output.read_text()


def test_an_exchange_trains_as_the_others_do_and_needs_no_trace(scaling, monkeypatch):
    """A small text has a validation split, no optimizer is saved; bytes are kept where the profiler saw nothing."""
    seen = []

    def program(key, script, training, given):
        seen.extend(given)
        return {"data-parallel, all_reduce": 8.0}

    monkeypatch.setattr(scaling, "_program", program)
    scaling.on_gpu = True
    name, training = next(iter(scaling.groups["cherry_227m"].items()))
    scaling._exchange(f"exchange of cherry_227m, {name}", training)
    assert {"--set=megatron.split=98,1,1", "--set=megatron.no-save-optim=true"} <= set(seen)
    load(Path("configs/cherry_227m.yaml"), [one.removeprefix("--set=") for one in seen])
    assert "no trace: " in scaling.measuring.missed[0]
    assert list(scaling._exchanged())[-1].endswith("| data-parallel | all_reduce | 8 | - |")


def test_predictions_alone(tmp_path):
    command = [sys.executable, str(FOLDER / "scaling.py"), "--predict", "h200", "--gpus", "8"]
    subprocess.run([*command, "--output", str(tmp_path / "r.md")], check=True, capture_output=True)
    found = (tmp_path / "r.md").read_text()
    assert "**Nothing was measured.**" in found
    assert "| DP=8 | - | - | - | - | - | 0." in found


def _run(script, folder, data, *arguments):
    """What a script writes at small width on two ranks."""
    command = [sys.executable, str(FOLDER / script), "--tiny", "--gpus", "2", "--output", str(folder / "result.md")]
    text = ["--tokenizer", str(data / "tokenizer"), "--data", str(data / "text")]
    subprocess.run([*command, *text, *arguments], check=True, capture_output=True, timeout=600)
    return (folder / "result.md").read_text()


@pytest.mark.full
def test_scaling_to_its_end(tmp_path, data):
    group = "CHERRY-1.8B, 8 experts, 2 see a sequence"
    found = _run("scaling.py", tmp_path, data, "--work", str(tmp_path / "work"), "--steps", "3", "--only", group)
    table = found.split(f"## {group}")[1].split("##")[0]
    rows = [line.split(" | ") for line in table.splitlines() if "forced" in line or "learned" in line]
    assert [len(row) for row in rows] == [9, 9]
    assert all(float(row[1]) > 0 for row in rows), table
    assert "| expert-parallel | all_to_all_single | " in found


@pytest.mark.full
def test_resuming_on_other_numbers_of_ranks_and_after_a_kill(tmp_path, data):
    """On a CPU the same layout gives the same bits, and another one rounds otherwise."""
    found = _run("host_resume.py", tmp_path, data)
    rows = {line.split(" | ")[0]: line.split(" | ")[2:] for line in found.splitlines() if line.startswith("| ")}
    assert (
        rows["| the same again"]
        == rows["| a rank killed while it saved, started again"]
        == ["0.0e+00", "0.0e+00 |"]
    )
    assert float(rows["| 2, 1 and 2 GPUs, 4 steps each"][0]) < 1e-5
    assert "left: .iter_0000004.partial" in found
