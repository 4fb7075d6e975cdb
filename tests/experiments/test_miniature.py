"""A whole experiment on the CPU, through the command line: parent, averaged, recovered."""

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

EXPERIMENT = {
    "about": "Does a model of averaged layers begin below a new one?",
    "config": "config.yaml",
    "seeds": [7],
    "stages": {
        "parent": {"verb": "pretrain", "set": {"recurrence.pattern": "(*-)x8"}},
        "averaged": {"verb": "compress-depth", "args": {"load": "{parent}"}},
        "recovered": {
            "label": "plain average",
            "verb": "pretrain",
            "set": {"megatron.load": "{averaged}", "megatron.finetune": True},
        },
    },
}


def cherry(*arguments: object) -> subprocess.CompletedProcess[str]:
    return verb("experiment", *arguments)


def verb(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cherry_megatron.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


@pytest.fixture(scope="module")
def done(tmp_path_factory, write_config) -> tuple[Path, str]:
    """An experiment's file that has been run to its end, and what was printed."""
    folder = tmp_path_factory.mktemp("miniature")
    recurrence = {"pattern": "*-[*-*-]x3*-", "loop_scales": False}
    write_config(folder, recurrence=recurrence, megatron={"train-iters": 6, "eval-interval": 3})
    (folder / "mini.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    ran = cherry("run", folder / "mini.yaml", "--out", folder / "out")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder / "mini.yaml", ran.stdout


def test_every_stage_is_run_and_recorded(done):
    path, output = done
    out = path.parent / "out"
    assert "3 of 3 tasks are done, 0 failed" in output
    parent, averaged, recovered = (json.loads(line) for line in (out / "records.jsonl").read_text().splitlines())
    assert [record["stage"] for record in (parent, averaged, recovered)] == ["parent", "averaged", "recovered"]
    assert all(record["finished"] and record["device"] == "CPU" for record in (parent, averaged, recovered))
    assert str(out) not in (out / "records.jsonl").read_text()
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


def test_the_report_reads_the_records(done):
    out = done[0].parent / "out"
    assert cherry("report", done[0], "--records", out / "records.jsonl", "--out", out / "report").returncode == 0
    parent, recovered = (out / "report/table.md").read_text().splitlines()[4:6]
    assert parent.startswith("| parent | 115k | ") and parent.split(" | ")[3] == "1.54k"
    assert recovered.startswith("| plain average | ") and "| - |" not in recovered


SELECTIVE = {
    "about": "What does a random share of the tokens recover?",
    "config": "config.yaml",
    "seeds": [1, 2],
    "stages": {
        "full": {"verb": "pretrain"},
        "random": {"verb": "pretrain", "set": {"sgt.marks": "random", "sgt.alpha": 0.7, "sgt.probe_interval": 4}},
    },
}


def _mark(prefix: Path) -> None:
    draw = np.random.default_rng(3)
    mark(prefix, "random", lambda documents, _: draw.random(len(documents)) < 0.25)


def test_selective_training_is_reported_beside_full_supervision(data, tmp_path, write_config):
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"text{suffix}").symlink_to(data / f"text{suffix}")
    run_ranks(tmp_path / "logs", 1, _mark, tmp_path / "text")
    megatron = {"data-path": [str(tmp_path / "text")], "train-iters": 8, "eval-interval": 4, "lr": 1e-2}
    write_config(tmp_path, evaluation={"loops": [1]}, megatron=megatron)
    (tmp_path / "sgt.yaml").write_text(yaml.safe_dump(SELECTIVE, sort_keys=False))
    out = tmp_path / "out"
    ran = cherry("run", tmp_path / "sgt.yaml", "--out", out, "--jobs-per-gpu", 2)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    records = {
        (r["stage"], r["seed"]): r for r in map(json.loads, (out / "records.jsonl").read_text().splitlines())
    }
    for seed in (1, 2):
        full, random = records["full", seed], records["random", seed]
        assert full["base"] == random["base"] and "sgt" not in full
        assert random["sgt"]["marks"] == "random" and abs(random["rho"] - 0.25) < 0.02
        assert [probe["iteration"] for probe in random["probes"]] == [4, 8]
        assert full["evaluations"][0]["losses"] == random["evaluations"][0]["losses"]
    assert records["full", 1]["base"] != records["full", 2]["base"]

    assert cherry("report", tmp_path / "sgt.yaml", "--records", out / "records.jsonl", "--out", out).returncode == 0
    table = (out / "table.md").read_text()
    gained = [
        (random[0] - random[8]) / (full[0] - full[8])
        for full, random in ((losses(records[stage, s]) for stage in ("full", "random")) for s in (1, 2))
    ]
    both = f"{statistics.mean(gained):.3f} ± {statistics.stdev(gained):.3f} (2)"
    assert f"| {both} |" in next(line for line in table.splitlines() if line.startswith("| random | 0.7 |"))
    assert {path.name for path in out.glob("*.svg")} >= {"coupling-cos.svg", "coupling-ratio.svg", "recovered.svg"}

    # The folders tell the same.
    printed = verb("report", "--sgt", *(out / f"{stage}/seed-{seed}" for stage, seed in records)).stdout
    assert table[table.index("| random | 0.7 |") :].split("\n")[0] == next(
        line for line in printed.split("\n") if line.startswith("| random | 0.7 |")
    )


def losses(record: dict) -> dict[int, float]:
    """Step -> loss with all loops."""
    return {evaluation["iteration"]: evaluation["losses"]["3"] for evaluation in record["evaluations"]}
