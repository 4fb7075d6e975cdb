"""Layers whose heads and neurons are in another order are put back in order."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cherry_megatron.storage.layers import FC1, FC2, PROJ, QKV
from cherry_megatron.surgery.align import Alignment, match_heads, match_neurons
from tests.surgery.conftest import FFN, GROUPS, HEADS, HIDDEN, SIZE, layer_tensors

HOW = Alignment(HEADS, GROUPS, gated=True)
QUERIES = HEADS // GROUPS


def draw_layer(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    named = layer_tensors("0", lambda *shape: torch.randn(*shape, generator=generator))
    return {name.split(".", 3)[3]: tensor for name, tensor in named.items()}


def shuffled(layer: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same function: groups, query heads within them, and neurons in another order."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(GROUPS)
    heads = [rng.permutation(QUERIES) for _ in groups]
    qkv = layer[f"{QKV}.weight"].reshape(GROUPS, QUERIES + 2, SIZE, HIDDEN)[groups]
    proj = layer[f"{PROJ}.weight"].reshape(HIDDEN, GROUPS, QUERIES, SIZE)[:, groups]
    qkv = torch.stack([torch.cat((g[:-2][order], g[-2:])) for g, order in zip(qkv, heads, strict=True)])
    proj = torch.stack([proj[:, k][:, order] for k, order in enumerate(heads)], dim=1)
    neurons = rng.permutation(FFN)
    fc1 = layer[f"{FC1}.weight"].reshape(2, FFN, HIDDEN)[:, neurons]
    return {
        **layer,
        f"{QKV}.weight": qkv.reshape(-1, HIDDEN),
        f"{PROJ}.weight": proj.reshape(HIDDEN, -1),
        f"{FC1}.weight": fc1.reshape(-1, HIDDEN),
        f"{FC2}.weight": layer[f"{FC2}.weight"][:, neurons],
    }


def attention(layer: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    """[s, h] -> [s, h]: causal attention with query groups and rotary positions, in plain PyTorch."""
    length = len(x)
    qkv = (F.rms_norm(x, (HIDDEN,), layer[f"{QKV}.layer_norm_weight"]) @ layer[f"{QKV}.weight"].T).reshape(
        length, GROUPS, QUERIES + 2, SIZE
    )
    angles = torch.outer(torch.arange(length), 10.0 ** -torch.arange(SIZE // 2)).repeat(1, 2)[:, None, None]

    def rotate(t: torch.Tensor) -> torch.Tensor:
        half = torch.cat((-t[..., SIZE // 2 :], t[..., : SIZE // 2]), dim=-1)
        return t * angles.cos() + half * angles.sin()

    query, key, value = rotate(qkv[:, :, :-2]), rotate(qkv[:, :, -2:-1]), qkv[:, :, -1:]
    scores = torch.einsum("sgqd,tgkd->gqst", query, key) / SIZE**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    out = torch.einsum("gqst,tgkd->sgqd", scores.softmax(-1), value)
    return out.reshape(length, -1) @ layer[f"{PROJ}.weight"].T


def mlp(layer: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    gate, up = (F.rms_norm(x, (HIDDEN,), layer[f"{FC1}.layer_norm_weight"]) @ layer[f"{FC1}.weight"].T).chunk(2, -1)
    return (F.silu(gate) * up) @ layer[f"{FC2}.weight"].T


def mean(layers: list[dict[str, Any]], align: bool) -> dict[str, Any]:
    numpy = [{role: tensor.numpy() for role, tensor in layer.items()} for layer in layers]
    summed = {role: values.copy() for role, values in numpy[0].items()}
    for other in numpy[1:]:
        for role, values in other.items():
            match = match_heads if role.startswith("self_attention") else match_neurons
            summed[role] += match(numpy[0], other, HOW).apply(role, values) if align else values
    return {role: torch.from_numpy(values / len(layers)) for role, values in summed.items()}


@pytest.mark.parametrize("part", [attention, mlp])
def test_shuffled_copies_average_back_to_the_function_with_alignment_only(part):
    layer = draw_layer(0)
    copies = [layer, *(shuffled(layer, seed) for seed in range(1, 6))]
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1))
    expected = part(layer, x)
    for copy in copies:
        torch.testing.assert_close(part(copy, x), expected, rtol=1e-5, atol=1e-5)

    def error(align: bool) -> float:
        return float((part(mean(copies, align), x) - expected).norm() / expected.norm())

    assert error(True) < 1e-6
    assert error(False) > 0.3


def test_a_noisy_copy_is_still_put_in_order():
    layer = draw_layer(2)
    other = {role: t + 0.3 * torch.randn_like(t) for role, t in shuffled(layer, 3).items()}
    aligned, plain = mean([layer, other], True), mean([layer, other], False)
    for role in (f"{QKV}.weight", f"{FC1}.weight", f"{FC2}.weight", f"{PROJ}.weight"):
        assert (aligned[role] - layer[role]).norm() < 0.4 * (plain[role] - layer[role]).norm()


def test_a_plain_ffn_without_gate_is_matched_too():
    rng = np.random.default_rng(0)
    layer = {
        f"{FC1}.weight": rng.normal(size=(FFN, HIDDEN)),
        f"{FC2}.weight": rng.normal(size=(HIDDEN, FFN)),
        f"{FC1}.layer_norm_weight": np.ones(HIDDEN),
    }
    order = rng.permutation(FFN)
    other = {
        **layer,
        f"{FC1}.weight": layer[f"{FC1}.weight"][order],
        f"{FC2}.weight": layer[f"{FC2}.weight"][:, order],
    }
    found = match_neurons(layer, other, Alignment(1, 1, gated=False))
    for role, values in other.items():
        assert np.array_equal(found.apply(role, values), layer[role])
