"""What a configuration says reaches Megatron, and what a run keeps of it can be given back."""

import contextlib
import io
import os
import sys
from pathlib import Path

import yaml

from tests.conftest import run_ranks


def load_and_load_again(path: Path, kept: Path, flags: list[str]) -> None:
    from cherry_megatron.config import load

    started = load(path, ["recurrence.pattern=*-[(*-)x2]x2*-"], flags)
    kept.write_text(yaml.safe_dump(started.as_dict()))
    assert started.recurrence.pattern == "*-[(*-)x2]x2*-"
    assert load(kept).as_dict() == started.as_dict()
    assert load(kept).hash() == started.hash()
    assert load(kept).value("seed") == 7
    assert load(kept, flags=["--seed", "8"]).value("seed") == 8


def test_what_a_run_keeps_is_a_configuration(tmp_path: Path, write_config):
    flags = ["--seed", "7", "--lr-warmup-iters", "1"]
    run_ranks(tmp_path, 1, load_and_load_again, write_config(tmp_path), tmp_path / "kept.yaml", flags)


def output(arguments: list[str]) -> tuple[int, str]:
    from cherry_megatron.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main(arguments)
    return status, out.getvalue()


def test_doctor_says_how_many_processes_to_start(tmp_path: Path, write_config):
    path = write_config(tmp_path, megatron={"tensor-model-parallel-size": 2})
    ((status, said),) = run_ranks(tmp_path, 1, output, ["doctor", "--config", str(path)])
    assert status == 0
    assert "can run here" in said and "start it with a multiple of 2 processes" in said
    for _, said in run_ranks(tmp_path, 2, output, ["doctor", "--config", str(path)]):
        assert "can run here" in said and "start it" not in said


def into_a_closed_pipe(arguments: list[str]) -> int:
    from cherry_megatron.cli import main

    reading, writing = os.pipe()
    os.close(reading)
    sys.stdout = os.fdopen(writing, "w")
    status = main(arguments)
    sys.stdout.close()
    return status


def test_a_reader_that_has_seen_enough(tmp_path: Path, write_config):
    assert run_ranks(tmp_path, 1, into_a_closed_pipe, ["params", str(write_config(tmp_path))]) == [141]


def load_branches() -> list[tuple]:
    from cherry_megatron.config import load
    from cherry_megatron.platform.machine import prepare

    prepare()
    found = []
    for branch in (None, "3"):
        if branch is not None:
            os.environ["CHERRY_BRANCH"] = branch
        config = load(Path(__file__).parents[1] / "configs/branch_227m.yaml")
        values = (config.value(flag) for flag in ("seed", "data-path", "load", "finetune"))
        found.append((str(config.run), *values))
    return found


def test_branches_differ_in_text_and_seed_alone(tmp_path: Path):
    ((*found,),) = run_ranks(tmp_path, 1, load_branches)
    assert found == [
        ("runs/branch_227m/0", 10, ["data/shard0"], "runs/compressed_227m", True),
        ("runs/branch_227m/3", 13, ["data/shard3"], "runs/compressed_227m", True),
    ]
