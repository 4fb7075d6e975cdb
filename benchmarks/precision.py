"""What lower precision and the fast path cost in loss: the same steps in FP32, BF16 and FP8, eager and as a graph.

    python benchmarks/precision.py --tokenizer DIR --data PREFIX --output RESULT.md [--steps 300] [--only GROUP ...]

Real text in the same order, the same initial weights. At the reduced family's width also FP32, which would take too
long at full width, and not the TF32 that Transformer Engine would make of it. Of each group every training is held
against its first, over all steps and over the last twenty.
"""

import argparse
import os
from pathlib import Path

import torch
from pretraining import FP8, GRAPH, train

from cherry_megatron.versions import git_state

LAST = 20
REDUCED = (
    "megatron.hidden-size=512", "megatron.ffn-hidden-size=1280", "megatron.num-attention-heads=4",
    "megatron.seq-length=1024", "megatron.max-position-embeddings=1024", "megatron.micro-batch-size=8",
    "megatron.eval-micro-batch-size=8", "megatron.lr=1e-3",
)  # fmt: skip
FULL = ("megatron.micro-batch-size=8", "megatron.eval-micro-batch-size=1")
# Overrides and flags by group and name.
GROUPS: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "reduced": {
        "BF16": (REDUCED, ""),
        "BF16, again": (REDUCED, ""),
        "BF16, one CUDA graph": (REDUCED, GRAPH),
        "FP32": ((*REDUCED, "megatron.bf16=false"), ""),
        "FP8 delayed": (REDUCED, f"{FP8} delayed"),
        "FP8 delayed, one CUDA graph": (REDUCED, f"{FP8} delayed {GRAPH}"),
        "FP8 tensorwise, one CUDA graph": (REDUCED, f"{FP8} tensorwise {GRAPH}"),
    },
    "full": {
        "BF16, one CUDA graph": (FULL, GRAPH),
        "FP8 delayed, one CUDA graph": (FULL, f"{FP8} delayed {GRAPH}"),
        "FP8 tensorwise, one CUDA graph": (FULL, f"{FP8} tensorwise {GRAPH}"),
    },
}


def row(name: str, losses: list[float], first: list[float]) -> str:
    """Of Markdown.

    Args:
        name: what it begins with.
        losses: of each step.
        first: those that they are held against.
    """
    gaps = [loss - other for loss, other in zip(losses, first, strict=True)]
    end, last = sum(first[-LAST:]) / LAST, sum(gaps[-LAST:]) / LAST
    worst = max(abs(gap) / other for gap, other in zip(gaps, first, strict=True))
    cells = [
        f"{end + last:.4f}",
        f"{last:+.4f}",
        f"{last / end:+.2%}",
        f"{sum(gaps) / len(gaps):+.4f}",
        f"{worst:.1e}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--limit", type=int, default=300, help="seconds a training may take")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    options = parser.parse_args()
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # cuBLAS has no other switch against what a library asks of it
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    lines = [
        "# What precision costs in loss",
        "",
        f"`python benchmarks/precision.py --steps {options.steps}` on one {device}, torch {torch.__version__}, "
        f"commit {git_state().get('commit', 'unknown')}. cherry_227m, 8 sequences a step; losses in nats.",
        "",
    ]

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        options.output.write_text("\n".join(lines) + "\n")

    for group in options.only:
        first: list[float] | None = None
        say(f"\n## {group} width\n")
        say(f"| | last {LAST} steps | against the first | of it | all steps | largest of a step, relative |")
        say("|---|---|---|---|---|---|")
        for name, (overrides, flags) in GROUPS[group].items():
            try:
                steps = train("cherry_227m", [*overrides], flags.split(), options)
            except RuntimeError as error:
                say(f"| {name} | {error} | | | | |")
                continue
            losses = [step["loss"] for step in steps]
            first = first or losses
            say(row(name, losses, first))


if __name__ == "__main__":
    main()
