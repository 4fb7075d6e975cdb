"""Text files to Megatron's indexed token files, in parallel and resumable.

OUTPUT.parts/ grows part by part (`parts.py`). A later run of the same command cuts off what came after the last
entry of its journal and goes on from there. At the end the files are moved into place, the .idx last: without
it there is no data set.
"""

import hashlib
import importlib
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as library
from tqdm import tqdm

from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.data.chat import CHAT_TEMPLATE, keep_template
from cherry_megatron.data.marks import INDEXED_DATASET
from cherry_megatron.data.parts import Parts, Position, locked
from cherry_megatron.data.text import CHUNK_BYTES, Chunk, find_files, is_jsonl, other_files, read_chunks
from cherry_megatron.data.tokenizer import Counts, Encoded
from cherry_megatron.errors import CherryError
from cherry_megatron.workers import Submit, worker_processes

BATCH_BYTES = CHUNK_BYTES // 2  # small files share a batch; a chunk of a large one is a batch
BATCHES_A_WORKER = 4  # in flight: read ahead, in work, or waiting for their turn to be written
PART_BYTES = 64 << 20  # of text, between two entries in the journal
LAYOUT = 2  # of OUTPUT.parts, so that another version of the program does not go on from it


def prepare(
    inputs: Iterable[Path],
    output: Path,
    tokenizer_folder: Path,
    workers: int = 0,
    key: str = "text",
    max_malformed: float = 0.01,
    sft: bool = False,
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
        sft: the lines are conversations; write OUTPUT.answers.bin, .idx and .json too, the marks of what
            is learned from. `key` has no meaning then.

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
    if sft:
        _check_conversations(files, tokenizer_folder)
    tokenizer = tokenizers.load(tokenizer_folder)
    end = tokenizers.end_of_document(tokenizer, tokenizer_folder)
    vocabulary = tokenizers.size(tokenizer)
    made_as = CHAT_TEMPLATE if sft else key
    identity = _identity(files, tokenizer_folder, made_as)
    with locked(output) as folder:
        parts = Parts(output, folder, identity, token_type(vocabulary), answers=sft)
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
            encode = (None if sft else key, end, parts.dtype.char)
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
        if _identity(files, tokenizer_folder, made_as) != identity:
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


def _check_conversations(files: list[Path], tokenizer: Path) -> None:
    others = [path for path in files if not is_jsonl(path)]
    if others:
        raise CherryError(f"input {others[0]}: --sft reads conversations, one a line, from .jsonl files alone")
    keep_template(tokenizer)


def _identity(files: list[Path], tokenizer: Path, made_as: str) -> str:
    """What the output follows from; parts made from anything else are of no use."""
    try:
        stats = [(str(path.absolute()), path.stat()) for path in files]
    except OSError as error:
        raise CherryError(f"cannot read {error.filename}: {error.strerror}") from None
    described = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    made_from = [LAYOUT, CHUNK_BYTES, library.__version__, tokenizers.fingerprint(tokenizer), made_as, described]
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
