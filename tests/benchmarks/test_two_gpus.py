"""The script that runs the others gives them arguments that they have, and goes on where it was stopped."""

import os
import subprocess
from pathlib import Path

from tests.benchmarks.conftest import FOLDER

# In Python's place: writes down what it is called with; one part fails.
STUB = """#!/bin/sh
echo "$*" >>"$SEEN"
case "$*" in *moee_speed*) exit 1 ;; esac
"""


def test_parts_and_going_on(tmp_path: Path):
    stub, seen = tmp_path / "python", tmp_path / "seen"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def start(*seconds: str) -> list[str]:
        seen.write_text("")
        command = ["sh", str(FOLDER / "two_gpus.sh"), "tokenizer", "data", str(tmp_path / "out"), *seconds]
        given = {"PYTHON": str(stub), "SEEN": str(seen), "CHERRY_SHARDS": "shards/"}
        subprocess.run(command, check=not seconds, env={**os.environ, **given}, timeout=60)
        return seen.read_text().splitlines()

    assert not start("0"), "there is no time"
    calls = start()
    assert len(calls) == 16
    for call in calls:
        program, *arguments = call.split()
        if program == "-m":
            continue
        source = (FOLDER.parent / program).read_text()
        if "sys.argv[1:]" in source:  # they are handed on to cherry
            continue
        flags = [one for one in arguments[:-1] if one.startswith("--") and one not in _megatron(arguments)]
        assert all(f'"{flag}"' in source for flag in flags), call
    assert [call.split()[0] for call in start()] == ["benchmarks/moee_speed.py"], "only what failed is run again"


def _megatron(arguments: list[str]) -> list[str]:
    """What stands behind --flags, which the stub sees as one string."""
    return arguments[arguments.index("--flags") + 1 :] if "--flags" in arguments else []


def test_nothing_begins_where_a_training_fails(tmp_path: Path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$*" >>"$SEEN"\nexit 1\n')
    stub.chmod(0o755)
    command = ["sh", str(FOLDER / "two_gpus.sh"), "tokenizer", "data", str(tmp_path / "out")]
    given = {"PYTHON": str(stub), "SEEN": str(tmp_path / "seen")}
    assert subprocess.run(command, env={**os.environ, **given}, timeout=60, check=False).returncode == 1
    assert (tmp_path / "seen").read_text().count("\n") == 1


def test_parts_end_when_the_time_is_over(tmp_path: Path):
    """A part of the second GPU would take a minute; what comes behind it is not begun."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$*" >>"$SEEN"\ncase "$*" in *save_cost*) sleep 60 ;; *) sleep 0.1 ;; esac\n')
    stub.chmod(0o755)
    command = ["sh", str(FOLDER / "two_gpus.sh"), "tokenizer", "data", str(tmp_path / "out"), "2"]
    given = {"PYTHON": str(stub), "SEEN": str(tmp_path / "seen")}
    done = subprocess.run(
        command, check=True, env={**os.environ, **given}, timeout=30, capture_output=True, text=True
    )
    assert "save-cost ends with status 124" in done.stdout
    assert "guards" not in (tmp_path / "seen").read_text()
    assert not (tmp_path / "out/save-cost.done").exists()
