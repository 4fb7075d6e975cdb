"""The trainings of moee_speed.py are allowed, and what it says of them follows from their steps."""

import argparse
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from cherry_megatron import rules
from cherry_megatron.config import load


def steps(*losses, scale=1.0):
    """As a run records them; the norm of the gradient is a tenth of the loss."""
    return [
        {"loss": loss * scale, "grad_norm": loss * scale / 10, "seconds": 0.5, "peak_gib": 1.0,
         "moee": {"bytes-per-token": 96.0, "load/layer-1/0": 1.0}}
        for loss in losses
    ]  # fmt: skip


@pytest.fixture
def part(benchmark_script, monkeypatch):
    """A part with what its trainings give, by a function of (overrides, ranks); `said` and `asked` by it."""
    script = benchmark_script("moee_speed")
    found = script.Part(argparse.Namespace(steps=2), lambda line: found.said.extend(line.splitlines()))
    found.said, found.asked, found.gives = [], [], lambda overrides, ranks: steps(4.0, 2.0)

    def train_in(folder, configuration, overrides, flags, options, ranks):
        found.asked.append((configuration, overrides, flags, ranks))
        return found.gives(overrides, ranks)

    monkeypatch.setattr(script, "train_in", train_in)
    monkeypatch.setattr(script.torch.cuda, "device_count", lambda: 2)
    return found


def rows(part):
    return [line.strip("| ").split(" | ") for line in part.said if line.startswith("| ")][1:]


@pytest.mark.parametrize("name", ["graph", "cost", "parallel", "fp8", "full"])
def test_trainings_are_allowed(name, part, benchmark_script):
    benchmark_script("moee_speed").PARTS[name](part)
    assert part.asked
    for configuration, overrides, flags, ranks in part.asked:
        sequences = dict(pairwise(flags)).get("--global-batch-size", 8 * ranks)
        batch = f"megatron.global-batch-size={sequences}"
        rules.check(load(Path(f"configs/{configuration}.yaml"), [*overrides, batch]), ranks)


def test_ranks_are_held_against_one_rank_of_their_own_precision(part, benchmark_script):
    part.gives = lambda overrides, ranks: steps(4.0, 2.0, scale=1.5 if ranks == 2 else 1.0)
    benchmark_script("moee_speed").parallel(part)
    assert {flags[flags.index("--global-batch-size") + 1] for _, _, flags, _ in part.asked} == {"16"}
    low, low_pair, one, pair, other = rows(part)
    assert low_pair == [
        "FP32, width 512, two GPUs (EP=2)", "0.500", "32,768", "5.0e-01", "5.0e-01", "3.0000", "96",
    ]  # fmt: skip
    assert (low[3], one[3], pair[3], other[3]) == ("0.0e+00", "0.0e+00", "5.0e-01", "0.0e+00")
    assert pair[2] == "131,072"


def test_a_training_that_fails_is_a_line(part, benchmark_script):
    def gives(overrides, ranks):
        if "megatron.bf16=false" in overrides and ranks == 1:
            raise RuntimeError("failed with status 1")
        return steps(4.0, 2.0)

    part.gives = gives
    benchmark_script("moee_speed").parallel(part)
    assert sum(line.endswith("on 1: failed with status 1") for line in part.said) == 1
    assert [row[3:5] for row in rows(part)] == [["-", "-"], *[["0.0e+00", "0.0e+00"]] * 3]


def test_the_full_mixture_in_two_micro_batches(part, benchmark_script):
    benchmark_script("moee_speed").full(part)
    assert rows(part) == [[size, "0.500", "131,072", "1.0", "4.000", "2.000"] for size in ("4", "1")]


def test_float32_is_not_tf32(benchmark_script, tmp_path, monkeypatch):
    """Of every rank: trainings inherit the environment."""
    script, seen = benchmark_script("moee_speed"), []
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setattr(script, "PARTS", {"parallel": lambda part: seen.append(os.environ["NVIDIA_TF32_OVERRIDE"])})
    monkeypatch.setattr(script.torch.cuda, "get_device_name", lambda device: "GPU")
    given = ["--tokenizer", "t", "--data", "d", "--output", str(tmp_path / "r.md")]
    monkeypatch.setattr(sys, "argv", ["moee_speed.py", *given])
    script.main()
    assert seen == ["0"]
