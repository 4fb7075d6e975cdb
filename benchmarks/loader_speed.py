"""The loaders of `data.loader` beside each other: alone, beside a step that leaves them the CPU, and in a training.

    python benchmarks/loader_speed.py --tokenizer DIR --data PREFIX [--marks NAME] [--config cherry_tiny]
        [--set KEY=VALUE ...] [--output RESULT.md]

Alone: micro-batches are read and brought to the device as fast as they come. Beside a step: before each the process
sleeps, as one does whose GPU computes, and it is measured how long it then waits for the micro-batch. In a
training: `cherry pretrain`, eight sequences a step. CPU time is that of the process and of the loader's own
processes. Each row is a process, and takes turns with the others; the turn that read fastest counts, of trainings
the one with the fastest steps. A loader that cannot be used here is said to be not run.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from pretraining import SEQUENCES, median_seconds, train

from cherry_megatron.config import load
from cherry_megatron.platform.machine import dali, prepare
from cherry_megatron.versions import git_state

ROWS = {"torch, 0 workers": ("torch", 0), "torch, 2 workers": ("torch", 2), "dali": ("dali", 0)}
SKIPPED = 10  # micro-batches until a loader is at its speed


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One loader in this process, without a model."""
    machine = prepare()
    overrides = [
        f"megatron.seq-length={options.sequence}",
        f"megatron.max-position-embeddings={options.sequence}",
        f"megatron.micro-batch-size={options.micro_batch}",
        f"megatron.global-batch-size={options.micro_batch}",
        f"megatron.num-workers={options.workers}",
        f"data.loader={options.loader}",
        f"run={options.scratch}",
        *([f"sgt={{marks: {options.marks}, alpha: 0.7}}"] if options.marks else []),
    ]
    from megatron.training.datasets import data_samplers
    from megatron.training.initialize import initialize_megatron

    from cherry_megatron.data.batches import build_datasets
    from cherry_megatron.platform.reading import read_by
    from cherry_megatron.pretrain import initialize, loader_of

    config = load(Path(f"configs/{options.config}.yaml"), overrides)
    initialize(config, machine, {})
    initialize_megatron(allow_no_cuda=True)
    read_by(loader_of(config))
    wanted = options.batches + options.steps + 2 * SKIPPED
    dataset, _, _ = build_datasets((wanted * options.micro_batch, options.micro_batch, 0), options.marks)
    device = torch.cuda.current_device()

    def read() -> None:
        for tensor in next(batches).values():
            tensor.to(device, non_blocking=True)
        if machine.devices:
            torch.cuda.synchronize()

    started = time.perf_counter()
    batches = iter(data_samplers.build_pretraining_data_loader(dataset, 0))
    read()
    first = time.perf_counter() - started
    for _ in range(SKIPPED):
        read()
    wall, cpu = time.perf_counter(), _cpu_seconds()
    for _ in range(options.batches):
        read()
    wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
    tokens = options.batches * options.micro_batch * options.sequence
    waits = []
    for _ in range(options.steps):
        time.sleep(options.step_ms / 1e3)
        before = time.perf_counter()
        read()
        waits.append(1e3 * (time.perf_counter() - before))
    return {
        "first": first, "speed": tokens / wall, "cpu": 1e6 * cpu / tokens,
        "wait": statistics.median(waits), "longest": max(waits),
    }  # fmt: skip


def _cpu_seconds() -> float:
    """Of this process and the loader's processes so far."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def alone(loader: str, workers: int, options: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--loader", loader, "--workers", str(workers), "--scratch", scratch]
        for name in ("tokenizer", "data", "config", "sequence", "micro_batch", "batches", "steps", "step_ms"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        command += ["--marks", options.marks] if options.marks else []
        environment = {**os.environ, "CHERRY_TOKENIZER": options.tokenizer, "CHERRY_DATA": options.data}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def training(loader: str, workers: int, options: argparse.Namespace) -> dict[str, float]:
    """`cherry pretrain` with it: seconds of a step, and of CPU of all of it."""
    overrides = [*options.set, f"data.loader={loader}", f"megatron.num-workers={workers}"]
    run = argparse.Namespace(
        tokenizer=options.tokenizer, data=options.data, steps=options.train_steps, limit=options.limit
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    steps = train(options.config, overrides, [], run)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"step": median_seconds(steps), "whole": cpu}


def table(found: dict[str, list[dict[str, float]]], tokens: int) -> list[str]:
    """Markdown; of a row's turns the one that read fastest, of trainings the one with the fastest steps."""
    lines = [
        "| loader | first batch s | alone, M tokens/s | CPU s a million tokens | wait beside a step, median ms "
        "| longest ms | training, tokens/s | CPU s of the training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, turns in found.items():
        if not turns:
            lines.append(f"| {name} | not run |" + " |" * 6)
            continue
        reads, trains = max(turns, key=lambda turn: turn["speed"]), min(turns, key=lambda turn: turn["step"])
        lines.append(
            f"| {name} | {reads['first']:.2f} | {reads['speed'] / 1e6:.1f} | {reads['cpu']:.4f} "
            f"| {reads['wait']:.2f} | {reads['longest']:.2f} | {tokens / trains['step']:,.0f} "
            f"| {trains['whole']:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--marks", help="of the data, read too when the loaders are alone")
    parser.add_argument("--config", default="cherry_tiny", help="of configs/, for the training")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the training")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens, where the loaders are alone")
    parser.add_argument("--micro-batch", type=int, default=8, help="the same")
    parser.add_argument("--batches", type=int, default=300, help="read as fast as they come")
    parser.add_argument("--steps", type=int, default=60, help="to wait beside")
    parser.add_argument("--step-ms", type=float, default=100.0, help="of such a step")
    parser.add_argument("--train-steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--limit", type=int, default=300, help="seconds that a training may take")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--loader", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loader:
        print(json.dumps(measure(options)))
        return
    length = load(Path(f"configs/{options.config}.yaml"), [*options.set, "run=x"]).value("seq-length")
    devices = (
        torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{len(os.sched_getaffinity(0))} CPU cores"
    )
    head = [
        f"`python {' '.join(sys.argv)}`; {devices}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"DALI {dali().version or dali().note}, commit {git_state().get('commit', 'unknown')}.",
        "",
    ]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
    for _ in range(options.turns):
        for name, (loader, workers) in ROWS.items():
            if loader == "torch" or dali().usable:
                turn = {**alone(loader, workers, options), **training(loader, workers, options)}
                found[name].append(turn)
                print(name, json.dumps(turn), flush=True)
            lines = [*head, *table(found, SEQUENCES * length)]
            if options.output:  # after every row, lest a later one take all along
                options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
