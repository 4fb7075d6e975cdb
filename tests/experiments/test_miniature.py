"""A whole experiment on the CPU: parent, averaged, recovered, a mixture of both, and selective training."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.conftest import run_ranks
from tests.sgt.conftest import mark

DENSE = {"recurrence.pattern": "(*-)x8"}
EXPERIMENT = {
    "about": "Does a model of averaged layers begin below a new one?",
    "config": "config.yaml",
    "seeds": [7, 8],
    "stages": {
        "parent": {"verb": "pretrain", "set": DENSE},
        "averaged": {"verb": "compress-depth", "seeds": [7], "args": {"load": "{parent}"}},
        "recovered": {
            "label": "plain average",
            "verb": "pretrain",
            "seeds": [7],
            "set": {"megatron.load": "{averaged}", "megatron.finetune": True},
        },
        "assembled": {
            "verb": "assemble-moee",
            "seeds": [7],
            "args": {"load": ["{recovered}", "{averaged}"]},
            "set": {"moee.experts": 2},
        },
        "mixture": {
            "verb": "pretrain",
            "seeds": [7],
            "set": {
                "megatron.load": "{assembled}",
                "megatron.finetune": True,
                "moee.experts": 2,
                "moee.prefix": 8,
            },
        },
        "random": {
            "verb": "pretrain",
            "set": {**DENSE, "sgt.marks": "random", "sgt.alpha": 0.7, "sgt.probe_interval": 3},
        },
    },
}


def cherry(*arguments: object) -> str:
    """What a verb prints."""
    command = [sys.executable, "-m", "cherry_megatron.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=400)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def _mark(prefix: Path) -> None:
    draw = np.random.default_rng(3)
    mark(prefix, "random", lambda documents, _: draw.random(len(documents)) < 0.25)


@pytest.fixture(scope="module")
def done(tmp_path_factory, data, write_config) -> tuple[Path, str]:
    """An experiment's file that has been run to its end, and what was printed."""
    folder = tmp_path_factory.mktemp("miniature")
    for suffix in (".bin", ".idx", ".json"):
        (folder / f"text{suffix}").symlink_to(data / f"text{suffix}")
    run_ranks(folder / "logs", 1, _mark, folder / "text")
    recurrence = {"pattern": "*-[*-*-]x3*-", "loop_scales": False}
    megatron = {"data-path": [str(folder / "text")], "train-iters": 6, "eval-interval": 3}
    write_config(folder, recurrence=recurrence, megatron=megatron)
    (folder / "mini.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    printed = cherry("experiment", "run", folder / "mini.yaml", "--out", folder / "out", "--jobs-per-gpu", 2)
    return folder / "mini.yaml", printed


@pytest.fixture(scope="module")
def records(done) -> dict[tuple[str, int], dict]:
    """The records by stage and seed."""
    lines = (done[0].parent / "out/records.jsonl").read_text().splitlines()
    return {(record["stage"], record["seed"]): record for record in map(json.loads, lines)}


@pytest.fixture(scope="module")
def table(done) -> list[str]:
    """The lines of the report's table."""
    out = done[0].parent / "out"
    cherry("experiment", "report", done[0], "--records", out / "records.jsonl", "--out", out / "report")
    return (out / "report/table.md").read_text().splitlines()


def test_every_stage_is_run_and_recorded(done, records):
    path, output = done
    out = path.parent / "out"
    assert "8 of 8 tasks are done, 0 failed" in output
    assert records.keys() == {
        ("parent", 7), ("parent", 8), ("averaged", 7), ("recovered", 7), ("random", 7), ("random", 8),
        ("assembled", 7), ("mixture", 7),
    }  # fmt: skip
    assert all(record["finished"] and record["device"] == "CPU" for record in records.values())
    assert str(out) not in (out / "records.jsonl").read_text()
    parent, averaged, recovered = (records[stage, 7] for stage in ("parent", "averaged", "recovered"))
    # 8 layers of 3 x 32 x 64 + 4 x 32 x 32 weights and two norms, twice the vocabulary, the last norm.
    assert parent["parameters"] == 8 * (3 * 32 * 64 + 4 * 32 * 32 + 2 * 32) + 2 * 512 * 32 + 32
    assert (parent["steps"], parent["tokens_per_step"], parent["loops"]) == (6, 8 * 32, 1)
    assert averaged["plan"][0] == {"layers": [0, 1], "weights": [1.0, 1.0]}
    assert recovered["label"] == "plain average" and recovered["loops"] == 3
    assert [evaluation["iteration"] for evaluation in parent["evaluations"]] == [0, 3, 6]
    assert [evaluation["iteration"] for evaluation in recovered["evaluations"]] == [0, 3, 6]
    assert set(recovered["evaluations"][0]["losses"]) == {"1", "2", "3"}
    config = yaml.safe_load((out / "recovered/seed-7/config.yaml").read_text())
    assert config["megatron"]["seed"] == 7 and config["megatron"]["load"] == str(out / "averaged/seed-7")


def test_the_report_reads_the_records(table):
    parent, recovered = table[4:6]
    assert parent.startswith("| parent | 115k | ") and parent.split(" | ")[3] == "1.54k"
    assert recovered.startswith("| plain average | ") and "| - |" not in recovered


def test_a_mixture_is_assembled_and_reported_beside_its_experts(done, records, table):
    assembled, mixture = records["assembled", 7], records["mixture", 7]
    assert assembled["moee"]["experts"] == 2
    assert "--load recovered/seed-7 averaged/seed-7 --save=assembled/seed-7 " in assembled["command"]
    each = records["recovered", 7]["parameters"]
    # The router: a vector of 64 for each of 512 words, 64 x 128 and 2 x 64 weights.
    assert mixture["parameters"] == mixture["active_parameters"] == 2 * each + 64 * 512 + 64 * 128 + 2 * 64
    start = mixture["evaluations"][0]
    assert start["iteration"] == 0 and set(start["moee"]["3"]) >= {"loss/0", "loss/1"}
    cells = [
        f"{loss:.4f} (1)" for loss in (start["losses"]["3"], *(start["moee"]["3"][f"loss/{e}"] for e in (0, 1)))
    ]
    assert f"| mixture | 0 | {' | '.join(cells)} |" in table
    # An expert is the run that it was, on other targets: those of the prefix are left out.
    before = [records["recovered", 7]["evaluations"][step]["losses"]["3"] for step in (-1, 0)]
    assert all(abs(start["moee"]["3"][f"loss/{e}"] - before[e]) < 0.2 for e in (0, 1))


def test_what_the_report_of_selective_training_needs_is_recorded(records):
    for seed in (7, 8):
        full, random = records["parent", seed], records["random", seed]
        assert full["base"] == random["base"] and "sgt" not in full
        assert random["sgt"]["marks"] == "random" and abs(random["rho"] - 0.25) < 0.02
        assert [probe["iteration"] for probe in random["probes"]] == [3, 6]
        assert full["evaluations"][0]["losses"] == random["evaluations"][0]["losses"]
    assert len({records[task]["base"] for task in (("parent", 7), ("parent", 8), ("recovered", 7))}) == 3


def test_selective_training_is_reported_beside_full_supervision(done, records, table):
    def gain(stage: str, seed: int) -> float:
        losses = [evaluation["losses"]["1"] for evaluation in records[stage, seed]["evaluations"]]
        return losses[0] - losses[-1]

    recovered = [gain("random", seed) / gain("parent", seed) for seed in (7, 8)]
    mean, deviation = statistics.mean(recovered), statistics.stdev(recovered)
    row = next(line for line in table if line.startswith("| random | 0.7 |"))
    assert row.endswith("| 6 |") and f"| {mean:.3f} ± {deviation:.3f} (2) |" in row
    out = done[0].parent / "out"
    assert {"coupling-cos.svg", "coupling-ratio.svg", "recovered.svg"} <= {
        path.name for path in (out / "report").glob("*.svg")
    }
    # The runs' folders tell the same.
    folders = [out / f"{stage}/seed-{seed}" for stage in ("parent", "random") for seed in (7, 8)]
    assert row in cherry("report", "--sgt", *folders)
