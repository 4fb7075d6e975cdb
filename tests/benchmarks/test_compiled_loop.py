"""The baseline that speed is compared with computes the same function."""

import argparse
import contextlib
from pathlib import Path

import torch
from torch.nn import functional as F

from cherry_megatron.config import load
from tests.model import reference

HERE = Path(__file__).parents[2]
HEADS, SIZE = 2, 16
SMALL = [
    "hidden-size=32",
    "ffn-hidden-size=48",
    f"num-attention-heads={HEADS}",
    "padded-vocab-size=64",
    "seq-length=24",
]


def named_as_ours(model) -> dict[str, torch.Tensor]:
    """Its weights by the names of a recurrent model, queries, keys and values head by head."""
    state = {
        "embedding.word_embeddings.weight": model.embedding.weight,
        "decoder.final_norm.weight": model.norm.weight,
        "output_layer.weight": model.head.weight,
    }
    for number, layer in enumerate(model.layers):
        attention, mlp = f"decoder.layers.{2 * number}.", f"decoder.layers.{2 * number + 1}."
        qkv = layer.qkv.weight.view(3, HEADS, SIZE, -1).transpose(0, 1).flatten(0, 2)
        state |= {
            f"{attention}input_layernorm.weight": layer.attention_norm.weight,
            f"{attention}self_attention.linear_qkv.weight": qkv,
            f"{attention}self_attention.linear_proj.weight": layer.proj.weight,
            f"{mlp}pre_mlp_layernorm.weight": layer.mlp_norm.weight,
            f"{mlp}mlp.linear_fc1.weight": layer.up.weight,
            f"{mlp}mlp.linear_fc2.weight": layer.down.weight,
        }
    return state


def test_baseline_is_the_same_function(benchmark_script):
    config = load(HERE / "configs" / "cherry_227m.yaml", [f"megatron.{size}" for size in SMALL])
    torch.manual_seed(1)
    model = benchmark_script("compiled_loop").build(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    tokens = torch.randint(64, (2, 24))
    walk = [(0, None), *((layer, loop) for loop in range(8) for layer in (1, 2, 3, 4)), (5, None)]
    logits = reference.forward(named_as_ours(model), tokens, walk, heads=HEADS, groups=HEADS, size=SIZE)
    labels = tokens.roll(-1, 1)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(tokens, labels), expected, rtol=1e-5, atol=0)


def test_each_pass_chooses_its_attention(benchmark_script, monkeypatch):
    """With what torch gives for one pass alone, the second of a tuned model would fail."""
    script = benchmark_script("compiled_loop")
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, tokens, labels):
            seen.append(torch.backends.cuda.flash_sdp_enabled())
            return self.weight.sum()

    monkeypatch.setattr(torch, "compile", lambda model, mode: model)
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "randint", lambda most, size, device: torch.zeros(size, dtype=torch.long))
    options = argparse.Namespace(tuned=True, micro_batch=1, sequences=2, steps=2)
    assert len(script.train(Model(1, 1), load(HERE / "configs/cherry_227m.yaml"), options)) == 2
    assert seen == [False] * 4
