"""`cherry plan` as a user meets it."""

import contextlib
import io
from pathlib import Path

import pytest

from cherry_megatron.errors import CherryError
from cherry_megatron.planner.coefficients import read
from cherry_megatron.planner.hardware import GPUS
from tests.conftest import run_ranks
from tests.planner.conftest import DERIVED


def said(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    from cherry_megatron.cli import main

    found = []
    for command in commands:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = main(["plan", *command])
        found.append((status, out.getvalue(), err.getvalue()))
    return found


def test_what_is_printed(tmp_path: Path):
    config = str(Path(__file__).parents[2] / "configs/cherry_227m.yaml")
    plan, scale = [config, "--gpus", "2", "--gpu", "h200"], [config, "--scale", "8,64"]
    wrong = [
        [config], [config, "--gpus", "0"], [config, "--gpus", "2", "--gpu", "a100"], [config, "--scale", "8,many"],
        [config, "--gpus", "37"], [config, "--scale", "0,8"],
    ]  # fmt: skip
    (found,) = run_ranks(tmp_path, 1, said, [plan, scale, *wrong])
    (status, text, _), (scaled, table, _), *refused = found
    assert status == scaled == 0
    assert "cherry_227m.yaml on 2 H200, 512 sequences of 4096 a step" in text
    assert "They are not calibrated on this kind of machine yet" in text or read("h200").calibrated
    (proposal,) = [line for line in text.splitlines() if line.startswith("proposal: ")]
    assert "DP=2" in proposal and "--set megatron.micro-batch-size=" in text
    assert "What this assumes:" in table
    rows = [line for line in table.splitlines() if line.lstrip().startswith(("8 ", "64 "))]
    assert len(rows) == 4  # both numbers of GPUs, with the batch as it is and grown
    assert rows[0].split()[0] == "8" and "4096" in rows[3].split()
    for status, text, error in refused:
        assert status == 2 and not text and error.count("\n") == 1, error
    assert "--gpu a100 is not one of h100, h200" in refused[2][2]


def test_coefficients_are_there_for_each_gpu_and_looked_at(tmp_path: Path):
    for gpu in GPUS:
        assert read(gpu).source
    path = tmp_path / "other.yaml"
    path.write_text(DERIVED.read_text().replace("  skew: 0.02\n", "  skew: -0.02\n"))
    with pytest.raises(CherryError, match=r"other\.yaml: skew -0.02 must be"):
        read("h100", path)
    path.write_text(DERIVED.read_text().replace("  link: 0.75\n", "  link: 0.0\n"))
    with pytest.raises(CherryError, match=r"other\.yaml: link is 0"):
        read("h100", path)
    path.write_text(DERIVED.read_text().replace("  skew: 0.02\n", ""))
    with pytest.raises(CherryError, match=r"h100\.skew is missing"):
        read("h100", path)
    path.write_text("h100: {}\n")
    with pytest.raises(CherryError, match="no coefficients of h200"):
        read("h200", path)
