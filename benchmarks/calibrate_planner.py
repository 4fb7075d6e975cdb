"""Measure what the cost model of `cherry plan` needs on the GPUs at hand, and hold it against other trainings.

    python benchmarks/calibrate_planner.py --tokenizer DIR --data PREFIX --work DIR [--output F] [--seconds 520]
        [--check RESULT.md] [--only-check]

Single operations, then seven trainings (`CALIBRATED`) of a few steps; writes the coefficients of this kind of GPU
into --output (by default the planner's own file). With --check the twelve of `HELD_OUT` follow. Trainings of one
GPU run beside each other, one a GPU. What is measured is kept in --work: a start that finds it there goes on, and
one that runs out of --seconds says what is missing, and ends with status 75.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import yaml
from planner_fit import Training, fit
from pretraining import FP8, GRAPH, command_of, end, program

from cherry_megatron.planner.coefficients import FILE, Coefficients, read
from cherry_megatron.planner.hardware import GPUS
from cherry_megatron.platform.leaving import AGAIN
from cherry_megatron.platform.machine import prepare
from cherry_megatron.runs import read_steps
from cherry_megatron.versions import git_state

STARTING = 40  # seconds that a training takes to start


def micro(sequences: int, *overrides: str) -> tuple[str, ...]:
    """Overrides with micro-batches of so many."""
    return (f"megatron.micro-batch-size={sequences}", *overrides)


TP2 = ("megatron.tensor-model-parallel-size=2", "megatron.sequence-parallel=true")
RECOMPUTE = (
    "megatron.recompute-granularity=full", "megatron.recompute-method=uniform", "megatron.recompute-num-layers=1",
)  # fmt: skip
PP2 = "megatron.pipeline-model-parallel-size=2"
FOUR_LOOPS = ("recurrence.loops=4", "megatron.seq-length=2048")

CALIBRATED = {
    "graph": Training("cherry_227m", micro(8), GRAPH),
    "eager": Training("cherry_227m", micro(4)),
    "micro-batches of 1": Training("cherry_227m", micro(1)),
    "loop scales": Training("cherry_227m", micro(1, "recurrence.loop_scales=true")),
    "FP8": Training("cherry_227m", micro(1), f"{FP8} delayed"),
    "DP=2": Training("cherry_227m", micro(4), ranks=2, sequences=16),
    "TP=2": Training("cherry_227m", micro(4, *TP2), ranks=2),
}
# Of each question the rows differ in their layout alone, so that the fastest can be told.
HELD_OUT: dict[str, dict[str, Training]] = {
    "dense_566m, one GPU, 8 sequences": {
        "micro-batch 4, graph": Training("dense_566m", micro(4), GRAPH),
        "micro-batch 8, graph": Training("dense_566m", micro(8), GRAPH),
        "micro-batch 2": Training("dense_566m", micro(2)),
        "micro-batch 8, recomputation": Training("dense_566m", micro(8, *RECOMPUTE)),
    },
    "cherry_227m, 4 loops, sequences of 2048, one GPU, 16 sequences": {
        "micro-batch 16, graph": Training("cherry_227m", micro(16, *FOUR_LOOPS), GRAPH, sequences=16),
        "micro-batch 16": Training("cherry_227m", micro(16, *FOUR_LOOPS), sequences=16),
        "micro-batch 4": Training("cherry_227m", micro(4, *FOUR_LOOPS), sequences=16),
    },
    "dense_566m, two GPUs, 16 sequences": {
        "DP=2, micro-batch 8, graph": Training("dense_566m", micro(8), GRAPH, 2, 16),
        "DP=2, micro-batch 2": Training("dense_566m", micro(2), "", 2, 16),
        "TP=2, micro-batch 8": Training("dense_566m", micro(8, *TP2), "", 2, 16),
        "PP=2, micro-batch 2": Training("dense_566m", micro(2, PP2), "", 2, 16),
    },
    "cherry_227m, two GPUs, 16 sequences": {
        "PP=2, micro-batch 2": Training("cherry_227m", micro(2, PP2), "", 2, 16),
    },
}
# On a CPU, to see that everything runs: the same rows, narrow and in float32.
_TINY = (
    "megatron.hidden-size=40", "megatron.ffn-hidden-size=64", "megatron.num-attention-heads=4",
    "megatron.seq-length=32", "megatron.max-position-embeddings=32", "megatron.padded-vocab-size=512",
    "megatron.bf16=false", "megatron.overlap-grad-reduce=false", "megatron.overlap-param-gather=false",
    "recurrence.pattern=*-[*-]x2*-", "recurrence.loops=2",
)  # fmt: skip


def tiny(training: Training) -> Training:
    """The same for a CPU."""
    kept = tuple(o for o in training.overrides if "loops" not in o and "seq-length" not in o)
    return replace(training, overrides=(*kept, *_TINY), flags="")


class Measuring:
    """Runs trainings, keeps what they gave, and knows when time is up."""

    def __init__(self, options: argparse.Namespace, gpus: int) -> None:
        self.options, self.gpus = options, gpus
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.devices = given.split(",") if given else [str(number) for number in range(gpus)]
        self.until = time.monotonic() + options.seconds
        self.kept = options.work / "trainings.json"
        self.found: dict[str, dict[str, float]] = json.loads(self.kept.read_text()) if self.kept.exists() else {}
        self.missed: list[str] = []
        self.late = False  # something was not run, or not to its end, for want of time alone

    def run(self, trainings: dict[str, Training]) -> None:
        """Those that are not there yet: first those of one GPU, side by side."""
        left = {
            name: each for name, each in trainings.items() if name not in self.found and each.ranks <= self.gpus
        }
        lanes: SimpleQueue[str] = SimpleQueue()
        for device in self.devices:
            lanes.put(device)

        def alone(name: str) -> None:
            device = lanes.get()
            try:
                self._measure(name, left[name], device)
            finally:
                lanes.put(device)

        with ThreadPoolExecutor(self.gpus) as pool:
            list(pool.map(alone, [name for name, each in left.items() if each.ranks == 1]))
        for name, each in left.items():
            if each.ranks > 1:
                self._measure(name, each, ",".join(self.devices[: each.ranks]))

    def _measure(self, name: str, training: Training, devices: str) -> None:
        if self.left < STARTING:
            self.stop(name)
            return
        with tempfile.TemporaryDirectory() as folder:
            steps = self._train(Path(folder), training, devices)
        if len(steps) < self.options.steps:
            self.fail(name, f"{len(steps)} of {self.options.steps} steps; see {self.options.work}/*.log")
            return
        self.keep(name, [step["seconds"] for step in steps], float(steps[-1].get("peak_gib", 0.0)))

    def keep(self, name: str, seconds: list[float], gib: float) -> None:
        """What a training's steps took, of which the later half counts."""
        self.store(name, {"seconds": statistics.median(seconds[len(seconds) // 2 :]), "gib": gib})

    def store(self, name: str, found: dict[str, float]) -> None:
        self.found[name] = found
        self.kept.write_text(json.dumps(self.found, indent=1) + "\n")
        print(f"{name}: {found}", flush=True)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def miss(self, line: str) -> None:
        """Tell of what was not measured."""
        print(line, flush=True)
        self.missed.append(line)

    def stop(self, name: str) -> None:
        """Tell of a training that is left to another start."""
        self.late = True
        self.miss(f"{name}: not run, no time left")

    def fail(self, name: str, why: str) -> None:
        """Tell of a training that has not come to its end; if time was up meanwhile, another start may see it."""
        self.late |= self.left <= 0
        self.miss(f"{name}: {why}")

    def _train(self, folder: Path, training: Training, devices: str) -> list[dict[str, float]]:
        """The steps of a training, which is ended when there are enough: what follows would only cost time."""
        wanted = argparse.Namespace(**{**vars(self.options), "steps": 10 * self.options.steps})
        flags = f"--global-batch-size {training.sequences} {training.flags}".split()
        command, environment = command_of(
            folder / "run", training.configuration, list(training.overrides), flags, wanted, training.ranks
        )
        environment["CUDA_VISIBLE_DEVICES"] = devices
        until = min(self.until, time.monotonic() + self.options.limit)
        log = self.options.work / f"{time.monotonic_ns()}.log"
        steps: list[dict[str, float]] = []
        with log.open("w") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process:
            try:
                while process.poll() is None and len(steps) < self.options.steps and time.monotonic() < until:
                    time.sleep(0.3)
                    steps = _steps(folder / "run")
            finally:
                end(process)
        return steps[: self.options.steps]


def _steps(run: Path) -> list[dict[str, float]]:
    try:
        return read_steps(run)
    except (OSError, ValueError, KeyError):  # not there, or being written
        return []


def operations(options: argparse.Namespace, gpus: int) -> dict[str, Any]:
    """Of gpu_operations.py, once.

    Raises:
        SystemExit: if it has failed before the collectives; without these the links stay as they were.
    """
    path = options.work / "operations.json"
    if not path.exists():
        script = [str(Path(__file__).with_name("gpu_operations.py")), "--output", str(path)]
        with subprocess.Popen([*program(min(gpus, 2)), *script, *(["--tiny"] if options.tiny else [])]) as process:
            try:
                process.wait(timeout=180)
            except subprocess.TimeoutExpired:
                print("gpu_operations.py: not done in 180 s", flush=True)
            finally:
                end(process)
        if not path.exists():
            raise SystemExit("gpu_operations.py has failed: see above")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write(path: Path, kind: str, fitted: Coefficients) -> None:
    """Put the coefficients of one kind of GPU into a file, beside those of the others."""
    there = yaml.safe_load((path if path.exists() else FILE).read_text())
    there[kind] = asdict(fitted)
    head = "".join(line for line in FILE.read_text().splitlines(keepends=True) if line.startswith("#"))
    path.write_text(head + yaml.safe_dump(there, sort_keys=False, width=200))


def check_table(
    measuring: Measuring, kind: str, fitted: Coefficients, held: dict[str, dict[str, Training]]
) -> list[str]:
    """Predicted against measured, and of each question the row that the model would take against the fastest."""
    gpu, lines = GPUS[kind], []
    near = {"s": 0, "GiB": 0}
    for question, rows in held.items():
        lines += ["", f"**{question}**", ""]
        lines += ["| | predicted s | measured s | off | predicted GiB | measured GiB | off |", "|---" * 7 + "|"]
        seen = {}
        for name, training in rows.items():
            seconds, gib = training.seconds(gpu, fitted), training.gib(gpu, fitted)
            found = measuring.found.get(f"{question}: {name}")
            if found is None:
                lines.append(f"| {name} | {seconds:.4f} | not run | | {gib:.1f} | not run | |")
                continue
            seen[name] = seconds, found["seconds"]
            late = seconds / found["seconds"] - 1
            more = gib / found["gib"] - 1 if found["gib"] else None  # a CPU has no peak
            near["s"] += abs(late) <= 0.15
            near["GiB"] += more is not None and abs(more) <= 0.10
            times, sizes = f"{seconds:.4f} | {found['seconds']:.4f}", f"{gib:.1f} | {found['gib']:.1f}"
            lines.append(f"| {name} | {times} | {late:+.1%} | {sizes} | {'' if more is None else f'{more:+.1%}'} |")
        if len(seen) > 1:
            chosen = min(seen, key=lambda name: seen[name][0])
            best = min(seen, key=lambda name: seen[name][1])
            late = seen[chosen][1] / seen[best][1] - 1
            lines += ["", f"Chosen: {chosen}; fastest: {best}; {late:.1%} slower than it."]
    total = sum(map(len, held.values()))
    return [f"{near['s']} of {total} within 15% in time, {near['GiB']} within 10% in memory.", *lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is measured, and logs")
    parser.add_argument("--output", type=Path, default=FILE, help="file of coefficients (default the planner's)")
    parser.add_argument("--check", type=Path, metavar="RESULT.md", help="measure the held-out trainings too")
    parser.add_argument("--only-check", action="store_true", help="take the coefficients of --output as they are")
    parser.add_argument("--steps", type=int, default=10, help="of a training; the later half counts")
    parser.add_argument("--seconds", type=float, default=520, help="for everything")
    parser.add_argument("--limit", type=float, default=120, help="seconds that a training may take")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to see that it runs")
    options = parser.parse_args()
    if options.tiny and options.output == FILE:
        parser.error("--tiny needs an --output of its own: what a CPU gives is of no use to the planner")
    options.work.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count() or 2
    prepare()
    measuring = Measuring(options, gpus)
    calibrated = {name: tiny(each) if options.tiny else each for name, each in CALIBRATED.items()}
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    kind = next((key for key, gpu in GPUS.items() if gpu.name in device), None)
    if kind is None:
        if not options.tiny:
            raise SystemExit(f"{device} is not in cherry_megatron/planner/hardware.py; add its datasheet there")
        kind = "h100"
    if options.only_check:
        fitted = read(kind, options.output)
    else:
        found = operations(options, gpus)
        measuring.run(calibrated)
        measured = {name: each for name, each in measuring.found.items() if name in calibrated}
        if not measured:
            raise SystemExit(f"none of the trainings ran; see {options.work}/*.log")
        missing = [name for name in calibrated if name not in measured]
        missing += ["collectives"] if gpus > 1 and not found["collectives"] else []
        commit = git_state().get("commit", "unknown")[:7]
        source = f"calibrate_planner.py on {gpus} {device}, {datetime.now(UTC):%Y-%m-%d}, commit {commit}"
        source += f", without {' and '.join(missing)}" if missing else ""
        start = replace(read(kind), source=source, calibrated=not missing)
        fitted = fit(start, GPUS[kind], found, calibrated, measured)
        write(options.output, kind, fitted)
    print(yaml.safe_dump(asdict(fitted), sort_keys=False))
    if options.check is not None:
        held = {q: {n: tiny(t) if options.tiny else t for n, t in rows.items()} for q, rows in HELD_OUT.items()}
        measuring.run({f"{q}: {n}": training for q, rows in held.items() for n, training in rows.items()})
        lines = ["# The planner against trainings it was not calibrated on", "", f"{fitted.source}.", ""]
        seen = [f"calibrated on {name}: {measuring.found[name]}" for name in calibrated if name in measuring.found]
        lines += [*check_table(measuring, kind, fitted, held), "", *seen, *measuring.missed]
        options.check.write_text("\n".join(lines) + "\n")
        print(options.check.read_text())
    return AGAIN if measuring.late else 0


if __name__ == "__main__":
    sys.exit(main())
