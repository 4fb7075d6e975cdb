"""What saves and loads of checkpoints cost a training on one GPU, beside the disk's own speed.

    python benchmarks/save_cost.py --tokenizer DIR --data PREFIX --output RESULT.md [--folder DIR]
        [--steps 40] [--interval 12] [--configuration cherry_227m] [--set KEY=VALUE ...]

Two trainings by `cherry pretrain`, optimizer state included: one saves synchronously, the next goes on from its
last checkpoint, read from the disk and not from memory, and saves with --async-save. A step's end is when its line
appears in steps.jsonl. The stall of a save is how much later the next step's end comes than without one; how much
later all steps until the next save are is told too, because they run beside the writing. Each save has a row: the
first takes memory that later ones have. save_phases.py says what the stall consists of.
"""

import argparse
import os
import re
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pretraining import SEQUENCES, train_in
from save_phases import PHASES

from cherry_megatron.files import read_lines
from cherry_megatron.storage.tracker import TRACKER, newest
from cherry_megatron.versions import git_state

BETWEEN = 300.0  # seconds between the saves that a stall is a share of
LATER = PHASES[PHASES.index("write and hash") :]  # what an asynchronous save does after the stall
_BLOCK = 16 << 20  # bytes


@contextmanager
def step_ends(run: Path) -> Iterator[dict[int, float]]:
    """When each step of the block's training ended, on the clock; to 2 ms."""
    path, over = run / "steps.jsonl", threading.Event()
    ends: dict[int, float] = {}
    seen = path.stat().st_size if path.exists() else 0
    before = {line["iteration"] for line in read_lines(path)} if seen else set()

    def watch(seen: int) -> None:
        while not over.wait(0.002):
            if not path.exists() or (size := path.stat().st_size) == seen:
                continue
            seen, now = size, time.monotonic()
            for line in read_lines(path):
                if line["iteration"] not in before:
                    ends.setdefault(line["iteration"], now)

    thread = threading.Thread(target=watch, args=(seen,))
    thread.start()
    try:
        yield ends
    finally:
        over.set()
        thread.join()


def rows(name: str, ends: dict[int, float], phases: list[dict[str, Any]], interval: int) -> Iterator[str]:
    """Of Markdown, one a save: how much later it makes the next step, and all until the next save; then its phases.

    Args:
        name: what they begin with.
        ends: of the steps, in seconds.
        phases: that save_phases.py tells of the training.
        interval: steps between saves.
    """
    *steps, last = sorted(ends)
    took = {step: ends[step + 1] - ends[step] for step in steps}  # between the ends of a step and the next
    saved = [step for step in steps if step % interval == 0]
    quiet = statistics.median(seconds for step, seconds in took.items() if step not in saved)
    for step in saved:
        until = min(step + interval, last)
        late, all_late = took[step] - quiet, sum(took[s] - quiet for s in range(step, until))
        stalled = [one for one in phases if ends[step] < one["ended"] < ends[step + 1] and one["main"]]
        beside = [one for one in phases if ends[step] < one["ended"] < ends[until] and one not in stalled]
        parts = [sum(one["seconds"] for one in stalled if one["phase"] == phase) for phase in PHASES]
        written, finished = (
            sum(one["seconds"] for one in beside if one["main"] == main and one["phase"] in LATER)
            for main in (False, True)
        )
        cells = [f"{late:.2f}", f"{late / BETWEEN:.2%}", f"{all_late:.2f}", f"{all_late / BETWEEN:.2%}"]
        cells += [f"{seconds:.3f}" for seconds in (*parts, late - sum(parts), written, finished)]
        yield f"| {name} | {step} | {quiet:.3f} | " + " | ".join(cells) + " |"


def timed(log: Path, timer: str) -> list[float]:
    """Seconds of one of Megatron's timers, each time that it was told."""
    return [float(ms) / 1000 for ms in re.findall(rf"{timer} \.+: \(([\d.]+),", log.read_text(errors="replace"))]


def forget(folder: Path) -> None:
    """Have the files of a folder read from the disk the next time."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk(folder: Path, size: int) -> tuple[float, float]:
    """Bytes a second of writing one file of a size, with fsync, and of reading it from the disk."""
    path, block = folder / "disk", os.urandom(_BLOCK)
    began = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // _BLOCK)):
            file.write(block)
        os.fsync(file.fileno())
        written, size = time.monotonic() - began, file.tell()
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.monotonic()
        while file.read(_BLOCK):
            pass
        read = time.monotonic() - began
    path.unlink()
    return size / written, size / read


def measure(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Lines of Markdown."""
    saved, log = folder / "checkpoints", folder / "logs" / "rank0.log"
    saves = f"--save-interval {options.interval} --log-interval 1"
    heads = ["saves", "at step", "step without", "next step later by", "of 5 min", "all until the next", "of 5 min"]
    heads += [*PHASES, "the step itself", "written beside", "finished in a later step"]
    yield "Seconds. The phases, without those inside them, are of the next step's delay:"
    yield ""
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for name, flags in (("synchronous", []), ("asynchronous", ["--async-save"])):
        if (saved / TRACKER).exists():
            forget(newest(saved))
        total = argparse.Namespace(**{**vars(options), "steps": options.steps * (1 + (saved / TRACKER).exists())})
        overrides = ["evaluation.batches=1", *options.set]
        phases = folder / f"{name}.jsonl"
        with step_ends(folder) as ends:
            cherry = ["-m", "benchmarks.save_phases", str(phases)]
            train_in(folder, options.configuration, overrides, flags, total, saves=saves, cherry=cherry)
        yield from rows(name, ends, list(read_lines(phases)), options.interval)
        if not flags:
            synchronous = timed(log, "save-checkpoint")
    size = sum(path.stat().st_size for path in newest(saved).iterdir())
    files = len(list(newest(saved).glob("*.distcp")))
    (loading,) = timed(log, "load-checkpoint")
    written, read = disk(folder, size)
    save = size / statistics.median(synchronous)
    yield ""
    yield f"A checkpoint has {size / 1e9:.2f} GB in {files} files of tensors."
    yield (
        f"Saved, hashed and flushed synchronously at {save / 1e9:.2f} GB/s: {save / written:.2f} of the disk's "
        f"{written / 1e9:.2f}."
    )
    yield (
        f"Read, verified and loaded in {loading:.2f} s, at {size / loading / 1e9:.2f} GB/s: "
        f"{size / loading / read:.2f} of the disk's {read / 1e9:.2f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: of temporary files)")
    parser.add_argument("--steps", type=int, default=40, help="of each training")
    parser.add_argument("--interval", type=int, default=12, help="steps between saves")
    parser.add_argument("--configuration", default="cherry_227m", help="of configs/")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further overrides")
    parser.add_argument("--limit", type=int, default=240, help="seconds a training may take")
    options = parser.parse_args()
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU with {os.cpu_count()} cores"
    lines = [
        "# What saves and loads of checkpoints cost",
        "",
        f"`python benchmarks/save_cost.py --steps {options.steps} --interval {options.interval} --configuration "
        f"{options.configuration}` on one {device}, torch {torch.__version__}, commit "
        f"{git_state().get('commit', 'unknown')}. {SEQUENCES} sequences a step.",
        "",
    ]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        kind = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True)
        lines += [f"The file system is {kind.stdout.strip()}.", ""]
        print("\n".join(lines), flush=True)
        for line in measure(Path(folder), options):
            print(line, flush=True)
            lines.append(line)
            options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
