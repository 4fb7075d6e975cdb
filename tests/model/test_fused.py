"""The norm that carries the residual stream, and the rotation, against formulas of torch and Megatron."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cherry_megatron.runs import read_steps
from tests.conftest import _train, run_ranks

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # BF16: half a unit of its last place


def gradients(dtype, frozen):
    """[(ours, torch's)] of the output, the stream, and the gradients of x and the weight."""
    from cherry_megatron.model.fused import norm_with_residual

    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(5, 3, 64, generator=generator) for _ in range(3)]
    x, of_norm, of_stream = (tensor.to(dtype) for tensor in drawn)
    weight = torch.randn(64, generator=generator).to(dtype)
    found = []
    for ours in (True, False):
        one, scale = x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        if ours:
            normed, stream = norm_with_residual(one, scale, 1e-5)
        else:  # in float32, and rounded at the end
            normed, stream = F.rms_norm(one.float(), (64,), scale.float(), 1e-5).to(dtype), one
        torch.autograd.backward((normed, stream), (of_norm, of_stream))
        assert normed.dtype == stream.dtype == dtype
        values = (normed.detach(), stream.detach(), one.grad, scale.grad)
        found.append([None if value is None else value.float().numpy() for value in values])
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_norm_is_torchs(dtype, tmp_path):
    (found,) = run_ranks(tmp_path, 1, gradients, dtype, False)
    for ours, torchs in found:
        assert (abs(ours - torchs) <= TOLERANCES[dtype] * (1 + abs(torchs))).all()


def test_a_frozen_weight_gets_no_gradient(tmp_path):
    (found,) = run_ranks(tmp_path, 1, gradients, torch.float32, True)
    assert found[-1] == (None, None)
    assert np.allclose(*found[2], atol=1e-6)


def kinds_compiled():
    """What the compiled functions get where the weight is a parameter, scaled or frozen, and without a gradient."""
    from cherry_megatron.model import fused

    given = []

    def listening(name):
        compiled = getattr(fused, name)

        def call(*tensors):
            given.append({(type(one), one.requires_grad) for one in tensors if isinstance(one, torch.Tensor)})
            return compiled(*tensors)

        setattr(fused, name, call)

    listening("_norm")
    listening("_norm_backward")
    weight, frozen = torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(8), requires_grad=False)
    for one in (weight, weight * 2, frozen):
        normed, stream = fused.norm_with_residual(torch.randn(4, 2, 8, requires_grad=True), one, 1e-5)
        (normed.sum() + stream.sum()).backward()
    with torch.no_grad():
        fused.norm_with_residual(torch.randn(4, 2, 8), weight, 1e-5)
    return given


def test_one_kernel_serves_every_kind_of_weight_and_pass(tmp_path):
    """Torch compiles anew for each kind of tensor, and no more after the eighth."""
    (given,) = run_ranks(tmp_path, 1, kinds_compiled)
    assert given == [{(torch.Tensor, False)}] * 7


def rotations(dtype, groups, queries):
    """[(ours, Megatron's)] of queries, keys, values and the gradient of the product that they come from."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as rotate

    from cherry_megatron.model.fused import rotate_qkv

    length, batch, width = 7, 3, 8
    sizes = [queries * width, width, width]
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(length, batch, groups, sum(sizes), generator=generator).to(dtype)
    shapes = [(groups * queries, width), (groups, width), (groups, width)]
    of_parts = [torch.randn(length, batch, *shape, generator=generator).to(dtype) for shape in shapes]
    frequencies = 10000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)[:, None, None]
    found = []
    for ours in (True, False):
        qkv = given.clone().requires_grad_()
        if ours:
            parts = rotate_qkv(qkv, angles, angles, sizes)
        else:  # in float32, and rounded at the end
            query, key, value = qkv.float().split(sizes, -1)
            query = query.reshape(length, batch, -1, width)
            parts = tuple(part.to(dtype) for part in (rotate(query, angles), rotate(key, angles), value))
        assert all(part.dtype == dtype for part in parts)
        assert not ours or all(part.is_contiguous() for part in parts)
        torch.autograd.backward(parts, of_parts)
        found.append([value.detach().float().numpy() for value in (*parts, qkv.grad)])
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("groups,queries", [(3, 1), (2, 3), (1, 2)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_rotation_is_megatrons(dtype, groups, queries, tmp_path):
    (found,) = run_ranks(tmp_path, 1, rotations, dtype, groups, queries)
    for ours, megatrons in found:
        assert (abs(ours - megatrons) <= TOLERANCES[dtype] * (1 + abs(megatrons))).all()


def train_rotating(path, fused):
    """A training by Megatron's split queries, or by ours of the unsplit product; whether ours was called."""
    from megatron.core.transformer import attention

    from cherry_megatron import pretrain

    calls = []
    ours = pretrain.rotate_qkv

    def counted(*given):
        calls.append(1)
        return ours(*given)

    prepare = pretrain.prepare_config

    def prepared(*given):
        config = prepare(*given)
        config.fused_single_qkv_rope = fused
        return config

    attention.HAVE_FUSED_QKV_ROPE = True
    pretrain.rotate_qkv, pretrain.prepare_config = counted, prepared
    _train(path, [], [])
    return bool(calls)


def test_a_training_that_rotates_the_unsplit_product_is_megatrons(tmp_path, write_config):
    steps = []
    for fused in (False, True):
        path = write_config(tmp_path / str(fused))
        assert run_ranks(tmp_path / str(fused), 1, train_rotating, path, fused) == [fused]
        steps.append([(step["loss"], step["grad_norm"]) for step in read_steps(tmp_path / str(fused) / "run")])
    assert steps[1] == [pytest.approx(step, rel=1e-6) for step in steps[0]]
