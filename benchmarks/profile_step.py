"""What a GPU does in a training step: busy time, gaps and where they are, and time by class of kernel.

    python benchmarks/profile_step.py --tokenizer DIR --data PREFIX --output RESULT.md [--config cherry_227m]
        [--set KEY=VALUE ...] [--flags "--cuda-graph-impl full_iteration ..."]

Runs `cherry pretrain` with Megatron's switch for torch.profiler and reads its trace of a few steps. The profiler
costs the host time for every launch: without a CUDA graph gaps look larger than they are.
"""

import argparse
import gzip
import json
import math
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pretraining import train_in

from cherry_megatron.versions import git_state

FIRST, LAST = 12, 15  # steps that are traced
COMMUNICATION, REST = "communication", "other element-wise"
GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
# The first that matches a kernel's name. Inductor's tell all that is fused: casts and copies among it come last.
CLASSES = {
    COMMUNICATION: r"nccl",
    "attention": r"flash|fmha|sdpa|attention|attn",
    "optimizer": r"adam|multi_tensor|l2norm",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitk",
    "cross-entropy": r"cross_entropy|softmax|nll",
    "norms": r"rmsnorm|layernorm|layer_norm|rms_norm|triton_.*(rsqrt|mean_mul_sub_sum)",
    "rotary positions": r"rope|rotary|triton_.*flip",
    "SwiGLU": r"swiglu|silu|glu",
    REST: r"triton_poi_fused_add_",
    # Names of kernels without a cast say so: impl_nocast, LoadWithoutCast.
    "casts and transposes": r"(?<!no)(?<!without)(?<!broad)cast|transpose|quantize|amax|scale_inv",
    "copies": r"memcpy|memset|copy",
}
LONG = 20.0  # microseconds of a gap: what is shorter lies between kernels that were launched in time


def class_of(kernel: str) -> str:
    """Of a kernel's name."""
    return next((name for name, found in CLASSES.items() if re.search(found, kernel, re.IGNORECASE)), REST)


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """The time covered by spans of (begin, end)."""
    total, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return total


def gaps(found: list[dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """The gaps in a GPU's work, by what ran before and what after.

    Args:
        found: events of the GPU.
    """
    by_place: dict[tuple[str, str], list[float]] = {}
    before, until = "", math.inf
    for event in sorted(found, key=_span):
        begin, end = _span(event)
        if begin > until:
            by_place.setdefault((before, event["name"]), []).append(begin - until)
        if not before or end >= until:
            before, until = event["name"], end
    return by_place


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
    everything = busy(map(_span, found))
    others = busy(_span(event) for event in found if class_of(event["name"]) != COMMUNICATION)
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
    whole, total = _whole(found), busy(map(_span, found))
    by_place = gaps(found)
    lengths = [gap for at_place in by_place.values() for gap in at_place]
    waits = [gap for gap in lengths if gap > LONG]
    classes: dict[str, list[float]] = {}
    kernels: dict[str, list[float]] = {}
    for event in found:
        classes.setdefault(class_of(event["name"]), []).append(event["dur"])
        kernels.setdefault(event["name"], []).append(event["dur"])
    lines = [
        f"{whole / steps / 1e3:.1f} ms a step, busy {total / steps / 1e3:.1f} ms ({total / whole:.1%}), "
        f"{len(lengths) / steps:.0f} gaps, the longest {max(lengths, default=0) / 1e3:.2f} ms; "
        f"{len(waits) / steps:.0f} are longer than {LONG:.0f} us, {sum(waits) / steps / 1e3:.2f} ms a step.",
        "",
        "| class | ms a step | share of busy | kernels a step |",
        "|---|---|---|---|",
    ]
    lines += [_row(name, times, total, steps) for name, times in _longest(classes)]
    lines += ["", "| gap after | and before | ms a step | gaps a step |", "|---|---|---|---|"]
    lines += [
        f"| `{_short(before)}` | `{_short(after)}` | {sum(times) / steps / 1e3:.2f} | {len(times) / steps:.1f} |"
        for (before, after), times in _longest(by_place)[:10]
    ]
    lines += ["", "| kernel | ms a step | share of busy | launches a step |", "|---|---|---|---|"]
    return lines + [_row(f"`{_short(name)}`", times, total, steps) for name, times in _longest(kernels)[:40]]


def _short(kernel: str) -> str:
    return kernel[:90]


def _longest[K](times: dict[K, list[float]]) -> list[tuple[K, list[float]]]:
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
    print("\n".join(lines[:32]))


if __name__ == "__main__":
    main()
