"""A second implementation of the model in plain PyTorch, unrolled by hand from a state dict.

It knows nothing of Megatron: separate q, k, v products, complex-free rotary embedding, softmax
attention, SwiGLU. Used to check outputs and every gradient.
"""

import torch
from torch.nn import functional as F


def local_name(name):
    """The name of a parameter in the local layers, given either's."""
    return name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
        "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
    )


def rotary(x, base):
    """x: [b, heads, s, d]; rotates halves (NeoX style)."""
    s, d = x.shape[-2:]
    frequency = base ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
    angle = torch.outer(torch.arange(s, dtype=torch.float32), frequency).to(x.dtype)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rms(x, weight, eps=1e-5):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def attention(x, w, heads, groups, size, base):
    """x: [b, s, h] already normed."""
    b, s, _ = x.shape
    per = heads // groups
    qkv = w["self_attention.linear_qkv.weight"].view(groups, per + 2, size, -1)
    q = torch.einsum("bsh,gpdh->bgpsd", x, qkv[:, :per]).reshape(b, heads, s, size)
    k = torch.einsum("bsh,gdh->bgsd", x, qkv[:, per]).repeat_interleave(per, 1)
    v = torch.einsum("bsh,gdh->bgsd", x, qkv[:, per + 1]).repeat_interleave(per, 1)
    q, k = rotary(q, base), rotary(k, base)
    scores = (q @ k.transpose(-1, -2) / size**0.5).masked_fill(
        torch.ones(s, s, dtype=torch.bool).triu(1), float("-inf")
    )
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, heads * size)
    return mixed @ w["self_attention.linear_proj.weight"].T


def mlp(x, w):
    gate, up = (x @ w["mlp.linear_fc1.weight"].T).chunk(2, -1)
    return (F.silu(gate) * up) @ w["mlp.linear_fc2.weight"].T


def forward(state, tokens, walk, **model):
    """Logits [b, s, v] of an unrolled model; arguments as for `states`."""
    return states(state, tokens, walk, **model) @ state["output_layer.weight"].T


def states(state, tokens, walk, *, heads, groups, size, base=10000.0, injection="none", prelude=1):
    """What the output layer sees of an unrolled model, [b, s, h].

    Args:
        state: parameter name -> tensor, names as in the model.
        walk: (layer, loop) of each effective layer in order, loop None outside the core.
        prelude: number of prelude layers, for the injection.
    """
    x = state["embedding.word_embeddings.weight"][tokens]
    injected = None
    for layer, loop in walk:
        if layer == prelude and loop is not None:
            if loop == 0:
                injected = x
            elif injection == "add":
                x = x + injected
        for number, norm, add in (
            (2 * layer, "input_layernorm", "self_attn_bda"),
            (2 * layer + 1, "pre_mlp_layernorm", "mlp_bda"),
        ):
            start = f"decoder.layers.{number}."
            w = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            weight, out = w[f"{norm}.weight"], 1.0
            if f"{norm}.loop_scale" in w:
                h = weight.numel()
                # Folded into the weights, as the unrolled dense twin has them.
                weight = weight * w[f"{norm}.loop_scale"].view(-1, h)[loop]
                out = w[f"{add}.loop_scale"].view(-1, h)[loop]
            for linear in [n.removesuffix(".loop_a") for n in w if n.endswith(".loop_a")]:
                a, b = w[f"{linear}.loop_a"][loop], w[f"{linear}.loop_b"][loop]
                w[f"{linear}.weight"] = w[f"{linear}.weight"] + torch.cat([part @ a for part in b])
            y = rms(x, weight)
            y = attention(y, w, heads, groups, size, base) if number % 2 == 0 else mlp(y, w)
            x = x + y * out
    return rms(x, state["decoder.final_norm.weight"])


def predicted_ahead(state, tokens, x, depths, *, heads, groups, size, base=10000.0):
    """Logits of multi-token prediction, one [b, s - depth, v] a depth; x: [b, s, h] as of `states`.

    Depth d is walked over the positions that have a token d places on, and over no others.
    """
    found = []
    for depth in range(1, depths + 1):
        x = depth_states(state, tokens[:, depth:], x[:, :-1], depth, heads, groups, size, base)
        found.append(x @ state["output_layer.weight"].T)
    return found


def depth_states(state, tokens, x, depth, heads, groups, size, base=10000.0):
    """What a depth makes of the states x of the depth before and the tokens that go with them, [b, n, h]."""
    start = f"mtp.layers.{depth - 1}."
    w = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    inner = [
        {k.removeprefix(f"mtp_model_layer.layers.{n}."): v for k, v in w.items() if f"layers.{n}." in k}
        for n in (0, 1)
    ]
    seen = rms(state["embedding.word_embeddings.weight"][tokens], w["enorm.weight"])
    x = torch.cat((seen, rms(x, w["hnorm.weight"])), -1) @ w["eh_proj.weight"].T
    x = x + attention(rms(x, inner[0]["input_layernorm.weight"]), inner[0], heads, groups, size, base)
    x = x + mlp(rms(x, inner[1]["pre_mlp_layernorm.weight"]), inner[1])
    return rms(x, w["final_layernorm.weight"])
