"""Corrections start from what each loop lacks of the layer that it stands in for."""

import numpy as np
import pytest
import torch

from cherry_megatron.errors import CherryError
from cherry_megatron.surgery import compress
from cherry_megatron.surgery.corrections import truncated
from tests.surgery.conftest import HIDDEN, model_tensors, read, save

LINEARS = {
    "self_attention.linear_qkv": 2,
    "self_attention.linear_proj": 2,
    "mlp.linear_fc1": 3,
    "mlp.linear_fc2": 3,
}
NORMS = {"self_attention.linear_qkv", "mlp.linear_fc1"}


def reference(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest matrix of a rank, by torch's decomposition."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 9)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_truncation_is_the_nearest_of_its_rank(shape, rank):
    matrix = np.random.default_rng(0).normal(size=shape)
    outer, inner = truncated(matrix, rank)
    assert outer.shape == (shape[0], rank) and inner.shape == (rank, shape[1])
    np.testing.assert_allclose(outer @ inner, reference(torch.from_numpy(matrix), rank), atol=1e-10)


def test_nothing_missing_leaves_a_factor_to_learn_from():
    outer, inner = truncated(np.zeros((8, 5)), 2)
    assert not (outer @ inner).any()
    assert outer.any() or inner.any()


def make(tmp_path, config, tensors, recurrence, **options):
    save(tmp_path / "deep", tensors)
    path = config(recurrence={"loop_rank": 3, **recurrence})
    compress.plan_compression(tmp_path / "deep", path, (), compress.Options(**options)).run(tmp_path / "small", 2)
    return read(tmp_path / "small/iter_0000000"), path


@pytest.mark.parametrize(
    ("recurrence", "options", "slots"),
    [
        ({"pattern": "*-[*-]x4*-"}, {"groups": "0,1-4,5"}, [[1], [2], [3], [4]]),
        ({"pattern": "*-[*-]x2*-"}, {"groups": "0,1-4,5"}, [[1, 2], [3, 4]]),
        ({"pattern": "*-[*-]x4*-"}, {"groups": "0,1+4,5"}, [[1], [1], [4], [4]]),
        ({"pattern": "*-[*-]x4*-"}, {"groups": "0,1-4,5", "method": "select", "keep": 0}, [[1], [2], [3], [4]]),
    ],
)  # fmt: skip
def test_factors_are_the_truncated_decomposition(recurrence, options, slots, tmp_path, config):
    if "keep" in options:
        options = {**options, "groups": "0-0,1-4,5-5"}
    tensors = model_tensors(6)
    ours, _ = make(tmp_path, config, tensors, recurrence, **options)
    for linear, sublayer in LINEARS.items():
        prefix = f"decoder.layers.{sublayer}.{linear}"
        inner, outer = ours[f"{prefix}.loop_a"].double(), ours[f"{prefix}.loop_b"].double()
        for loop, members in enumerate(slots):
            missing = -ours[f"{prefix}.weight"].double()
            for member in members:
                source = f"decoder.layers.{2 * member + sublayer % 2}.{linear}"
                weight = tensors[f"{source}.weight"].double()
                if linear in NORMS:
                    weight = weight * tensors[f"{source}.layer_norm_weight"] / ours[f"{prefix}.layer_norm_weight"]
                missing += weight / len(members)
            product = outer[loop].reshape(len(missing), -1) @ inner[loop]
            torch.testing.assert_close(product, reference(missing, 3), rtol=1e-5, atol=1e-5)


def test_layers_that_differ_by_little_come_back_whole(tmp_path, config):
    """Compressed and expanded again: what differs by no more than the rank is not lost."""
    tensors = model_tensors(6)
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if ".layers.2." in name or ".layers.3." in name]:
        sublayer, rest = name.removeprefix("decoder.layers.").split(".", 1)
        for layer in range(2, 5):
            other = f"decoder.layers.{2 * layer + int(sublayer) % 2}.{rest}"
            tensors[other] = tensors[name].clone()
            if tensors[name].dim() == 2:
                rows, columns = tensors[name].shape
                apart = torch.randn(rows, 1, generator=generator) @ torch.randn(1, columns, generator=generator)
                tensors[other] += apart
    _, path = make(tmp_path, config, tensors, {"pattern": "*-[*-]x4*-"}, groups="0,1-4,5")
    compress.plan_expansion(tmp_path / "small", path, ()).run(tmp_path / "dense", 2)
    dense = read(tmp_path / "dense/iter_0000000")
    assert dense.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(dense[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("recurrence", "options", "says"),
    [
        ({"loop_rank": HIDDEN}, {}, r"loop_rank is 24, but mlp.linear_fc2 of 24 x 20 has no larger rank than 20"),
        ({}, {"optimizer": "average"}, r"there are no moments for recurrence.loop_rank; use drop"),
        ({}, {"method": "select", "align": "weights"}, r"which select does not take; use --align none"),
    ],
)
def test_bad_input(recurrence, options, says, tmp_path, config):
    with pytest.raises(CherryError, match=says):
        make(tmp_path, config, model_tensors(6), {"pattern": "*-[*-]x4*-", **recurrence}, **options)
