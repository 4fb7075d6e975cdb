"""`cherry data`: the exact documents in order whatever the workers; nothing half-written when it fails.

Most runs here use threads for workers, as processes take longer to start than the rest of a test. Those
that write an index run in children forked from a server that has imported Megatron.
"""

import fcntl
import gzip
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
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
from cherry_megatron.data.parts import Parts, Position
from cherry_megatron.errors import CherryError
from tests.conftest import korean_text, run_ranks
from tests.data.conftest import PROCESSES, contents, read_back, run, small_parts, threads

COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


# What is written


def _write_and_read(
    folder: Path, output: Path, workers: int
) -> tuple[dict[str, Any], list[bytes], list[list[int]]]:
    small_parts()
    return run(folder, output, workers=workers), contents(output), read_back(output)


def test_what_no_workers_mean_is_documented():
    assert "processes (default 0, all cores)" in " ".join(cli._verbs()["data"].format_help().split())


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
    parts = Parts(folder / "ours", folder, "same", np.dtype(np.int32))
    for document in ids:
        builder.add_document(document, [len(document)])
        lengths = np.array([len(document)], np.int32).tobytes()
        streams = {"tokens.bin": np.array(document, np.int32).tobytes(), "lengths": lengths}
        encoded = tokenizers.Encoded(streams, tokenizers.Counts())
        parts.append(encoded, Position())
    builder.finalize(str(folder / "theirs.idx"))
    parts.save()
    parts.write_index()
    assert (folder / "tokens.bin").read_bytes() == (folder / "theirs.bin").read_bytes()
    return rule, (folder / "theirs.idx").read_bytes(), (folder / "tokens.idx").read_bytes()


def test_the_index_is_what_megatron_writes_document_by_document(tmp_path):
    rule, theirs, ours = run_ranks(tmp_path, 1, _megatron_index, tmp_path)[0]
    assert ours == theirs
    assert [prepare.token_type(size).name for size in (65499, 65500)] == rule == ["uint16", "int32"]


# Errors: nothing is left that looks finished


def outputs(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".bin", ".idx", ".json"))


def test_a_worker_that_dies_stops_the_run(folder, tmp_path, small, monkeypatch):
    monkeypatch.setattr(prepare, "worker_processes", PROCESSES)
    in_order = prepare._in_order

    def kill_one(*arguments: Any) -> Iterator[Any]:
        for result in in_order(*arguments):
            for child in multiprocessing.active_children()[:1]:  # at times both are dead already
                child.kill()
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
    monkeypatch.setattr(Parts, "write_index", lambda _: path.write_text('{"text": "other text"}\n'))
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
