"""Trainings that benchmarks measure: `cherry pretrain` with real text, and the steps that it records."""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from cherry_megatron.runs import read_steps

SEQUENCES = 8  # a step
FP8 = "--fp8-format hybrid --fp8-recipe"
NO_SAVES = "--save-interval 100000 --no-save-optim"
# Little of evaluations, and even of a small text some documents to evaluate with.
EVALUATIONS = {"eval-iters": 4, "eval-interval": 1000, "split": "98,1,1"}
CHERRY = ("-m", "cherry_megatron.cli")
GRAPH = "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"


def median_seconds(steps: list[dict[str, float]]) -> float:
    """Of a step, without the first third."""
    return statistics.median(step["seconds"] for step in steps[len(steps) // 3 :])


def program(ranks: int) -> list[str]:
    """Python on so many ranks of this host, which meet at a port that nobody has."""
    if ranks == 1:
        return [sys.executable]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranked = ["--nproc-per-node", str(ranks), "--master-port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", *ranked]


def end(process: subprocess.Popen, how: int = signal.SIGKILL) -> None:
    """End a process that we started, with its ranks, which torchrun puts into sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid)
        for one in [*started.children(recursive=True), started]:
            with suppress(psutil.NoSuchProcess):  # some end with those before them
                one.send_signal(how)


def train(
    configuration: str, overrides: list[str], flags: list[str], options: argparse.Namespace, ranks: int = 1
) -> list[dict[str, float]]:
    """The steps of a training with SEQUENCES sequences a step and rank.

    Raises:
        RuntimeError: if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        return train_in(Path(folder), configuration, overrides, flags, options, ranks)


def command_of(
    folder: Path,
    configuration: str,
    overrides: list[str],
    flags: list[str],
    options: argparse.Namespace,
    ranks: int = 1,
    saves: str = NO_SAVES,
    cherry: Sequence[str] = CHERRY,
) -> tuple[list[str], dict[str, str]]:
    """The command of a training in a folder, with Megatron's flags for its saves, and its environment."""
    command = [*program(ranks), *cherry, "pretrain", "--config", f"configs/{configuration}.yaml"]
    for override in [f"run={folder}", *overrides]:
        command += ["--set", override]
    evaluations = " ".join(f"--{flag} {value}" for flag, value in EVALUATIONS.items())
    length = (
        f"--train-iters {options.steps} --lr-warmup-iters 2 --global-batch-size {SEQUENCES * ranks} "
        f"{evaluations} {saves}"
    )
    return [*command, "--", *length.split(), *flags], environment_of(options)


def environment_of(options: argparse.Namespace) -> dict[str, str]:
    """With the text that the configurations read."""
    text = {"CHERRY_TOKENIZER": options.tokenizer, "CHERRY_DATA": options.data}
    return {**os.environ, **text, "PYTHONFAULTHANDLER": "1"}


def train_in(
    folder: Path,
    configuration: str,
    overrides: list[str],
    flags: list[str],
    options: argparse.Namespace,
    ranks: int = 1,
    saves: str = NO_SAVES,
    cherry: Sequence[str] = CHERRY,
) -> list[dict[str, float]]:
    """As `train`, in a folder that stays, with Megatron's flags for its saves."""
    command, environment = command_of(folder, configuration, overrides, flags, options, ranks, saves, cherry)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, errors = process.communicate(timeout=options.limit)
        except subprocess.TimeoutExpired:
            end(process, signal.SIGABRT)  # faulthandler then says where it was
            _, errors = process.communicate()
        if process.returncode:
            print(errors[-2000:], file=sys.stderr)
            raise RuntimeError(f"failed with status {process.returncode}")
    return read_steps(folder)
