"""`cherry data`, end to end, against the tokenizer library alone, on the same text in the same run.

    python benchmarks/data_throughput.py --input CORPUS/*.jsonl.zst --tokenizer FOLDER
    python benchmarks/data_throughput.py --input CORPUS/*.jsonl.zst --train-mb 60

The library is given documents that are in memory already, and a thread for every core; the better of
its two calls counts. `cherry data` starts from files on disk and ends with an indexed data set: it reads,
decompresses, parses JSON, tokenizes with a process for every core, writes, and imports Megatron for
the index. Megabytes are of UTF-8 text in the documents, for both. On a machine that others use as
well, compare the seconds of CPU time.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import batched, chain
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "true"

from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.data.text import documents, find_files, read_chunks

SLICE = 1024  # documents a call: the results of all of them at once would take many times the text's memory


@dataclass(frozen=True)
class Timing:
    """One measurement."""

    name: str
    megabytes: float
    wall: float
    cpu: float

    def row(self, cores: int) -> str:
        """Its line of the table."""
        speed = self.megabytes / self.wall
        return (
            f"| {self.name} | {self.wall:.1f} | {self.cpu:.1f} | {speed:.2f} | {speed / cores:.2f} "
            f"| {self.megabytes / self.cpu:.2f} |"
        )


def main() -> None:
    """Measure and print a Markdown report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="text files or folders")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--tokenizer", type=Path, help="folder made by `cherry tokenizer`")
    chosen.add_argument("--train-mb", type=int, help="train one on so much of the text, and time that")
    parser.add_argument("--vocab-size", type=int, default=32000, help="of the trained one (default 32000)")
    parser.add_argument("--repeats", type=int, default=1, help="take turns so often; the best of each counts")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{_processor()}, {cores} cores; Python {platform.python_version()}, ", end="")
    print(", ".join(f"{name} {version(name)}" for name in ("tokenizers", "megatron-core", "zstandard")))
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.tokenizer or Path(scratch) / "tokenizer"
        if arguments.train_mb:
            started = time.perf_counter(), _cpu(resource.RUSAGE_SELF)
            tokenizers.train(arguments.input, folder, arguments.vocab_size, arguments.train_mb)
            wall, cpu = time.perf_counter() - started[0], _cpu(resource.RUSAGE_SELF) - started[1]
            made = f"{arguments.vocab_size} tokens from {arguments.train_mb} MB"
            print(f"Trained {made}: {wall:.1f} s, {cpu:.1f} s of CPU")
        _measure(arguments.input, folder, arguments.repeats, cores, Path(scratch))


def _measure(inputs: list[Path], folder: Path, repeats: int, cores: int, scratch: Path) -> None:
    tokenizer = tokenizers.load(folder)
    texts = list(_texts(inputs))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokens = 0

    def encode(function: Callable[..., list]) -> None:
        nonlocal tokens
        tokens = 0
        for part in batched(texts, SLICE):
            tokens += sum(map(len, function(list(part), add_special_tokens=False)))

    timings: list[Timing] = []
    for turn in range(repeats):
        for name in ("encode_batch", "encode_batch_fast"):
            work = partial(encode, getattr(tokenizer, name))
            timings.append(_time(f"library: {name}", megabytes, work))
        output = scratch / f"text{turn}"
        command = [sys.executable, "-m", "cherry_megatron.cli", "data", "--output", str(output)]
        command += ["--tokenizer", str(folder), "--input", *map(str, inputs)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        run = partial(subprocess.run, command, check=True, **quiet)
        timings.append(_time("cherry data", megabytes, run, resource.RUSAGE_CHILDREN))
        written = output.with_suffix(".bin").stat().st_size // (2 if tokenizers.size(tokenizer) < 65500 else 4)
        if written != tokens + len(texts):
            raise SystemExit(f"cherry data wrote {written} tokens, the library gave {tokens} and {len(texts)} ends")

    characters = sum(map(len, texts))
    print(f"{megabytes:.1f} MB of text in {len(texts):,} documents; {tokens:,} tokens, ", end="")
    print(f"{characters / tokens:.2f} characters and {1e6 * megabytes / tokens:.2f} bytes a token\n")
    print("| | wall s | CPU s | MB/s | MB/s a core | MB a CPU second |")
    print("|---|---|---|---|---|---|")
    for timing in timings:
        print(timing.row(cores))
    ours = [t for t in timings if t.name == "cherry data"]
    library = [t for t in timings if t.name != "cherry data"]
    wall = min(t.wall for t in ours) / min(t.wall for t in library)
    cpu = min(t.cpu for t in ours) / min(t.cpu for t in library)
    print(f"\n`cherry data` takes {wall:.2f} times the library's wall time, {cpu:.2f} times its CPU time.")


def _texts(inputs: Iterable[Path]) -> Iterable[str]:
    """Every document that `cherry data` keeps."""
    chunks = chain.from_iterable(map(read_chunks, find_files(inputs)))
    found = chain.from_iterable(map(documents, chunks))
    return (text for _, text in found if not isinstance(text, ValueError) and text.strip())


def _time(name: str, megabytes: float, work: Callable[[], object], who: int = resource.RUSAGE_SELF) -> Timing:
    wall, cpu = time.perf_counter(), _cpu(who)
    work()
    wall, cpu = time.perf_counter() - wall, _cpu(who) - cpu
    return Timing(name, megabytes, wall, cpu)


def _cpu(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
