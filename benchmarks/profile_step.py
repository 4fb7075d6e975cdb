"""What a GPU does in a training step: busy time, gaps, and time by class of kernel.

    python benchmarks/profile_step.py --tokenizer DIR --data PREFIX --output RESULT.md [--config cherry_227m]
        [--set KEY=VALUE ...] [--flags "--cuda-graph-impl full_iteration ..."]

Runs `cherry pretrain` with Megatron's switch for torch.profiler and reads its trace of a few steps. The profiler
costs the host time for every launch: without a CUDA graph gaps look larger than they are.
"""

import argparse
import gzip
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pretraining import train_in

from cherry_megatron.versions import git_state

FIRST, LAST = 12, 15  # steps that are traced
COMMUNICATION = "communication"
GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
# The first that matches a kernel's name.
CLASSES = {
    COMMUNICATION: r"nccl",
    "attention": r"flash|fmha|sdpa|attention|attn",
    "optimizer": r"adam|multi_tensor|l2norm",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitk",
    "cross-entropy": r"cross_entropy|softmax|nll",
    "norms": r"rmsnorm|layernorm|layer_norm|rms_norm",
    "rotary positions": r"rope|rotary",
    "SwiGLU": r"swiglu|silu|glu",
    "casts and transposes": r"cast|transpose|quantize|amax|scale_inv",
    "copies": r"memcpy|memset|copy",
}
REST = "other element-wise"


def class_of(kernel: str) -> str:
    """Of a kernel's name."""
    return next((name for name, found in CLASSES.items() if re.search(found, kernel, re.IGNORECASE)), REST)


def busy(spans: Iterable[tuple[float, float]]) -> tuple[float, list[float]]:
    """The time covered by spans of (begin, end), and the gaps between them."""
    total, gaps, until = 0.0, [], None
    for begin, end in sorted(spans):
        if until is None or begin >= until:
            if until is not None and begin > until:
                gaps.append(begin - until)
            total, until = total + end - begin, end
        elif end > until:
            total, until = total + end - until, end
    return total, gaps


def read(run: Path) -> list[dict[str, Any]]:
    """The events of a run's trace."""
    with gzip.open(run / "torch_profile" / "rank-0.json.gz", "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def exposed(events: list[dict[str, Any]]) -> float:
    """Share of the time of a trace in which a GPU exchanges and does nothing else.

    Args:
        events: of a Chrome trace.
    """
    found = _of_gpu(events)
    everything, _ = busy(_span(event) for event in found)
    others, _ = busy(_span(event) for event in found if class_of(event["name"]) != COMMUNICATION)
    return (everything - others) / _whole(found)


def _of_gpu(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event.get("ph") == "X" and event.get("cat") in GPU_EVENTS]


def _span(event: dict[str, Any]) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _whole(found: list[dict[str, Any]]) -> float:
    return max(_span(event)[1] for event in found) - min(_span(event)[0] for event in found)


def report(events: list[dict[str, Any]], steps: int) -> list[str]:
    """Lines of Markdown.

    Args:
        events: of a Chrome trace; times in microseconds.
        steps: that were traced.
    """
    found = _of_gpu(events)
    if not found:
        return ["Nothing of a GPU was traced."]
    whole = _whole(found)
    total, gaps = busy(map(_span, found))
    classes: dict[str, list[float]] = {}
    kernels: dict[str, list[float]] = {}
    for event in found:
        classes.setdefault(class_of(event["name"]), []).append(event["dur"])
        kernels.setdefault(event["name"], []).append(event["dur"])
    lines = [
        f"{whole / steps / 1e3:.1f} ms a step, busy {total / steps / 1e3:.1f} ms ({total / whole:.1%}), "
        f"{len(gaps) / steps:.0f} gaps, the longest {max(gaps, default=0) / 1e3:.2f} ms.",
        "",
        "| class | ms a step | share of busy | kernels a step |",
        "|---|---|---|---|",
    ]
    lines += [_row(name, times, total, steps) for name, times in _longest(classes)]
    lines += ["", "| kernel | ms a step | share of busy | launches a step |", "|---|---|---|---|"]
    return lines + [_row(f"`{name[:90]}`", times, total, steps) for name, times in _longest(kernels)[:40]]


def _longest(times: dict[str, list[float]]) -> list[tuple[str, list[float]]]:
    return sorted(times.items(), key=lambda item: -sum(item[1]))


def _row(name: str, times: list[float], total: float, steps: int) -> str:
    return f"| {name} | {sum(times) / steps / 1e3:.2f} | {sum(times) / total:.1%} | {len(times) / steps:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--config", default="cherry_227m", help="of configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--flags", default="", help="Megatron's")
    parser.add_argument("--limit", type=int, default=300, help="seconds that it may take")
    options = parser.parse_args()
    options.steps = LAST + 1
    profile = f"--profile --use-pytorch-profiler --profile-step-start {FIRST} --profile-step-end {LAST}"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train_in(run, options.config, options.set, f"{options.flags} {profile}".split(), options)
        events = read(run)
    overrides = "".join(f" --set {override}" for override in options.set)
    command = f"python benchmarks/profile_step.py --config {options.config}{overrides} --flags '{options.flags}'"
    head = [
        "# Where a step's time goes",
        "",
        f"`{command}` on one {torch.cuda.get_device_name(0)}, torch {torch.__version__}, commit "
        f"{git_state().get('commit', 'unknown')}; steps {FIRST} to {LAST - 1}.",
        "",
    ]
    lines = [*head, *report(events, LAST - FIRST)]
    options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:20]))


if __name__ == "__main__":
    main()
