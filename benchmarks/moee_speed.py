"""What a mixture costs on one or two GPUs: against one expert, over expert-parallel ranks, in FP8, and CHERRY-1.8B.

    python benchmarks/moee_speed.py --tokenizer DIR --data PREFIX --output RESULT.md [--steps 15] [--only NAME ...]

Each part trains real text by `cherry pretrain` at full width and says what it found as soon as it has it:

cost        step time of 2 and 4 experts on one GPU against one, both granularities
parallel    the losses of two experts on two GPUs against those on one
fp8         experts inside layers in FP8 against BF16: losses of 200 steps, router counts of the first
full        CHERRY-1.8B, 8 experts of 227M, on all GPUs there are
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pretraining import FP8, GRAPH, SEQUENCES, median_seconds, train_in

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
# name: (configuration, overrides, flags); the rows of one list are held against its first.
COST: list[dict[str, tuple[str, list[str], str]]] = [
    {
        "one expert, one graph": ("cherry_227m", FOUR, GRAPH),
        "2 experts, all see a sequence, one graph": ("cherry_1p8b", [*mixture(2), *FOUR], GRAPH),
        "one expert, one graph, again": ("cherry_227m", FOUR, GRAPH),
    },
    {
        "one expert": ("cherry_227m", FOUR, ""),
        "2 experts, all see a sequence": ("cherry_1p8b", [*mixture(2), *FOUR], ""),
        "4 experts, 2 see a sequence": ("cherry_1p8b", [*mixture(4, 2), *FOUR], ""),
        "layers of 2 experts, 2 a token": ("layers_227m", ["megatron.num-experts=2", *FOUR], ""),
        "layers of 8 experts, 2 a token": ("layers_227m", FOUR, ""),
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


def cost(part: Part) -> None:
    part.say(f"| {SEQUENCES} sequences of 4096 a step | s a step | against one | tokens/s | peak GiB |")
    part.say("|---|---|---|---|---|")
    for rows in COST:
        one = None
        for name, (configuration, overrides, flags) in rows.items():
            if (steps := part.steps(configuration, overrides, flags)) is None:
                continue
            seconds = median_seconds(steps)
            one = one or seconds
            cells = [f"{seconds:.3f}", f"{seconds / one:.2f}", f"{SEQUENCES * 4096 / seconds:,.0f}"]
            part.say(f"| {name} | {' | '.join(cells)} | {steps[-1]['peak_gib']:.1f} |")


def parallel(part: Part) -> None:
    """The same sequences a step on either number of ranks."""
    overrides = [*mixture(2), *several(2), *SAME]
    alone = part.steps("cherry_1p8b", overrides, f"--global-batch-size {2 * SEQUENCES}")
    pair = part.steps("cherry_1p8b", [*overrides, "megatron.expert-model-parallel-size=2"], ranks=2)
    if alone is None or pair is None:
        return
    worst = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(alone, pair, strict=True))
    one, two = median_seconds(alone), median_seconds(pair)
    part.say(
        f"2 experts, {2 * SEQUENCES} sequences a step, {len(alone)} steps: losses of two ranks (EP=2) differ from "
        f"one rank's by at most {worst:.1e} of them (at the end {alone[-1]['loss']:.4f} and "
        f"{pair[-1]['loss']:.4f}); {one:.3f} s a step on one GPU, {two:.3f} on two; "
        f"{pair[-1]['moee']['bytes-per-token']:.0f} bytes a token sent by a rank."
    )


def fp8(part: Part) -> None:
    """The reduced family's width: 200 steps of the true one would take minutes."""
    small = [
        "megatron.hidden-size=512", "megatron.ffn-hidden-size=1280", "megatron.num-attention-heads=4",
        "megatron.seq-length=1024", "megatron.max-position-embeddings=1024", *several(8), "megatron.num-experts=8",
        # The first router has a norm of the embedding before it, and nothing of FP8.
        "recurrence.pattern=E[(*E)x2]x4*-", "megatron.lr=1e-3", "megatron.log-interval=1",
    ]  # fmt: skip
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
    count = torch.cuda.device_count()
    steps = part.steps("cherry_1p8b", [f"megatron.expert-model-parallel-size={count}"], ranks=count)
    if steps is not None:
        seconds = median_seconds(steps)
        part.say(
            f"CHERRY-1.8B, 8 experts on {count} GPUs, micro-batches of 1: {seconds:.3f} s a step of "
            f"{SEQUENCES * count} sequences, {SEQUENCES * count * 4096 / seconds:,.0f} tokens/s, peak "
            f"{max(step['peak_gib'] for step in steps):.1f} GiB, losses {steps[0]['loss']:.3f} to "
            f"{steps[-1]['loss']:.3f}."
        )


PARTS = {"cost": cost, "parallel": parallel, "fp8": fp8, "full": full}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--limit", type=int, default=200, help="seconds a training may take")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    lines = [
        "# What a mixture costs",
        "",
        f"`python benchmarks/moee_speed.py --steps {options.steps}` on {torch.cuda.device_count()} "
        f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, BF16, commit "
        f"{git_state().get('commit', 'unknown')}. Adam step included.",
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
