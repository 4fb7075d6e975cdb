"""Each save has a row, and its phases are told apart."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.benchmarks.conftest import FOLDER


def test_rows(benchmark_script):
    script = benchmark_script("save_cost")
    ends = {1: 1.0, 2: 2.0, 3: 9.0, 4: 10.0, 5: 11.5}  # a save after step 2
    phases = [
        {"phase": "copy to host", "seconds": 4.0, "ended": 7.0, "main": True},
        {"phase": "rest", "seconds": 1.0, "ended": 8.0, "main": True},
        {"phase": "write and hash", "seconds": 2.5, "ended": 9.5, "main": False},
        {"phase": "publish", "seconds": 0.25, "ended": 9.9, "main": True},
    ]
    first, second = script.rows("asynchronous", ends, phases, 2)
    name, step, quiet, late, share, all_late, _, *cells = first.strip("| ").split(" | ")
    assert (name, step, quiet, late, share, all_late) == ("asynchronous", "2", "1.000", "6.00", "2.00%", "6.00")
    told = dict(zip(script.PHASES, cells, strict=False))
    assert (told["rest"], told["copy to host"], told["write and hash"]) == ("1.000", "4.000", "0.000")
    assert cells[-3:] == ["1.000", "2.500", "0.250"], "the step itself, beside the training, in a later step"
    assert second.startswith("| asynchronous | 4 | 1.000 | 0.50 |")


def test_time_of_a_phase_is_without_those_inside(benchmark_script, tmp_path, monkeypatch):
    script = benchmark_script("save_phases")
    now = iter(range(100))
    monkeypatch.setattr(script.time, "monotonic", lambda: next(now))
    owner = SimpleNamespace(inner=lambda: 7, outer=lambda: owner.inner() + owner.inner())
    with (tmp_path / "phases").open("w+") as file:
        clock = script.Clock(file)
        clock.on(owner, "inner", "plan")
        clock.on(owner, "outer", "rest")
        assert owner.outer() == 14
        file.seek(0)
        told = [json.loads(line) for line in file]
    assert [(one["phase"], one["seconds"], one["main"]) for one in told] == [
        ("plan", 1, True),
        ("plan", 1, True),
        ("rest", 3, True),
    ]


@pytest.mark.full
def test_it_runs(tmp_path, data):
    output, root = tmp_path / "result.md", FOLDER.parent
    command = [sys.executable, FOLDER / "save_cost.py", "--tokenizer", data / "tokenizer", "--data", data / "text"]
    command += ["--output", output, *["--configuration", "cherry_tiny", "--steps", "4", "--interval", "2"]]
    subprocess.run(command, check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, timeout=300)
    rows = [line.split(" | ") for line in output.read_text().splitlines() if line.startswith("| ")]
    heads, synchronous, asynchronous = rows
    assert [row[0] for row in rows] == ["| saves", "| synchronous", "| asynchronous"]
    writing, beside = heads.index("write and hash"), heads.index("written beside")
    assert float(synchronous[writing]) > 0 == float(synchronous[beside])
    assert float(asynchronous[writing]) == 0 < float(asynchronous[beside])
    assert float(asynchronous[heads.index("copy to host")]) > 0
