"""`cherry data` that is killed: a second run goes on from its parts, or does not, and gives the same bytes."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from cherry_megatron import cli
from cherry_megatron.data import prepare, text
from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.data.parts import Parts, Position
from cherry_megatron.errors import CherryError
from tests.conftest import run_ranks
from tests.data.conftest import contents, run, small_parts, threads
from tests.killing import Trigger


def _killed(step: int, folder: Path, output: Path, **arguments: Any) -> bool:
    """A run that dies at a step; False if it had none so late."""
    child = os.fork()
    if not child:
        Trigger("SIGKILL", step, "one", list).at_files()
        run(folder, output, **arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill_at_every_step(folder: Path, scratch: Path, files: int, arguments: dict[str, Any]) -> tuple[int, int]:
    """Returns the number of steps, and how many of the second runs went on from a part."""
    small_parts()
    prepare.worker_processes = threads
    run(folder, scratch / "whole", workers=1, **arguments)
    whole = contents(scratch / "whole")
    resumed = 0
    for step in count(1):
        output = scratch / str(step) / "out"
        if not _killed(step, folder, output, workers=2, **arguments):
            return step - 1, resumed
        # A data set is there if its index is, and then the rest must be.
        if Path(f"{output}.idx").exists():
            assert Path(f"{output}.bin").read_bytes() == whole[0] and Path(f"{output}.json").exists()
            assert len(list(output.parent.glob("out.*"))) >= files
        try:
            resumed += run(folder, output, workers=2, **arguments)["resumed_bytes"] > 0
        except CherryError as error:
            # The data set was whole; all that was left to do was to remove the empty folder.
            assert "out.bin exists" in str(error)
            shutil.rmtree(f"{output}.parts", ignore_errors=True)
        assert contents(output) == whole, f"killed at step {step}"
        assert len(list(output.parent.iterdir())) == files
    raise AssertionError


def test_killed_at_any_step_a_second_run_gives_the_same_bytes(folder, tmp_path):
    steps, resumed = run_ranks(tmp_path, 1, kill_at_every_step, folder, tmp_path, 3, {})[0]
    assert steps >= 40 and resumed >= 20


def _resume_from_something_else(folder: Path, scratch: Path) -> None:
    small_parts()
    prepare.worker_processes = threads
    changed = scratch / "changed"
    shutil.copytree(folder, changed)

    def check(name: str, change: Callable[[Path], object], **arguments: Any) -> None:
        """What a run leaves that is killed after some parts is of no use once something has changed."""
        output = scratch / name
        assert _killed(20, changed, output)
        assert json.loads(Path(f"{output}.parts/journal").read_text())["counts"]["documents"]
        change(Path(f"{output}.parts"))
        assert run(changed, output, **arguments)["resumed_bytes"] == 0
        run(changed, scratch / f"{name}-whole", **arguments)
        assert contents(output) == contents(scratch / f"{name}-whole")

    def shorten(parts: Path) -> None:
        os.truncate(parts / "tokens.bin", 10)

    def add_document(_: Path) -> None:
        with (changed / "1.jsonl").open("a") as file:
            file.write('\n{"text": "하나 더"}')

    check("tokenizer", lambda _: None, tokenizer="other")
    check("input", add_document)
    check("tokens", shorten)
    check("journal", lambda parts: (parts / "journal").write_text("{"))

    # An older journal must not speak for what a run that was killed later has written over.
    output = scratch / "back-and-forth"
    assert _killed(14, changed, output)
    assert _killed(9, changed, output, tokenizer="other")
    run(changed, output)
    run(changed, scratch / "back-and-forth-whole")
    assert contents(output) == contents(scratch / "back-and-forth-whole")


def test_parts_made_from_something_else_are_not_used(folder, tmp_path):
    run_ranks(tmp_path, 1, _resume_from_something_else, folder, tmp_path)


def _stop_after_a_part(pipe: Any, arguments: list[str]) -> None:
    small_parts()
    save = Parts.save

    def save_and_wait(parts: Parts) -> None:
        save(parts)
        pipe.send([child.pid for child in multiprocessing.active_children()])
        signal.pause()

    Parts.save = save_and_wait
    cli.main(["data", *arguments])


def _go_on(arguments: list[str], output: Path) -> list[bytes]:
    small_parts()
    assert cli.main(["data", *arguments]) == 0
    return contents(output)


def test_a_killed_command_takes_its_workers_along_and_is_resumed(folder, tmp_path):
    inputs = ["--input", str(folder / "1.jsonl"), str(folder / "2.jsonl"), "--max-malformed", "0.1"]
    inputs += ["--tokenizer", str(folder / "tokenizer"), "--workers", "2", "--output"]
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_stop_after_a_part, args=(theirs, [*inputs, str(tmp_path / "cut")]))
    process.start()
    workers = ours.recv()
    process.kill()
    process.join()
    assert len(workers) == 2 and (tmp_path / "cut.parts" / "journal").exists()
    assert not list(tmp_path.glob("cut.[bij]*"))
    until = time.monotonic() + 30
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < until, "workers outlive their parent"
        time.sleep(0.01)
    logs = tmp_path / "logs"
    resumed = run_ranks(logs, 1, _go_on, [*inputs, str(tmp_path / "cut")], tmp_path / "cut")[0]
    assert json.loads((tmp_path / "cut.json").read_text())["resumed_bytes"] > 0
    assert resumed == run_ranks(logs, 1, _go_on, [*inputs, str(tmp_path / "whole")], tmp_path / "whole")[0]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_reading_ahead_is_bounded(folder):
    """However slow the workers, only so many batches are read before the first is written."""
    read = 0

    def batches() -> Iterator[tuple[list[text.Chunk], Position]]:
        nonlocal read
        for read in range(1, 51):
            line = json.dumps({"text": str(read)}).encode()
            yield [text.Chunk(Path("a.jsonl"), read, line, len(line))], Position(0, read)

    with threads(2, tokenizers.worker, folder / "tokenizer") as submit:
        for number, (encoded, position) in enumerate(prepare._in_order(submit, batches(), ("text", 0, "H"), 4), 1):
            assert position.chunks == number and encoded.counts.documents == 1
            assert read <= number + 3
    assert number == read == 50
