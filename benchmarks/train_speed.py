"""Training speed on one GPU beside what a user would pick instead, in one run.

    python benchmarks/train_speed.py --tokenizer DIR --data PREFIX --output RESULT.md [--steps 24] [--heads 10 20]
        [--only NAME ...]

cherry_227m, 8 sequences of 4096 a step, the optimizer's step included, with 10 heads of 128 (as configured) and
with 20 of 64: the looped model in plain PyTorch under torch.compile (compiled_loop.py), stock Megatron with as many
untied layers (stock_megatron.py), and `cherry pretrain`. Each row is a process; one with several micro-batches runs
once for each, and its fastest counts. Beside RESULT.md stands RESULT.json with every step's seconds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pretraining import FP8, GRAPH, SEQUENCES, train_in

from cherry_megatron.config import load
from cherry_megatron.monitor.accounting import PEAK_BF16, training_flops
from cherry_megatron.versions import git_state

CONFIG = Path("configs/cherry_227m.yaml")
COMPILED, STOCK = "torch.compile", "stock Megatron, 34 layers"


@dataclass(frozen=True)
class Row:
    """What is measured.

    Attributes:
        program: a script beside this one, or empty for `cherry pretrain`.
        flags: of the program, or of Megatron.
        micro_batches: sizes that are tried.
    """

    program: str
    flags: str = ""
    micro_batches: tuple[int, ...] = (4, 8)


ROWS = {
    COMPILED: Row("compiled_loop.py"),
    "torch.compile, tuned": Row("compiled_loop.py", "--tuned", (8,)),
    STOCK: Row("stock_megatron.py", micro_batches=(4,)),
    "cherry, BF16": Row("", micro_batches=(4,)),
    # Of a graph the larger is the faster (benchmarks/results).
    "cherry, BF16, graph": Row("", GRAPH, (8,)),
    "cherry, FP8 delayed, graph": Row("", f"{FP8} delayed {GRAPH}", (8,)),
    "cherry, FP8 tensorwise, graph": Row("", f"{FP8} tensorwise {GRAPH}", (8,)),
}


@dataclass(frozen=True)
class Measured:
    """One run of a row.

    Attributes:
        heads: of the model.
        name: of the row.
        micro_batch: sequences.
        seconds: of each step.
        peak_gib: memory allocated.
    """

    heads: int
    name: str
    micro_batch: int
    seconds: list[float]
    peak_gib: float

    @property
    def tokens(self) -> float:
        """A second, by the median step without the first third."""
        return SEQUENCES * 4096 / statistics.median(self.seconds[len(self.seconds) // 3 :])


def measure(name: str, heads: int, micro_batch: int, options: argparse.Namespace) -> Measured:
    """Run a row once.

    Raises:
        RuntimeError: if it fails, or takes longer than it may.
    """
    row, size = ROWS[name], f"megatron.num-attention-heads={heads}"
    with tempfile.TemporaryDirectory() as folder:
        if row.program:
            result = Path(folder) / "result.json"
            given = {"config": CONFIG, "set": size, "output": result, "steps": options.steps}
            given |= {"sequences": SEQUENCES, "micro-batch": micro_batch}
            found = _baseline(row, given, options.limit)
            return Measured(heads, name, micro_batch, found["seconds"], found["peak_gib"])
        overrides = [size, f"megatron.micro-batch-size={micro_batch}"]
        steps = train_in(Path(folder), CONFIG.stem, overrides, row.flags.split(), options)
        return Measured(heads, name, micro_batch, [step["seconds"] for step in steps], steps[-1]["peak_gib"])


def _baseline(row: Row, given: dict[str, Any], limit: int) -> dict[str, Any]:
    program = str(Path(__file__).with_name(row.program))
    command = [sys.executable, program, *(f"--{key}={value}" for key, value in given.items()), *row.flags.split()]
    try:
        subprocess.run(command, check=True, timeout=limit, stdout=sys.stderr)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{row.program}: {error}"[:200]) from None
    found: dict[str, Any] = json.loads(given["output"].read_text())
    return found


def table(heads: int, found: list[Measured], failed: list[str]) -> list[str]:
    """Lines of Markdown; the fastest run of each row, with its ratios to the two baselines."""
    config = load(CONFIG)
    flops = training_flops(config.recurrence, config.shape, config.value("seq-length"))
    best: dict[str, Measured] = {}
    for run in found:
        if run.heads == heads and (run.name not in best or run.tokens > best[run.name].tokens):
            best[run.name] = run
    lines = [
        f"## {heads} heads of {1280 // heads}",
        "",
        f"| | micro-batch | tokens/s | TFLOP/s | MFU | against {COMPILED} | against {STOCK} | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in best.items():
        ratios = [f"{run.tokens / best[other].tokens:.2f}" if other in best else "" for other in (COMPILED, STOCK)]
        rate = run.tokens * flops
        lines.append(
            f"| {name} | {run.micro_batch} | {run.tokens:,.0f} | {rate / 1e12:.0f} | {rate / PEAK_BF16:.1%} | "
            f"{' | '.join(ratios)} | {run.peak_gib:.1f} |"
        )
    return [*lines, "", *failed]


def ceilings() -> str:
    """What this GPU reaches in products alone, in words."""
    config = load(CONFIG)
    tokens = SEQUENCES * config.value("seq-length")
    square, ffn = (
        _product(*sizes) for sizes in ((8192, 8192, 8192), (tokens, config.shape.hidden, 2 * config.shape.ffn))
    )
    return f"BF16 products alone: {square:.0f} TFLOP/s of 8192 x 8192 matrices, {ffn:.0f} of this model's FFN."


def _product(rows: int, inner: int, columns: int, repeats: int = 30) -> float:
    a = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(inner, columns, device="cuda", dtype=torch.bfloat16)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repeat in range(2 * repeats):
        if repeat == repeats:
            began.record()
        a @ b
    ended.record()
    torch.cuda.synchronize()
    return 2 * rows * inner * columns * repeats / began.elapsed_time(ended) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--heads", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--limit", type=int, default=300, help="seconds a run may take")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    options = parser.parse_args()
    head = [
        "# Training speed, one GPU",
        "",
        f"`python benchmarks/train_speed.py --steps {options.steps}` on one {torch.cuda.get_device_name(0)}, torch "
        f"{torch.__version__}, commit {git_state().get('commit', 'unknown')}. {SEQUENCES} sequences of 4096 a "
        f"step, optimizer included, median step; MFU against {PEAK_BF16 / 1e12:.0f} TFLOP/s, also for FP8.",
        ceilings(),
        "",
    ]
    found: list[Measured] = []
    failed: dict[int, list[str]] = {heads: [] for heads in options.heads}
    for heads in options.heads:
        for name in options.only:
            for micro_batch in ROWS[name].micro_batches:
                try:
                    found.append(measure(name, heads, micro_batch, options))
                    print(f"{heads} heads, {name}, {micro_batch}: {found[-1].tokens:,.0f} tokens/s", flush=True)
                except RuntimeError as error:
                    failed[heads].append(f"{name}, micro-batch {micro_batch}: {error}")
                lines = [line for heads in options.heads for line in table(heads, found, failed[heads])]
                options.output.write_text("\n".join([*head, *lines]) + "\n")
                options.output.with_suffix(".json").write_text(json.dumps([asdict(run) for run in found]))


if __name__ == "__main__":
    main()
