"""Text files to Megatron's indexed token files, in parallel and resumable.

The work is cut into parts of a fixed number of input batches. A finished part is a pair of indexed
files and a journal entry in OUTPUT.parts/; a later run of the same command goes on after the last
one. The parts are joined and moved into place at the very end, so OUTPUT.bin and OUTPUT.idx are
either absent or whole.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.data.text import Line, document, find_files, read_lines
from cherry_megatron.errors import CherryError

BATCH_BYTES = 1 << 20
BATCHES_A_PART = 64
NAMED_LINES = 100  # malformed lines that the report names one by one


@dataclass
class Counts:
    """What was read and written."""

    lines: int = 0
    bytes: int = 0
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    malformed: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, other: "Counts") -> None:
        for name in ("lines", "bytes", "documents", "tokens", "empty", "malformed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.named = (self.named + other.named)[:NAMED_LINES]


@dataclass(frozen=True)
class Encoded:
    """A batch after tokenization: token ids of all documents, the length of each, and its counts."""

    ids: np.ndarray
    lengths: list[int]
    counts: Counts


def prepare(
    inputs: Iterable[Path],
    output: Path,
    tokenizer_folder: Path,
    workers: int = 0,
    key: str = "text",
    max_malformed: float = 0.01,
) -> dict[str, Any]:
    """Write OUTPUT.bin, OUTPUT.idx and OUTPUT.json.

    Args:
        inputs: text files or folders.
        output: path prefix of the indexed files.
        tokenizer_folder: made by `cherry tokenizer`.
        workers: processes that tokenize; 0 takes all cores.
        key: the key of the text in .jsonl lines.
        max_malformed: stop if more than this share of the lines is malformed.

    Returns:
        The report that OUTPUT.json holds.

    Raises:
        CherryError: unusable input; no output is left behind.
    """
    started = time.perf_counter()
    files = find_files(inputs)
    tokenizer = tokenizers.load(tokenizer_folder)
    end = tokenizers.end_of_document(tokenizer, tokenizer_folder)
    if Path(f"{output}.bin").exists() or Path(f"{output}.idx").exists():
        raise CherryError(f"{output}.bin or .idx exists; remove them or choose another --output")
    parts = _Parts(output, files, tokenizer_folder, key, tokenizer.get_vocab_size())
    counts = parts.finished_counts()
    resumed_bytes = counts.bytes
    workers = workers or os.cpu_count() or 1
    encode = partial(_encode, key=key, end=end)
    context = multiprocessing.get_context("spawn")
    total = sum(path.stat().st_size for path in files) if _plain(files) else None
    with (
        context.Pool(workers, _start_worker, (str(tokenizer_folder),)) as pool,
        tqdm(total=total, initial=counts.bytes, unit="B", unit_scale=True, desc="tokens", disable=None) as bar,
    ):
        # imap reads the input ahead without bound; a window keeps memory small.
        for encoded in _windowed(pool, encode, _batches(files, counts.lines), 4 * workers):
            parts.write(encoded)
            counts.add(encoded.counts)
            bar.update(encoded.counts.bytes)
            _check_share(counts, max_malformed, final=False)
    _check_share(counts, max_malformed, final=True)
    if counts.documents == 0:
        raise CherryError(f"the inputs hold no documents ({counts.lines} lines, {counts.malformed} malformed)")
    seconds = time.perf_counter() - started
    report = {
        **asdict(counts),
        "tokenizer": tokenizers.fingerprint(tokenizer_folder),
        "vocabulary": tokenizer.get_vocab_size(),
        "inputs": [str(path) for path in files],
        "workers": workers,
        "seconds": round(seconds, 2),
        "mb_per_second_and_worker": round((counts.bytes - resumed_bytes) / 1e6 / seconds / workers, 3),
    }
    parts.join(report)
    return report


def _plain(files: list[Path]) -> bool:
    return not any(path.suffix in (".gz", ".zst") for path in files)


def _batches(files: list[Path], skip: int) -> Iterator[list[Line]]:
    """Lines in batches of about BATCH_BYTES, without the first `skip` lines."""
    batch: list[Line] = []
    size = seen = 0
    for path in files:
        for line in read_lines(path):
            seen += 1
            if seen <= skip:
                continue
            batch.append(line)
            size += len(line.raw)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _windowed(pool: Any, function: Any, items: Iterator[Any], window: int) -> Iterator[Any]:
    """Results in order, with at most `window` items in flight."""
    waiting: list[Any] = []
    for item in items:
        waiting.append(pool.apply_async(function, (item,)))
        if len(waiting) >= window:
            yield waiting.pop(0).get()
    for result in waiting:
        yield result.get()


_worker_tokenizer: Any = None


def _start_worker(folder: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = tokenizers.load(Path(folder))


def _encode(lines: list[Line], key: str, end: int) -> Encoded:
    """Tokenize a batch of lines in a worker."""
    counts = Counts(lines=len(lines), bytes=sum(len(line.raw) for line in lines))
    texts = []
    for line in lines:
        try:
            text = document(line, key)
        except ValueError as error:
            counts.malformed += 1
            counts.named.append(f"{line.path}:{line.number}: {error}")
            continue
        if text.strip():
            texts.append(text)
        else:
            counts.empty += 1
    rows = [encoding.ids for encoding in _worker_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    lengths = [len(row) + 1 for row in rows]
    ids = np.empty(sum(lengths), dtype=np.int32)
    position = 0
    for row in rows:
        ids[position : position + len(row)] = row
        position += len(row) + 1
        ids[position - 1] = end
    counts.documents, counts.tokens = len(rows), len(ids)
    return Encoded(ids, lengths, counts)


def _check_share(counts: Counts, allowed: float, final: bool) -> None:
    if counts.malformed > allowed * counts.lines and (final or counts.lines >= 1000):
        example = counts.named[0] if counts.named else ""
        raise CherryError(
            f"{counts.malformed} of {counts.lines} lines are malformed, more than --max-malformed {allowed:.2%} "
            f"allows; the first: {example}"
        )


class _Parts:
    """OUTPUT.parts/: finished parts, their journal, and what they were made from."""

    def __init__(self, output: Path, files: list[Path], tokenizer: Path, key: str, vocabulary: int) -> None:
        from megatron.core.datasets.indexed_dataset import DType

        self._output = output
        self._folder = Path(f"{output}.parts")
        self._dtype: Any = DType.optimal_dtype(vocabulary)
        identity = "\n".join(
            [tokenizers.fingerprint(tokenizer), key]
            + [f"{p.absolute()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
        )
        self._identity = hashlib.sha256(identity.encode()).hexdigest()
        self._pending: list[Encoded] = []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            mark = self._folder / "made-from"
            if not mark.exists() or mark.read_text() != self._identity:
                for stale in self._folder.iterdir():
                    stale.unlink()
                mark.write_text(self._identity)
        except OSError as error:
            raise CherryError(f"cannot write {self._folder}: {error.strerror}") from None
        # A part without its journal entry was cut off while it was written: it is made again.
        self._count = 0
        while self._journal(self._count).exists():
            self._count += 1

    def _prefix(self, index: int) -> str:
        return str(self._folder / f"{index:06}")

    def _journal(self, index: int) -> Path:
        return self._folder / f"{index:06}.json"

    def finished_counts(self) -> Counts:
        total = Counts()
        for index in range(self._count):
            total.add(Counts(**json.loads(self._journal(index).read_text())))
        return total

    def write(self, encoded: Encoded) -> None:
        self._pending.append(encoded)
        if len(self._pending) >= BATCHES_A_PART:
            self._finish_part()

    def _finish_part(self) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

        if not self._pending:
            return
        prefix = self._prefix(self._count)
        builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=self._dtype)
        counts = Counts()
        for encoded in self._pending:
            counts.add(encoded.counts)
            start = 0
            for length in encoded.lengths:
                builder.add_document(encoded.ids[start : start + length], [length])  # type: ignore[arg-type]
                start += length
        builder.finalize(get_idx_path(prefix))
        temporary = self._folder / "journal.tmp"
        temporary.write_text(json.dumps(asdict(counts)))
        temporary.replace(self._journal(self._count))
        self._pending.clear()
        self._count += 1

    def join(self, report: dict[str, Any]) -> None:
        """Write the joined files and remove the parts."""
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

        self._finish_part()
        joined = str(self._folder / "joined")
        builder = IndexedDatasetBuilder(get_bin_path(joined), dtype=self._dtype)
        for index in range(self._count):
            builder.add_index(self._prefix(index))
        builder.finalize(get_idx_path(joined))
        described = self._folder / "report.tmp"
        described.write_text(json.dumps(report, indent=1, ensure_ascii=False))
        os.replace(get_bin_path(joined), f"{self._output}.bin")
        os.replace(described, f"{self._output}.json")
        os.replace(get_idx_path(joined), f"{self._output}.idx")
        shutil.rmtree(self._folder)
