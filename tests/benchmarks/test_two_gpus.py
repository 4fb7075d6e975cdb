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

    def start() -> list[str]:
        seen.unlink(missing_ok=True)
        command = ["sh", str(FOLDER / "two_gpus.sh"), "tokenizer", "data", str(tmp_path / "out")]
        given = {"PYTHON": str(stub), "SEEN": str(seen), "CHERRY_SHARDS": "shards/"}
        subprocess.run(command, check=True, env={**os.environ, **given}, timeout=60)
        return seen.read_text().splitlines()

    calls = start()
    assert len(calls) == 12
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
