"""Tokens a second, TFLOP/s, MFU and peak memory of training, variant by variant, in one run.

    python benchmarks/train_speed.py --tokenizer DIR --data PREFIX --output RESULT.md [--steps 30]

Runs `cherry pretrain` once a variant on one GPU with real text and reads the recorded steps. The
first third of the steps is left out as warm-up.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from cherry_megatron.runs import read_steps
from cherry_megatron.versions import git_state

SEQUENCES = 8  # a step
FP8 = "--fp8-format hybrid --fp8-recipe"
# name: (configuration, Megatron flags)
VARIANTS = {
    "cherry_227m, BF16": ("cherry_227m", ""),
    "cherry_227m, BF16, loop scales": ("cherry_227m", "SCALES"),
    "cherry_227m, BF16, recompute": (
        "cherry_227m",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "cherry_227m, FP8 delayed": ("cherry_227m", f"{FP8} delayed"),
    "cherry_227m, FP8 tensorwise": ("cherry_227m", f"{FP8} tensorwise"),
    "dense_566m, BF16": ("dense_566m", ""),
}


def measure(name: str, configuration: str, flags: str, options: argparse.Namespace) -> str:
    """One row of the table."""
    overrides = ["recurrence.loop_scales=true"] if "SCALES" in flags else []
    try:
        steps = train(configuration, overrides, flags.replace("SCALES", "").split(), options)
    except RuntimeError as error:
        return f"| {name} | {error} | | | | |"
    seconds = median_seconds(steps)
    tokens = SEQUENCES * 4096 / seconds
    flops = tokens * flops_per_token(configuration)
    return (
        f"| {name} | {tokens:,.0f} | {flops / 1e12:.0f} | {flops / 989e12:.1%} | {steps[-1]['peak_gib']:.1f} | "
        f"{steps[-1]['loss']:.3f} |"
    )


def median_seconds(steps: list[dict[str, float]]) -> float:
    """Of a step, without the first third."""
    return statistics.median(step["seconds"] for step in steps[len(steps) // 3 :])


def train(
    configuration: str, overrides: list[str], flags: list[str], options: argparse.Namespace, ranks: int = 1
) -> list[dict[str, float]]:
    """The steps of a training with SEQUENCES sequences a step and rank.

    Raises:
        RuntimeError: if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        return train_in(Path(folder), configuration, overrides, flags, options, ranks)


def train_in(
    folder: Path,
    configuration: str,
    overrides: list[str],
    flags: list[str],
    options: argparse.Namespace,
    ranks: int = 1,
) -> list[dict[str, float]]:
    """As `train`, in a folder that stays."""
    module = ["-m", "cherry_megatron.cli"]
    program = [sys.executable, *module]
    if ranks > 1:
        program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *module]
    command = [*program, "pretrain", "--config", f"configs/{configuration}.yaml"]
    for override in [f"run={folder}", *overrides]:
        command += ["--set", override]
    length = (
        f"--train-iters {options.steps} --lr-warmup-iters 2 --global-batch-size {SEQUENCES * ranks} "
        "--eval-iters 4 --eval-interval 1000 --save-interval 100000 --split 98,1,1 --no-save-optim"
    )
    environment = {**os.environ, "CHERRY_TOKENIZER": options.tokenizer, "CHERRY_DATA": options.data}
    environment["PYTHONFAULTHANDLER"] = "1"
    with subprocess.Popen(
        [*command, "--", *length.split(), *flags], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=options.limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # faulthandler then says where it was
            _, errors = process.communicate()
        if process.returncode:
            print(errors[-2000:], file=sys.stderr)
            raise RuntimeError(f"failed with status {process.returncode}")
    return read_steps(folder)


def flops_per_token(configuration: str) -> float:
    """From the configuration's own account."""
    from cherry_megatron.config import load
    from cherry_megatron.monitor.accounting import training_flops

    config = load(Path(f"configs/{configuration}.yaml"))
    return training_flops(
        config.recurrence, config.shape, config.value("seq-length"), config.moee, config.mtp.depths
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", type=int, default=600, help="seconds a variant may take")
    options = parser.parse_args()
    device = torch.cuda.get_device_name(0)
    lines = [
        "# Training speed, one GPU",
        "",
        f"`python benchmarks/train_speed.py --steps {options.steps}` on one {device}, torch {torch.__version__}, "
        f"commit {git_state().get('commit', 'unknown')}. Sequences of 4096, 8 a step in micro-batches of 4, Adam "
        "step included. MFU against 989 TFLOP/s, also for FP8.",
        "",
        "| variant | tokens/s | TFLOP/s | MFU | peak GiB | last loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, (configuration, flags) in VARIANTS.items():
        lines.append(measure(name, configuration, flags, options))
        print(lines[-1], flush=True)
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
