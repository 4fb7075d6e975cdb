"""What a mixture costs on one or two GPUs: against one expert, over expert-parallel ranks, in FP8, and CHERRY-1.8B.

    python benchmarks/moee_speed.py --tokenizer DIR --data PREFIX --output RESULT.md [--steps 15] [--only NAME ...]

Each part trains real text by `cherry pretrain`, at full width if it names no other, and says what it found as soon
as it has it:

graph       step time of 2 experts on one GPU against one, as one CUDA graph
cost        the same without a graph, of 2 and 4 experts and of both granularities
parallel    losses and gradient norms of two experts on two GPUs against those on one, in FP32 at the reduced width
            and in BF16, beside what one GPU's rounding does to them in other micro-batches
fp8         experts inside layers in FP8 against BF16: losses of 200 steps, router counts of the first
full        CHERRY-1.8B, 8 experts of 227M, on all GPUs there are, in micro-batches of 1 and 4
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from precision import REDUCED
from pretraining import FP8, GRAPH, SEQUENCES, median_seconds, train_in

from cherry_megatron.config import load
from cherry_megatron.versions import git_state

ALONE = "megatron.expert-model-parallel-size=1"
SAME = ["megatron.init-method-std=0.02", "megatron.lr-decay-style=constant"]


def several(sequences: int) -> list[str]:
    """Overrides for micro-batches of so many sequences."""
    return [f"megatron.micro-batch-size={sequences}", f"megatron.eval-micro-batch-size={sequences}"]


def mixture(experts: int, top_k: int = 0) -> list[str]:
    """Overrides of cherry_1p8b for one GPU."""
    return [f"moee.experts={experts}", f"moee.top_k={top_k}", ALONE]


FOUR = several(4)
# name: (configuration, overrides, flags); the rows of a part are held against its first.
COST: dict[str, dict[str, tuple[str, list[str], str]]] = {
    "graph": {
        "one expert, one graph": ("cherry_227m", FOUR, GRAPH),
        "2 experts, all see a sequence, one graph": ("cherry_1p8b", [*mixture(2), *FOUR], GRAPH),
        "one expert, one graph, again": ("cherry_227m", FOUR, GRAPH),
    },
    "cost": {
        "one expert": ("cherry_227m", FOUR, ""),
        "2 experts, all see a sequence": ("cherry_1p8b", [*mixture(2), *FOUR], ""),
        "4 experts, 2 see a sequence": ("cherry_1p8b", [*mixture(4, 2), *FOUR], ""),
        "layers of 2 experts, 2 a token": ("layers_227m", ["megatron.num-experts=2", *FOUR], ""),
        "layers of 8 experts, 2 a token": ("layers_227m", FOUR, ""),
    },
}

FP32 = [*REDUCED, "megatron.bf16=false"]
# name: (overrides of cherry_1p8b, ranks); the rows of one list train the same and are held against its first.
PARALLEL: list[dict[str, tuple[list[str], int]]] = [
    {"FP32, width 512, one GPU": (FP32, 1), "FP32, width 512, two GPUs (EP=2)": (FP32, 2)},
    {
        "BF16, one GPU": (several(2), 1),
        "BF16, two GPUs (EP=2)": (several(2), 2),
        "BF16, one GPU, micro-batches of 4": (FOUR, 1),
    },
]


class Part:
    """Trains and writes what it finds; a training that fails is a line, not the end."""

    def __init__(self, options: argparse.Namespace, say: Callable[[str], None]) -> None:
        self.options, self.say = options, say

    def steps(
        self, configuration: str, overrides: list[str], flags: str = "", ranks: int = 1
    ) -> list[dict[str, Any]] | None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                return train_in(Path(folder), configuration, overrides, flags.split(), self.options, ranks)
        except RuntimeError as error:
            self.say(f"{configuration} {' '.join(overrides)} {flags} on {ranks}: {error}")
            return None


def cost(name: str, part: Part) -> None:
    part.say(f"| {SEQUENCES} sequences of 4096 a step | s a step | against one | tokens/s | peak GiB |")
    part.say("|---|---|---|---|---|")
    one = None
    for row, (configuration, overrides, flags) in COST[name].items():
        if (steps := part.steps(configuration, overrides, flags)) is None:
            continue
        seconds = median_seconds(steps)
        one = one or seconds
        cells = [f"{seconds:.3f}", f"{seconds / one:.2f}", f"{SEQUENCES * 4096 / seconds:,.0f}"]
        part.say(f"| {row} | {' | '.join(cells)} | {steps[-1]['peak_gib']:.1f} |")


def parallel(part: Part) -> None:
    """The same sequences a step on either number of ranks."""
    sequences = 2 * SEQUENCES
    part.say(f"2 experts, {sequences} sequences a step, {part.options.steps} steps.\n")
    part.say(
        "| training | s a step | tokens/s | largest difference of a loss from its first row, relative "
        "| of a gradient norm | loss of the last step | bytes a token sent by a rank |"
    )
    part.say("|---|---|---|---|---|---|---|")
    for rows in PARALLEL:
        first, *_ = rows
        trained: dict[str, list[dict[str, Any]]] = {}
        for name, (given, ranks) in rows.items():
            overrides = [*mixture(2), *SAME, *given, f"megatron.expert-model-parallel-size={ranks}"]
            steps = part.steps("cherry_1p8b", overrides, f"--global-batch-size {sequences}", ranks)
            if steps is None:
                continue
            trained[name] = steps
            seconds = median_seconds(steps)
            tokens = sequences * load(Path("configs/cherry_1p8b.yaml"), overrides).value("seq-length")
            cells = [f"{seconds:.3f}", f"{tokens / seconds:,.0f}"]
            for key in ("loss", "grad_norm"):
                cells.append(f"{largest(key, steps, trained[first]):.1e}" if first in trained else "-")
            cells += [f"{steps[-1]['loss']:.4f}", f"{steps[-1]['moee']['bytes-per-token']:.0f}"]
            part.say(f"| {name} | {' | '.join(cells)} |")


def largest(key: str, steps: list[dict[str, Any]], first: list[dict[str, Any]]) -> float:
    """The largest difference of a step's value from the first training's, relative to that."""
    return max(abs(one[key] - other[key]) / other[key] for one, other in zip(steps, first, strict=True))


def fp8(part: Part) -> None:
    """The reduced family's width: 200 steps of the true one would take minutes."""
    # The first router has a norm of the embedding before it, and nothing of FP8.
    pattern = "recurrence.pattern=E[(*E)x2]x4*-"
    small = [*REDUCED, pattern, "megatron.num-experts=8", "megatron.log-interval=1"]
    length = "--train-iters 200"
    bf16 = part.steps("layers_227m", small, length)
    low = part.steps(
        "layers_227m", [*small, "megatron.moe-router-padding-for-fp8=true"], f"{FP8} tensorwise {length}"
    )
    if bf16 is None or low is None:
        return
    gaps = [b["loss"] - a["loss"] for a, b in zip(bf16, low, strict=True)]
    shares = [{key: v for key, v in steps[0]["moee"].items() if key.startswith("load/")} for steps in (bf16, low)]
    moved = {key: abs(share - shares[1][key]) for key, share in shares[0].items()}
    first = max(share for key, share in moved.items() if key.startswith("load/layer-1/"))
    part.say(
        f"8 experts in a layer and in each of 2 behind it, walked 4 times, width 512, {len(gaps)} steps: loss in "
        f"FP8 (tensorwise, padded) minus BF16: mean {sum(gaps) / len(gaps):+.4f}, last 20 "
        f"steps {sum(gaps[-20:]) / 20:+.4f} of "
        f"{bf16[-1]['loss']:.3f}. Shares of the tokens that experts saw in step 1 differ by at most "
        f"{first:.2e} in the first layer, whose router sees nothing of FP8, and {max(moved.values()):.2e} in all."
    )


def full(part: Part) -> None:
    """Python launches every expert for every micro-batch: larger ones ask less of it."""
    count = torch.cuda.device_count()
    part.say(f"CHERRY-1.8B, 8 experts on {count} GPUs, {SEQUENCES * count} sequences a step.\n")
    part.say("| micro-batch | s a step | tokens/s | peak GiB | first loss | last loss |")
    part.say("|---|---|---|---|---|---|")
    for size in (4, 1):
        overrides = [*several(size), f"megatron.expert-model-parallel-size={count}"]
        if (steps := part.steps("cherry_1p8b", overrides, ranks=count)) is None:
            continue
        seconds = median_seconds(steps)
        cells = [f"{seconds:.3f}", f"{SEQUENCES * count * 4096 / seconds:,.0f}"]
        cells += [f"{max(step['peak_gib'] for step in steps):.1f}"]
        cells += [f"{step['loss']:.3f}" for step in (steps[0], steps[-1])]
        part.say(f"| {size} | {' | '.join(cells)} |")


PARTS: dict[str, Callable[[Part], None]] = {
    **{name: partial(cost, name) for name in COST},
    "parallel": parallel,
    "fp8": fp8,
    "full": full,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--limit", type=int, default=200, help="seconds a training may take")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # as in precision.py: FP32 is no TF32
    lines = [
        "# What a mixture costs",
        "",
        f"`python benchmarks/moee_speed.py --steps {options.steps}` on {torch.cuda.device_count()} "
        f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, commit "
        f"{git_state().get('commit', 'unknown')}. BF16 where nothing else is said, Adam step included.",
    ]

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        options.output.write_text("\n".join(lines) + "\n")

    for name in options.only:
        say(f"\n## {name}\n")
        PARTS[name](Part(options, say))


if __name__ == "__main__":
    main()
