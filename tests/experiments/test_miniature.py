"""A whole experiment on the CPU, through the command line: parent, averaged, recovered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
    command = [sys.executable, "-m", "cherry_megatron.cli", "experiment", *map(str, arguments)]
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
    assert [evaluation["iteration"] for evaluation in parent["evaluations"]] == [3, 6]
    assert [evaluation["iteration"] for evaluation in recovered["evaluations"]] == [0, 3, 6]
    assert set(recovered["evaluations"][0]["losses"]) == {"1", "2", "3"}
    config = yaml.safe_load((out / "recovered/seed-7/config.yaml").read_text())
    assert config["megatron"]["seed"] == 7 and config["megatron"]["load"] == str(out / "averaged/seed-7")


def test_the_report_reads_the_records(done):
    out = done[0].parent / "out"
    assert cherry("report", done[0], "--records", out / "records.jsonl", "--out", out / "report").returncode == 0
    parent, recovered = (out / "report/table.md").read_text().splitlines()[4:6]
    assert parent.startswith("| parent | 115k | ") and parent.split(" | ")[3:5] == ["1.54k", "-"]
    assert recovered.startswith("| plain average | ") and "| - |" not in recovered
