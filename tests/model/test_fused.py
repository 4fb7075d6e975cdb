"""The norm that carries the residual stream: its output and gradients are those of torch's norm and an addition."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.conftest import run_ranks

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
