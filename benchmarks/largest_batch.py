"""The largest micro-batch that a GPU of 80 GB takes, by length of the sequence, and how fast it trains.

    python benchmarks/largest_batch.py --tokenizer DIR --data PREFIX --output RESULT.md [--gib 79.2] [--steps 6]

`cherry plan`'s memory model says where to begin; from there micro-batches grow or shrink by one sequence, or a
sixteenth, until one fits whose successor does not. A step is one micro-batch. A larger GPU gives PyTorch no more
than --gib of its memory.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from planner_fit import Training
from pretraining import GRAPH, median_seconds, train

from cherry_megatron.monitor.accounting import PEAK_BF16, account, together
from cherry_megatron.planner.coefficients import read
from cherry_megatron.planner.hardware import GPUS
from cherry_megatron.versions import git_state

RECOMPUTE = (
    "megatron.recompute-granularity=full", "megatron.recompute-method=uniform", "megatron.recompute-num-layers=1",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What is trained.

    Attributes:
        configuration: of configs/.
        sequence: tokens.
        recompute: activations again in the backward pass, a loop at a time; else one CUDA graph.
    """

    configuration: str
    sequence: int
    recompute: bool

    def training(self, size: int) -> Training:
        """With a micro-batch of so many sequences."""
        overrides = [
            f"megatron.seq-length={self.sequence}", f"megatron.max-position-embeddings={self.sequence}",
            f"megatron.micro-batch-size={size}", "megatron.eval-micro-batch-size=1",
        ]  # fmt: skip
        flags = f"--global-batch-size {size}"
        if self.recompute:
            return Training(self.configuration, (*overrides, *RECOMPUTE), flags, sequences=size)
        return Training(self.configuration, tuple(overrides), f"{flags} {GRAPH}", sequences=size)

    @property
    def flops(self) -> float:
        """Of a token, forward and backward, without what is recomputed."""
        config = self.training(1).config
        return together(account(config.recurrence, config.shape, self.sequence)).flops


ROWS = [
    Row(configuration, sequence, recompute)
    for configuration, sequences in (("cherry_227m", (4096, 16384, 65536)), ("base_1b", (4096, 16384)))
    for sequence in sequences
    for recompute in (False, True)
]


def predicted(row: Row, gib: float) -> int:
    """The largest micro-batch that the memory model lets in; 0 if none."""
    gpu, measured = GPUS["h100"], read("h100")
    size = 0
    while row.training(size + 1).gib(gpu, measured) <= gib:
        size += 1
    return size


def largest(row: Row, start: int, options: argparse.Namespace) -> tuple[int, list[dict[str, float]]]:
    """The largest micro-batch that trains, and its steps; 0 if not even one sequence does."""
    best: tuple[int, list[dict[str, float]]] = (0, [])
    size, by, fails = max(start, 1), max(start // 16, 1), set[int]()
    while size > best[0] and size not in fails:
        training = row.training(size)
        try:
            best = size, train(row.configuration, [*training.overrides], training.flags.split(), options)
        except RuntimeError:  # out of memory; what else it may be stands in the output
            fails.add(size)
        size += by if size == best[0] else -by
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--gib", type=float, default=79.2, help="of the GPU that PyTorch may have (default an H100's)"
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--limit", type=int, default=120, help="seconds a training may take")
    options = parser.parse_args()
    gpu = torch.cuda.get_device_properties(0)
    share = min(options.gib * 2**30 / gpu.total_memory, 1.0)
    os.environ["PYTORCH_ALLOC_CONF"] = f"per_process_memory_fraction:{share:.4f}"
    lines = [
        "# The largest micro-batch",
        "",
        f"`python benchmarks/largest_batch.py --steps {options.steps}` on one {gpu.name} of which PyTorch has "
        f"{share * gpu.total_memory / 2**30:.1f} GiB, torch {torch.__version__}, commit "
        f"{git_state().get('commit', 'unknown')}. BF16, Adam step included.",
        "",
        "| | sequence | | predicted | largest | tokens of it | s a step | tokens/s | MFU | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        start = predicted(row, options.gib)
        size, steps = largest(row, start, options)
        cells = [row.configuration, f"{row.sequence}", "recomputed" if row.recompute else "graph", f"{start}"]
        if size:
            seconds, tokens = median_seconds(steps), size * row.sequence
            mfu = row.flops * tokens / seconds / PEAK_BF16
            peak = max(step["peak_gib"] for step in steps)
            cells += [
                f"{size}",
                f"{tokens}",
                f"{seconds:.3f}",
                f"{tokens / seconds:,.0f}",
                f"{mfu:.1%}",
                f"{peak:.1f}",
            ]
        else:
            cells += ["none", *[""] * 5]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
