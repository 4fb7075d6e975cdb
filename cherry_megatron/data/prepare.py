"""Text files to Megatron's indexed token files, in parallel and resumable.

OUTPUT.parts/ grows part by part: the tokens (already what Megatron's .bin holds), the lengths of the
documents, and a journal that says up to where both are whole and where in the input to go on. A later
run of the same command cuts off what came after the journal's last entry and goes on from there. At
the end the files are moved into place, the .idx last: without it there is no data set.
"""

import fcntl
import hashlib
import importlib
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as library
from tqdm import tqdm

from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.data.text import CHUNK_BYTES, Chunk, find_files, other_files, read_chunks
from cherry_megatron.data.tokenizer import Counts, Encoded
from cherry_megatron.errors import CherryError
from cherry_megatron.workers import Submit, worker_processes

BATCH_BYTES = CHUNK_BYTES // 2  # small files share a batch; a chunk of a large one is a batch
BATCHES_A_WORKER = 4  # in flight: read ahead, in work, or waiting for their turn to be written
PART_BYTES = 64 << 20  # of text, between two entries in the journal
LAYOUT = 1  # of OUTPUT.parts, so that another version of the program does not go on from it
INDEXED_DATASET = "megatron.core.datasets.indexed_dataset"


@dataclass(frozen=True)
class Position:
    """A place in the input: a file, and how many of its chunks lie before."""

    file: int = 0
    chunks: int = 0


def prepare(
    inputs: Iterable[Path],
    output: Path,
    tokenizer_folder: Path,
    workers: int = 0,
    key: str = "text",
    max_malformed: float = 0.01,
) -> dict[str, Any]:
    """Write OUTPUT.bin, OUTPUT.idx and OUTPUT.json, going on where an earlier run was cut off.

    Args:
        inputs: text files or folders.
        output: path prefix of the indexed files.
        tokenizer_folder: made by `cherry tokenizer`.
        workers: processes that tokenize; 0 takes all cores. The output does not depend on it.
        key: the key of the text in .jsonl lines.
        max_malformed: stop if more than this share of the lines read so far is malformed. Looked at
            after every part and at the end.

    Returns:
        The report that OUTPUT.json holds.

    Raises:
        CherryError: unusable input, output or numbers, or a worker that died. No output is left
            behind, only OUTPUT.parts to go on from.
    """
    started = time.perf_counter()
    if workers < 0:
        raise CherryError(f"--workers {workers} is negative; 0 takes all cores")
    if not 0 <= max_malformed <= 1:
        raise CherryError(f"--max-malformed {max_malformed} is no share; give a number from 0 to 1")
    workers = workers or len(os.sched_getaffinity(0))
    inputs = list(inputs)
    files, left_out = find_files(inputs), other_files(inputs)
    tokenizer = tokenizers.load(tokenizer_folder)
    end = tokenizers.end_of_document(tokenizer, tokenizer_folder)
    vocabulary = tokenizers.size(tokenizer)
    identity = _identity(files, tokenizer_folder, key)
    with _locked(output) as folder:
        parts = _Parts(output, folder, identity, token_type(vocabulary))
        if parts.finished:
            return parts.publish()
        resumed = parts.counts.bytes
        _check_share(parts.counts, max_malformed)
        total = sum(path.stat().st_size for path in files)
        with (
            tqdm(total=total, unit="B", unit_scale=True, desc="tokens", disable=None) as bar,
            worker_processes(workers, tokenizers.worker, tokenizer_folder) as submit,
            ThreadPoolExecutor(1) as importer,
        ):
            bar.update(parts.counts.input_bytes)
            encode = (key, end, parts.dtype.char)
            batches = _batches(files, parts.position)
            for encoded, position in _in_order(submit, batches, encode, BATCHES_A_WORKER * workers):
                bar.update(encoded.counts.input_bytes)
                parts.append(encoded, position)
                if parts.unsaved >= PART_BYTES:
                    parts.save()
                    _check_share(parts.counts, max_malformed)
                    # The end needs Megatron, which takes seconds to import: do it while workers tokenize.
                    importer.submit(importlib.import_module, INDEXED_DATASET)
        parts.save()
        counts = parts.counts
        _check_share(counts, max_malformed)
        if not counts.documents:
            raise CherryError(f"the inputs hold no documents ({counts.lines} lines, {counts.malformed} malformed)")
        parts.write_index()
        if _identity(files, tokenizer_folder, key) != identity:
            raise CherryError("the inputs or the tokenizer changed while they were read; run it again")
        seconds = time.perf_counter() - started
        return parts.finish(
            {
                **asdict(counts),
                "tokenizer": tokenizers.fingerprint(tokenizer_folder),
                "vocabulary": vocabulary,
                "end_of_document": end,
                "inputs": [str(path) for path in files],
                "left_out": len(left_out),
                "workers": workers,
                "resumed_bytes": resumed,
                "seconds": round(seconds, 2),
                "mb_per_second_and_worker": round((counts.bytes - resumed) / 1e6 / seconds / workers, 3),
            }
        )


def output_prefix(text: str) -> Path:
    """What --output names; `Path` alone would take "folder/" for a file's name."""
    if text.endswith(os.sep) or Path(text).is_dir():
        raise CherryError(f"--output {text} is a folder; name the files in it too, e.g. {Path(text) / 'text'}")
    return Path(text)


def token_type(vocabulary: int) -> np.dtype[Any]:
    """Megatron's own rule, DType.optimal_dtype, repeated because importing Megatron takes seconds."""
    return np.dtype(np.uint16 if vocabulary < 65500 else np.int32)


def _identity(files: list[Path], tokenizer: Path, key: str) -> str:
    """What the output follows from; parts made from anything else are of no use."""
    try:
        stats = [(str(path.absolute()), path.stat()) for path in files]
    except OSError as error:
        raise CherryError(f"cannot read {error.filename}: {error.strerror}") from None
    described = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    made_from = [LAYOUT, CHUNK_BYTES, library.__version__, tokenizers.fingerprint(tokenizer), key, described]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def _check_share(counts: Counts, allowed: float) -> None:
    if counts.malformed > allowed * counts.lines:
        raise CherryError(
            f"{counts.malformed} of {counts.lines} lines are malformed, more than --max-malformed {allowed:g} "
            f"allows; the first: {counts.named[0]}"
        )


def _batches(files: list[Path], start: Position) -> Iterator[tuple[list[Chunk], Position]]:
    """The chunks after a position in batches, each with the position after it."""
    batch: list[Chunk] = []
    size = 0
    position = start
    for index in range(start.file, len(files)):
        skip = start.chunks if index == start.file else 0
        for number, chunk in enumerate(islice(read_chunks(files[index]), skip, None), start=skip + 1):
            batch.append(chunk)
            size += len(chunk.raw)
            position = Position(index, number)
            if size >= BATCH_BYTES:
                yield batch, position
                batch, size = [], 0
    if batch:
        yield batch, position


def _in_order(
    submit: Submit, batches: Iterator[tuple[list[Chunk], Position]], arguments: tuple[Any, ...], window: int
) -> Iterator[tuple[Encoded, Position]]:
    """Every batch encoded, in order; at most `window` are in flight, which keeps memory small."""
    waiting: deque[tuple[Future[Encoded], Position]] = deque()
    for batch, position in batches:
        waiting.append((submit(batch, *arguments), position))
        if len(waiting) >= window:
            future, after = waiting.popleft()
            yield future.result(), after
    for future, after in waiting:
        yield future.result(), after


@contextmanager
def _locked(output: Path) -> Iterator[Path]:
    """OUTPUT.parts, for this process alone."""
    folder = Path(f"{output}.parts")
    lock = folder / "lock"
    taken = CherryError(f"another run is writing {output}; wait for its end or choose another --output")
    if not (folder / "journal").exists():
        _refuse_existing(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise CherryError(f"cannot write {folder}: {error.strerror}") from None
    with file:
        try:
            # The system gives it back when the process ends, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        except OSError as error:
            raise CherryError(f"cannot lock {lock}: {error.strerror}; choose an --output elsewhere") from None
        # A run that ended between the two steps above has removed the file.
        if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(file.fileno())):
            raise taken
        yield folder


def _refuse_existing(output: Path, suffixes: Iterable[str] = (".bin", ".json", ".idx")) -> None:
    for suffix in suffixes:
        if Path(f"{output}{suffix}").exists():
            raise CherryError(f"{output}{suffix} exists; remove it or choose another --output")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CherryError(
            f"cannot write {folder}: {error.strerror}; mend that and run the same command again to go on"
        ) from None


class _Parts:
    """OUTPUT.parts/: tokens, lengths, and the journal. Nothing beyond the journal's sizes is ever used."""

    MOVES = (("tokens", ".bin"), ("report", ".json"), ("index", ".idx"))

    def __init__(self, output: Path, folder: Path, identity: str, dtype: np.dtype[Any]) -> None:
        self._output = output
        self._folder = folder
        self._identity = identity
        self.dtype = dtype
        journal = self._read_journal()
        self.finished: bool = journal.get("finished", False)
        self.counts = Counts(**journal.get("counts", {}))
        self.position = Position(**journal.get("position", {}))
        self._sizes: dict[str, int] = journal.get("sizes", {"tokens": 0, "lengths": 0})
        self._pending: list[Encoded] = []
        self.unsaved = 0  # bytes of text that the journal does not know of yet
        # A run that was cut off while it moved its files has moved some of them already.
        moved = [suffix for name, suffix in self.MOVES if self.finished and not (folder / name).exists()]
        _refuse_existing(output, [suffix for _, suffix in self.MOVES if suffix not in moved])
        if not journal:
            # Before anything is written over what an older journal speaks of.
            with _writing(folder):
                (folder / "journal").unlink(missing_ok=True)

    def _read_journal(self) -> dict[str, Any]:
        try:
            journal: dict[str, Any] = json.loads((self._folder / "journal").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        if journal["identity"] != self._identity:
            return {}
        # Not even the disk's loss of a file may let a run go on from nothing.
        whole = journal["finished"] or all(
            (self._folder / name).exists() and (self._folder / name).stat().st_size >= size
            for name, size in journal["sizes"].items()
        )
        return journal if whole else {}

    def append(self, encoded: Encoded, position: Position) -> None:
        self._pending.append(encoded)
        self.unsaved += encoded.counts.bytes
        self.counts.add(encoded.counts)
        self.position = position

    def save(self) -> None:
        """Write what was appended, then the journal."""
        with _writing(self._folder):
            self._extend("tokens", [encoded.ids for encoded in self._pending])
            self._extend("lengths", [encoded.lengths for encoded in self._pending])
            self._write_journal()
        self._pending.clear()
        self.unsaved = 0

    def _extend(self, name: str, contents: list[bytes]) -> None:
        with (self._folder / name).open("ab") as file:
            file.truncate(self._sizes[name])
            file.writelines(contents)
            self._sizes[name] += sum(map(len, contents))
            _to_disk(file)

    def _write_journal(self, finished: bool = False) -> None:
        content = {
            "identity": self._identity,
            "finished": finished,
            "sizes": self._sizes,
            "counts": asdict(self.counts),
            "position": asdict(self.position),
        }
        temporary = self._folder / "journal.new"
        with temporary.open("w") as file:
            json.dump(content, file)
            _to_disk(file)
        temporary.replace(self._folder / "journal")

    def write_index(self) -> None:
        """Write Megatron's index. Its builder is given all lengths at once, and no tokens to copy."""
        builder = importlib.import_module(INDEXED_DATASET).IndexedDatasetBuilder
        with _writing(self._folder):
            lengths = np.fromfile(self._folder / "lengths", np.int32)
            index = builder(os.devnull, dtype=self.dtype.type)
            index.sequence_lengths = lengths
            index.document_indices = np.arange(len(lengths) + 1)
            index.finalize(str(self._folder / "index"))
            with (self._folder / "index").open("ab") as file:
                _to_disk(file)

    def finish(self, report: dict[str, Any]) -> dict[str, Any]:
        """Mark the parts as finished, then publish them."""
        with _writing(self._folder):
            # A file name that is no UTF-8 becomes an escape that JSON knows.
            with (self._folder / "report").open("w", encoding="utf-8", errors="backslashreplace") as file:
                json.dump(report, file, indent=1, ensure_ascii=False)
                _to_disk(file)
            self._write_journal(finished=True)
        return self.publish()

    def publish(self) -> dict[str, Any]:
        """Move the finished files into place, remove the rest, and return the report."""
        with _writing(self._folder):
            for name, suffix in self.MOVES:
                if (self._folder / name).exists():
                    (self._folder / name).replace(f"{self._output}{suffix}")
            report: dict[str, Any] = json.loads(Path(f"{self._output}.json").read_text(encoding="utf-8"))
            for name in ("lengths", "journal", "lock"):
                (self._folder / name).unlink(missing_ok=True)
        # Not empty if another run has just made its lock there, to be told that the output exists.
        with suppress(OSError):
            self._folder.rmdir()
        return report


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
