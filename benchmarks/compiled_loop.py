"""The baseline of train_speed.py: the looped model in plain PyTorch under torch.compile, what a user would write.

    python benchmarks/compiled_loop.py --config configs/cherry_227m.yaml [--set KEY=VALUE ...] --output RESULT.json
        [--sequences 8] [--micro-batch 4] [--steps 24] [--tuned]

One GPU, float32 weights, BF16 by autocast, F.scaled_dot_product_attention, fused AdamW, clipped gradients, and the
whole model under torch.compile with default settings. `--tuned`: mode max-autotune-no-cudagraphs and cuDNN's
attention. Tokens are random.
"""

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cherry_megatron.config import Config, load
from cherry_megatron.model.pattern import unroll
from cherry_megatron.model.shape import Shape


class Layer(nn.Module):
    """Attention with rotary positions and a SwiGLU, each behind an RMSNorm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.heads * shape.head_size
        self.heads, self.size = shape.heads, shape.head_size
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(shape.hidden, eps=1e-5) for _ in range(2))
        self.qkv = nn.Linear(shape.hidden, 3 * width, bias=False)
        self.proj = nn.Linear(width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [b, s, h]; cos, sin: [s, d]."""
        b, s, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(b, s, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        q, k, v = rotate(qkv[0], cos, sin), rotate(qkv[1], cos, sin), qkv[2]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, s, -1))
        gate, up = self.up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class LoopedModel(nn.Module):
    """Stored layers walked in an order.

    Args:
        shape: sizes of a layer.
        walk: the stored layer of each effective one.
        base: of the rotary positions.
        length: tokens of a sequence.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, walk: list[int], base: float, length: int) -> None:
        super().__init__()
        self.walk = walk
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(max(walk) + 1))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        frequencies = base ** (-torch.arange(0, shape.head_size, 2) / shape.head_size)
        angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of labels, in nats; both [b, s]."""
        x = self.embedding(tokens)
        for layer in self.walk:
            x = self.layers[layer](x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [b, heads, s, d], halves rotated in the type of x."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), -1) * sin.to(x.dtype)


def build(config: Config) -> LoopedModel:
    """The model of a configuration, with the sizes and the order of layers that are trained here."""
    shape, recurrence = config.shape, config.recurrence
    visits = unroll(recurrence.parsed, recurrence.loops, recurrence.order)
    assert shape.groups == shape.heads and not shape.tied and not recurrence.loop_scales
    walk = [visit.layer for visit in visits]
    return LoopedModel(shape, walk, config.value("rotary-base"), config.value("seq-length"))


def attention_by(tuned: bool) -> contextlib.AbstractContextManager[Any]:
    """What a forward pass runs in; torch's is good for one alone."""
    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if tuned else contextlib.nullcontext()


def train(model: LoopedModel, config: Config, options: argparse.Namespace) -> list[float]:
    """Seconds of each step, the first of which compiles."""
    compiled = torch.compile(model, mode="max-autotune-no-cudagraphs" if options.tuned else None)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, (0.9, 0.95), weight_decay=0.1, fused=True)
    size = (options.micro_batch, config.value("seq-length"))
    parts = options.sequences // options.micro_batch
    found = []
    for _ in range(options.steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(parts):
            tokens = torch.randint(config.shape.vocabulary, size, device="cuda")
            with torch.autocast("cuda", torch.bfloat16), attention_by(options.tuned):
                loss = compiled(tokens, tokens.roll(-1, 1))
            (loss / parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=8, help="of a step")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--tuned", action="store_true")
    options = parser.parse_args()
    config = load(options.config, options.set)
    with torch.device("cuda"):
        model = build(config)
    seconds = train(model, config, options)
    peak = torch.cuda.max_memory_allocated() / 2**30
    options.output.write_text(json.dumps({"seconds": seconds, "peak_gib": peak}) + "\n")


if __name__ == "__main__":
    main()
