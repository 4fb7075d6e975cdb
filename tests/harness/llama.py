"""A recurrent model without injection as transformers' Llama: layers unrolled, loop vectors folded into them."""

import shutil
from pathlib import Path

import torch

CORE = (1, 2)  # of the pattern *-[*-*-]x3*-


def walk(loops: int) -> list[tuple[int, int | None]]:
    """Layer and loop of each effective layer, as tests/model/reference.py has them."""
    return [(0, None), *((layer, loop) for loop in range(loops) for layer in CORE), (3, None)]


def unrolled(state: dict[str, torch.Tensor], loops: int, heads: int) -> dict[str, torch.Tensor]:
    """Llama's state dict."""
    found = {
        "model.embed_tokens.weight": state["embedding.word_embeddings.weight"],
        "model.norm.weight": state["decoder.final_norm.weight"],
        "lm_head.weight": state["output_layer.weight"],
    }
    for place, (layer, loop) in enumerate(walk(loops)):
        start, attention, mlp = (
            f"model.layers.{place}.",
            f"decoder.layers.{2 * layer}.",
            f"decoder.layers.{2 * layer + 1}.",
        )
        qkv = state[f"{attention}self_attention.linear_qkv.weight"]
        size = len(qkv) // heads // 3
        parts = qkv.view(heads, 3, size, -1).unbind(1)
        for name, part in zip("qkv", parts, strict=True):
            found[f"{start}self_attn.{name}_proj.weight"] = part.flatten(0, 1)
        gate, up = state[f"{mlp}mlp.linear_fc1.weight"].chunk(2)
        found |= {f"{start}mlp.gate_proj.weight": gate, f"{start}mlp.up_proj.weight": up}
        for ours, norm, add, linear, theirs, out in (
            (attention, "input_layernorm", "self_attn_bda", "self_attention.linear_proj", *_ATTENTION),
            (mlp, "pre_mlp_layernorm", "mlp_bda", "mlp.linear_fc2", *_MLP),
        ):
            before = after = torch.ones(())
            if loop is not None:
                before = state[f"{ours}{norm}.loop_scale"].view(loops, -1)[loop]
                after = state[f"{ours}{add}.loop_scale"].view(loops, -1)[loop]
            found[f"{start}{theirs}.weight"] = state[f"{ours}{norm}.weight"] * before
            found[f"{start}{out}.weight"] = (state[f"{ours}{linear}.weight"].T * after).T
    return found


_ATTENTION = ("input_layernorm", "self_attn.o_proj")
_MLP = ("post_attention_layernorm", "mlp.down_proj")


def save_as_llama(state: dict[str, torch.Tensor], loops: int, heads: int, tokenizer: Path, folder: Path) -> None:
    """Write it with its tokenizer, as `AutoModelForCausalLM.from_pretrained` reads it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = unrolled(state, loops, heads)
    vocabulary, hidden = weights["lm_head.weight"].shape
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=heads,
        intermediate_size=len(weights["model.layers.0.mlp.gate_proj.weight"]), num_hidden_layers=len(walk(loops)),
        max_position_embeddings=192, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
