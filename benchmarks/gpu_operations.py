"""What a GPU reaches in products, attention, element-wise work and collectives. For calibrate_planner.py.

    torchrun --nproc-per-node GPUS benchmarks/gpu_operations.py --output RESULT.json [--tiny]

Each operation runs some twenty times after as many to warm up; the median counts. The first rank writes the file,
before the collectives too, lest these take the rest along.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

PRODUCTS = [
    (8192, 8192, 8192), (32768, 1280, 6400), (32768, 3200, 1280), (1280, 32768, 6400), (16384, 1280, 3840),
    (16384, 640, 1280), (16384, 1280, 44544), (16384, 2048, 2048),
]  # fmt: skip
ATTENTION = [(128, 4096), (128, 1024), (64, 4096)]  # head size, sequence
SIZES = [1 << 12, 1 << 28]  # bytes of collectives
KINDS = ("all-gather", "reduce-scatter", "all-reduce")


def seconds_of(run: Callable[[], Any], repeats: int = 20) -> float:
    """The median time of an operation, of a GPU without what the host takes to launch it."""
    for _ in range(repeats):
        run()
    return statistics.median(_on_gpu(run, repeats) if torch.cuda.is_available() else _on_cpu(run, repeats))


def _on_gpu(run: Callable[[], Any], repeats: int) -> list[float]:
    """Each call is queued behind a write of its own, in whose time the host launches it."""
    written = torch.empty(1 << 28, device="cuda", dtype=torch.uint8)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for began, ended in marks:
        written.zero_()
        began.record()
        run()
        ended.record()
    torch.cuda.synchronize()
    return [began.elapsed_time(ended) / 1e3 for began, ended in marks]


def _on_cpu(run: Callable[[], Any], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def product(sizes: tuple[int, int, int], device: str) -> float:
    rows, inner, columns = sizes
    a = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    b = torch.randn(inner, columns, device=device, dtype=torch.bfloat16)
    return seconds_of(lambda: a @ b)


def fp8_product(sizes: tuple[int, int, int], device: str) -> float:
    """As Transformer Engine has cuBLAS do it: both operands in E4M3, the result in BF16."""
    rows, inner, columns = sizes
    a = torch.randn(rows, inner, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(columns, inner, device=device).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=device)
    return seconds_of(
        lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    )


def attention(head_size: int, sequence: int, tokens: int, device: str) -> dict[str, Any]:
    """Causal attention of heads that are 1280 wide together, by cuDNN, which Transformer Engine takes too."""
    heads = max(1280 // head_size, 1)
    shape = (tokens // sequence, heads, sequence, head_size)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, device=device, dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        if device == "cpu":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    there = seconds_of(forward)
    both = seconds_of(lambda: torch.autograd.grad(forward(), (q, k, v), gradient))
    return {
        "head_size": head_size, "sequence": sequence, "tokens": tokens, "width": heads * head_size,
        "forward": there, "both": both,
    }  # fmt: skip


def stream(size: int, device: str) -> float:
    """Bytes a second of an addition in BF16."""
    a, b = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 3 * a.nbytes / seconds_of(lambda: torch.add(a, b, out=out))


def collective(kind: str, size: int, device: str) -> float:
    ranks = torch.distributed.get_world_size()
    whole = torch.zeros(size // 2 // ranks * ranks, device=device, dtype=torch.bfloat16)
    part = whole[: len(whole) // ranks].clone()
    run: dict[str, Callable[[], Any]] = {
        "all-gather": lambda: torch.distributed.all_gather_into_tensor(whole, part),
        "reduce-scatter": lambda: torch.distributed.reduce_scatter_tensor(part, whole),
        "all-reduce": lambda: torch.distributed.all_reduce(whole),
    }
    return seconds_of(run[kind])


def collectives(tiny: bool, device: str) -> list[list[Any]]:
    """[kind, bytes, ranks, seconds] of each."""
    ranks = torch.distributed.get_world_size()
    sizes = [1 << 10, 1 << 16] if tiny else SIZES
    kinds = KINDS if device != "cpu" else ("all-reduce",)
    return [[kind, size, ranks, collective(kind, size, device)] for kind in kinds for size in sizes]


def operations(tiny: bool, device: str) -> dict[str, Any]:
    """All but collectives."""
    cut = 64 if tiny else 1
    sizes = [(max(a // cut, 16), max(b // cut, 16), max(c // cut, 16)) for a, b, c in PRODUCTS]
    tokens = 256 if tiny else 32768
    found: dict[str, Any] = {
        "products": [[*each, product(each, device)] for each in sizes],
        "attention": [
            attention(head_size, max(sequence // cut, 16), tokens, device) for head_size, sequence in ATTENTION
        ],
        "stream": stream((1 << 28) // cut**2, device),
        "fp8_products": [],
    }
    if device != "cpu" and torch.cuda.get_device_capability() >= (8, 9):
        found["fp8_products"] = [[*each, fp8_product(each, device)] for each in sizes[:3]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    options = parser.parse_args()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    found = operations(options.tiny, device)
    found["gpu"] = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    found["collectives"] = []
    if os.environ.get("RANK", "0") == "0":
        options.output.write_text(json.dumps(found) + "\n")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("nccl" if device != "cpu" else "gloo")
        found["collectives"] = collectives(options.tiny, device)
        if torch.distributed.get_rank() == 0:
            options.output.write_text(json.dumps(found) + "\n")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
