"""Two small files of text with their tokenizers, and `cherry data` in small parts."""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cherry_megatron.data import prepare, text
from cherry_megatron.data import tokenizer as tokenizers
from tests.conftest import korean_text

PROCESSES = prepare.worker_processes


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
    answers = sorted(output.parent.glob(f"{output.name}.answers.*"))
    files = [Path(f"{output}.bin"), Path(f"{output}.idx"), *answers]
    return [*(path.read_bytes() for path in files), json.dumps(report).encode()]


def read_back(output: Path) -> list[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(output))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    assert dataset.index.dtype == np.uint16
    return [dataset[index].tolist() for index in range(len(dataset))]


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
