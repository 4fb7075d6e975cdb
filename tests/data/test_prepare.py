"""`cherry data`: the exact documents in order whatever the workers; nothing half-written whenever it is killed.

Most runs here use threads for workers, as processes take longer to start than the rest of a test. Those
that write an index run in children forked from a server that has imported Megatron.
"""

import fcntl
import gzip
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cherry_megatron import cli
from cherry_megatron.data import prepare, text
from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.errors import CherryError
from tests.conftest import korean_text, run_ranks

PROCESSES = prepare.worker_processes
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two tokenizers, and two files of 100 documents each with lines that are blank or malformed."""
    path = tmp_path_factory.mktemp("prepare")
    for seed in (1, 2):
        lines = [json.dumps({"text": found}, ensure_ascii=False) for found in korean_text(seed, 100)]
        for place, line in ((7, ""), (40, "{"), (80, '{"text": 3}')):
            lines.insert(place, line)
        (path / f"{seed}.jsonl").write_text("\n".join(lines))
    tokenizers.train([path / "1.jsonl"], path / "tokenizer", 400)
    tokenizers.train([path / "2.jsonl"], path / "other", 300)
    return path


@pytest.fixture(autouse=True)
def _no_hanging() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError("the test hangs")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(200)
    yield
    signal.alarm(0)


def small_parts() -> None:
    """The two files make three parts, of batches of 4 kB."""
    text.BLOCK_BYTES = 1 << 10
    text.CHUNK_BYTES = prepare.CHUNK_BYTES = prepare.BATCH_BYTES = 1 << 12
    prepare.PART_BYTES = 50_000


@contextmanager
def threads(workers: int, prepared: Any, folder: Path) -> Iterator[prepare.Submit]:
    encode = prepared(folder)
    with ThreadPoolExecutor(workers) as pool:
        yield partial(pool.submit, encode)


def run(folder: Path, output: Path, tokenizer: str = "tokenizer", **arguments: Any) -> dict[str, Any]:
    inputs = [folder / "1.jsonl", folder / "2.jsonl"]
    return prepare.prepare(inputs, output, folder / tokenizer, **{"max_malformed": 0.1, **arguments})


def contents(output: Path) -> list[bytes]:
    """The data set byte by byte, and what its report says apart from how it came about."""
    report = json.loads(Path(f"{output}.json").read_text())
    for name in ("seconds", "mb_per_second_and_worker", "workers", "resumed_bytes"):
        report.pop(name)
    assert not Path(f"{output}.parts").exists()
    return [Path(f"{output}{suffix}").read_bytes() for suffix in (".bin", ".idx")] + [json.dumps(report).encode()]


def read_back(output: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(output))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    assert dataset.index.dtype == np.uint16
    return [dataset[index].tolist() for index in range(len(dataset))]


# What is written


def _write_and_read(
    folder: Path, output: Path, workers: int
) -> tuple[dict[str, Any], list[bytes], list[list[int]]]:
    small_parts()
    return run(folder, output, workers=workers), contents(output), read_back(output)


def test_documents_in_order_whatever_the_number_of_workers(folder, tmp_path):
    report, written, ids = run_ranks(tmp_path, 1, _write_and_read, folder, tmp_path / "one", 1)[0]
    tokenizer = tokenizers.load(folder / "tokenizer")
    texts = [*korean_text(1, 100), *korean_text(2, 100)]
    assert ids == [[*tokenizer.encode(found).ids, 0] for found in texts]
    other_report, other, _ = run_ranks(tmp_path, 1, _write_and_read, folder, tmp_path / "three", 3)[0]
    assert other == written and other_report["workers"] == 3
    expected = {
        "lines": 206, "documents": 200, "malformed": 4, "empty": 2, "tokens": sum(map(len, ids)),
        "bytes": len("".join(texts).encode()), "characters": len("".join(texts)),
        "input_bytes": sum((folder / f"{seed}.jsonl").stat().st_size for seed in (1, 2)),
        "tokenizer": tokenizers.fingerprint(folder / "tokenizer"), "end_of_document": 0,
        "vocabulary": tokenizers.size(tokenizer), "inputs": [str(folder / f"{seed}.jsonl") for seed in (1, 2)],
        "left_out": 0,
    }  # fmt: skip
    assert expected.items() <= report.items()
    assert report["named"] == [
        f"{folder}/{seed}.jsonl:{line}: {reason}"
        for seed in (1, 2)
        for line, reason in (
            (41, "not JSON (Expecting property name enclosed in double quotes)"),
            (81, "no text under the key 'text'"),
        )
    ]


def _any_mixture_comes_back(folder: Path) -> int:
    """Returns how many mixtures of files were tried."""
    prepare.worker_processes = threads
    tokenizer = tokenizers.load(folder / "tokenizer")
    tried = 0
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    malformed = st.sampled_from(["no JSON", "[]", '{"text": 1}']).map(ValueError)
    jsonl = st.tuples(st.just(".jsonl"), st.lists(texts | malformed, max_size=8))
    plain = st.tuples(st.sampled_from([".txt", ".md"]), texts.map(lambda found: [found.replace("\n", "")]))
    files = st.lists(st.tuples(jsonl | plain, st.sampled_from(list(COMPRESS))), min_size=1, max_size=4)

    @settings(max_examples=60, database=None, suppress_health_check=list(HealthCheck), deadline=None)
    @given(files, st.integers(1, 80), st.integers(1, 200))
    def check(described, chunk, part):
        nonlocal tried
        tried += 1
        text.BLOCK_BYTES, text.CHUNK_BYTES, prepare.BATCH_BYTES, prepare.PART_BYTES = 8, chunk, chunk, part
        expected = []
        with tempfile.TemporaryDirectory() as scratch:
            for number, ((kind, lines), compression) in enumerate(described):
                good = [found for found in lines if isinstance(found, str)]
                if kind == ".jsonl":
                    raw = "\n".join(json.dumps({"text": f}) if isinstance(f, str) else str(f) for f in lines)
                else:
                    raw = good[0]
                    good[0] = raw.removeprefix("\ufeff")
                expected += [found for found in good if found.strip()]
                (Path(scratch) / f"{number}{kind}{compression}").write_bytes(COMPRESS[compression](raw.encode()))
            output = Path(scratch) / "out"
            try:
                prepare.prepare([Path(scratch)], output, folder / "tokenizer", workers=2, max_malformed=1)
            except CherryError as error:
                assert not expected and "hold no documents" in str(error)
            else:
                assert read_back(output) == [[*tokenizer.encode(found).ids, 0] for found in expected]

    check()
    return tried


def test_any_mixture_of_files_comes_back(folder, tmp_path):
    assert run_ranks(tmp_path, 1, _any_mixture_comes_back, folder)[0] >= 60


def _megatron_index(folder: Path) -> tuple[list[str], bytes, bytes]:
    """Megatron's rule for types, its index written document by document, and ours, for a large vocabulary."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    rule = [np.dtype(DType.optimal_dtype(size)).name for size in (65499, 65500)]
    ids = [[1, 70000, 3], [4], [5, 6]]
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.int32)
    parts = prepare._Parts(folder / "ours", folder, "same", np.dtype(np.int32))
    for document in ids:
        builder.add_document(document, [len(document)])
        lengths = np.array([len(document)], np.int32).tobytes()
        encoded = tokenizers.Encoded(np.array(document, np.int32).tobytes(), lengths, tokenizers.Counts())
        parts.append(encoded, prepare.Position())
    builder.finalize(str(folder / "theirs.idx"))
    parts.save()
    parts.write_index()
    assert (folder / "tokens").read_bytes() == (folder / "theirs.bin").read_bytes()
    return rule, (folder / "theirs.idx").read_bytes(), (folder / "index").read_bytes()


def test_the_index_is_what_megatron_writes_document_by_document(tmp_path):
    rule, theirs, ours = run_ranks(tmp_path, 1, _megatron_index, tmp_path)[0]
    assert ours == theirs
    assert [prepare.token_type(size).name for size in (65499, 65500)] == rule == ["uint16", "int32"]


# Being killed


def _die_at(step: int) -> None:
    """Kill this process before its step-th change to files: opening to write, renaming, removing, syncing."""
    steps = count(1)

    def watch(event: str, arguments: tuple) -> None:
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        changing = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.fsync")
        if (writing or changing) and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync

    def audited_fsync(file: int) -> None:
        sys.audit("os.fsync", file)
        fsync(file)

    os.fsync = audited_fsync
    sys.addaudithook(watch)


def _killed(step: int, folder: Path, output: Path, **arguments: Any) -> bool:
    """A run that dies at a step; False if it had none so late."""
    child = os.fork()
    if not child:
        _die_at(step)
        run(folder, output, **arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def _kill_at_every_step(folder: Path, scratch: Path) -> tuple[int, int]:
    """Returns the number of steps, and how many of the second runs went on from a part."""
    small_parts()
    prepare.worker_processes = threads
    run(folder, scratch / "whole", workers=1)
    whole = contents(scratch / "whole")
    resumed = 0
    for step in count(1):
        output = scratch / str(step) / "out"
        if not _killed(step, folder, output, workers=2):
            return step - 1, resumed
        # A data set is there if its index is, and then the rest must be.
        if Path(f"{output}.idx").exists():
            assert Path(f"{output}.bin").read_bytes() == whole[0] and Path(f"{output}.json").exists()
        try:
            resumed += run(folder, output, workers=2)["resumed_bytes"] > 0
        except CherryError as error:
            # The data set was whole; all that was left to do was to remove the empty folder.
            assert "out.bin exists" in str(error)
            shutil.rmtree(f"{output}.parts", ignore_errors=True)
        assert contents(output) == whole, f"killed at step {step}"
        assert len(list(output.parent.iterdir())) == 3
    raise AssertionError


def test_killed_at_any_step_a_second_run_gives_the_same_bytes(folder, tmp_path):
    steps, resumed = run_ranks(tmp_path, 1, _kill_at_every_step, folder, tmp_path)[0]
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
        os.truncate(parts / "tokens", 10)

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
    save = prepare._Parts.save

    def save_and_wait(parts: prepare._Parts) -> None:
        save(parts)
        pipe.send([child.pid for child in multiprocessing.active_children()])
        signal.pause()

    prepare._Parts.save = save_and_wait
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

    def batches() -> Iterator[tuple[list[text.Chunk], prepare.Position]]:
        nonlocal read
        for read in range(1, 51):
            line = json.dumps({"text": str(read)}).encode()
            yield [text.Chunk(Path("a.jsonl"), read, line, len(line))], prepare.Position(0, read)

    with threads(2, tokenizers.worker, folder / "tokenizer") as submit:
        for number, (encoded, position) in enumerate(prepare._in_order(submit, batches(), ("text", 0, "H"), 4), 1):
            assert position.chunks == number and encoded.counts.documents == 1
            assert read <= number + 3
    assert number == read == 50


# Errors: nothing is left that looks finished


@pytest.fixture
def small(monkeypatch) -> None:
    for module, name in (
        (text, "BLOCK_BYTES"),
        (text, "CHUNK_BYTES"),
        (prepare, "PART_BYTES"),
        (prepare, "worker_processes"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    for name in ("CHUNK_BYTES", "BATCH_BYTES"):
        monkeypatch.setattr(prepare, name, getattr(prepare, name))
    small_parts()
    prepare.PART_BYTES = 1 << 30  # nothing here gets as far as an index: Megatron is not imported
    prepare.worker_processes = threads


def outputs(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".bin", ".idx", ".json"))


def test_a_worker_that_dies_stops_the_run(folder, tmp_path, small, monkeypatch):
    monkeypatch.setattr(prepare, "worker_processes", PROCESSES)
    in_order = prepare._in_order

    def kill_one(*arguments: Any) -> Iterator[Any]:
        for result in in_order(*arguments):
            multiprocessing.active_children()[0].kill()
            yield result

    monkeypatch.setattr(prepare, "_in_order", kill_one)
    with pytest.raises(CherryError, match=r"a worker process died .* run the same command again"):
        run(folder, tmp_path / "out", workers=2)
    assert not outputs(tmp_path) and not multiprocessing.active_children()


def test_too_many_malformed_lines_end_with_status_2(folder, tmp_path, small, capsys):
    arguments = ["data", "--output", str(tmp_path / "out"), "--tokenizer", str(folder / "tokenizer")]
    arguments += ["--input", str(folder / "1.jsonl"), "--max-malformed", "0.018"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "2 of 103 lines are malformed, more than --max-malformed 0.018" in error
    assert f"the first: {folder}/1.jsonl:41: not JSON" in error and error.count("\n") == 1
    assert not outputs(tmp_path)
    # What was read stays for a run with a larger share, but says the same at once to the same share.
    with pytest.raises(CherryError, match="2 of 103"):
        prepare.prepare([folder / "1.jsonl"], tmp_path / "out", folder / "tokenizer", max_malformed=0.018)


def test_the_share_is_looked_at_after_every_part(folder, tmp_path, small):
    prepare.PART_BYTES = 1000
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 5000 + '{"text": "some text"}\n' * 100_000)
    with pytest.raises(CherryError, match=r"5000 of \d{4} lines are malformed"):
        prepare.prepare([path], tmp_path / "out", folder / "tokenizer", max_malformed=0.2)


def test_two_runs_do_not_write_the_same_output(folder, tmp_path, small):
    (tmp_path / "out.parts").mkdir()
    with (tmp_path / "out.parts" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CherryError, match=r"another run is writing .*out"):
            run(folder, tmp_path / "out")


def test_a_lock_that_was_removed_meanwhile_is_no_lock(folder, tmp_path, small, monkeypatch):
    flock = fcntl.flock

    def flock_late(file: Any, how: int) -> None:
        flock(file, how)
        (tmp_path / "out.parts" / "lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with pytest.raises(CherryError, match="another run is writing"):
        run(folder, tmp_path / "out")


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_an_existing_output_is_refused(folder, tmp_path, small, suffix):
    (tmp_path / f"out{suffix}").write_text("mine")
    with pytest.raises(CherryError, match=rf"out\{suffix} exists; remove it or choose another --output"):
        run(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [f"out{suffix}"]
    assert (tmp_path / f"out{suffix}").read_text() == "mine"


def test_an_output_that_came_between_is_refused(folder, tmp_path, small):
    with pytest.raises(CherryError, match="malformed"):
        run(folder, tmp_path / "out", max_malformed=0)
    assert (tmp_path / "out.parts" / "journal").exists()
    (tmp_path / "out.idx").write_text("mine")
    with pytest.raises(CherryError, match=r"out.idx exists; remove it or choose another --output"):
        run(folder, tmp_path / "out")
    assert (tmp_path / "out.idx").read_text() == "mine" and outputs(tmp_path) == ["out.idx"]


def test_inputs_that_change_while_they_are_read_are_refused(folder, tmp_path, small, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "some text"}\n')
    monkeypatch.setattr(prepare._Parts, "write_index", lambda _: path.write_text('{"text": "other text"}\n'))
    with pytest.raises(CherryError, match="changed while they were read"):
        prepare.prepare([path], tmp_path / "out", folder / "tokenizer")
    assert not outputs(tmp_path)


def test_a_full_disk_is_one_sentence(folder, tmp_path, small, monkeypatch):
    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CherryError, match=r"cannot write .*out.parts: No space left on device; .* again to go on"):
        run(folder, tmp_path / "out")
    assert not outputs(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"workers": -1}, "--workers -1 is negative"),
        ({"max_malformed": 1.5}, "--max-malformed 1.5 is no share"),
        ({"tokenizer": "absent"}, "absent holds no tokenizer.json"),
        ({"key": "body", "max_malformed": 1}, r"hold no documents \(206 lines, 204 malformed\)"),
        ({"key": "body"}, "no text under the key 'body'"),
        ({"output": "file/out"}, "cannot write .*file/out.parts: Not a directory"),
    ],
)
def test_bad_input_is_one_sentence(folder, tmp_path, small, arguments, expected):
    (tmp_path / "file").touch()
    with pytest.raises(CherryError, match=expected):
        run(folder, tmp_path / arguments.pop("output", "out"), **arguments)
    assert not outputs(tmp_path)


def test_a_damaged_file_stops_the_run(folder, tmp_path, small):
    whole = zstandard.compress((folder / "1.jsonl").read_bytes())
    (tmp_path / "a.jsonl.zst").write_bytes(whole[:-9])
    with pytest.raises(CherryError, match=r"cannot read .*a.jsonl.zst: it ends in the middle"):
        prepare.prepare([tmp_path / "a.jsonl.zst"], tmp_path / "out", folder / "tokenizer", max_malformed=1)
    assert not outputs(tmp_path)
