"""The fast kernels against the plain formulas: each alone, and a training step by step."""

import pytest
import torch
from torch.nn import functional as F

from tests.conftest import HAS_GPU, _train, run_ranks
from tests.gpu.test_selective import GRAPH, SHAPE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]


def kernels():
    """Relative errors of outputs and gradients in BF16, against float32."""
    from cherry_megatron.model.fused import SwiGLU, norm_with_residual

    def plain(x, weight):
        normed = F.rms_norm(x, x.shape[-1:], weight, 1e-5)
        gate, up = normed.chunk(2, -1)
        return F.silu(gate) * up, x

    def fused(x, weight):
        normed, stream = norm_with_residual(x, weight, 1e-5)
        return SwiGLU(None)(normed), stream

    torch.manual_seed(1)
    x, weight = torch.randn(64, 4, 1280, device="cuda"), torch.randn(1280, device="cuda")
    given = torch.randn(64, 4, 640, device="cuda"), torch.randn(64, 4, 1280, device="cuda")
    found = []
    for run, dtype in ((plain, torch.float32), (fused, torch.bfloat16)):
        # Values that BF16 has, so that the two differ by their arithmetic alone.
        one, scale = (tensor.bfloat16().to(dtype).requires_grad_() for tensor in (x, weight))
        out = run(one, scale)
        torch.autograd.backward(out, [tensor.bfloat16().to(dtype) for tensor in given])
        found.append([out[0].detach(), one.grad, scale.grad])
    return [float((ours.float() - exact).norm() / exact.norm()) for exact, ours in zip(*found, strict=True)]


def test_each_kernel_is_its_formula(tmp_path):
    (errors,) = run_ranks(tmp_path, 1, kernels)
    print(errors)
    assert max(errors) < 1e-2


@pytest.mark.parametrize("graph", ["", GRAPH], ids=["eager", "graph"])
def test_a_training_is_that_of_the_plain_path(graph, tmp_path, write_config):
    """In BF16 by the fast kernels, and with Megatron's own loss, rotation and SwiGLU."""
    from cherry_megatron.runs import read_steps

    losses = {}
    for name, plain in (("fast", False), ("plain", True)):
        more = {"cross-entropy-loss-fusion": True, "no-rope-fusion": True, "no-bias-swiglu-fusion": True}
        path = write_config(tmp_path / name, megatron={**SHAPE, **(more if plain else {})})
        run_ranks(tmp_path / name, 1, _train, path, [], graph.split())
        losses[name] = [step["loss"] for step in read_steps(tmp_path / name / "run")]
    worst = max(abs(a - b) / b for a, b in zip(*losses.values(), strict=True))
    print(f"{worst:.1e} over {len(losses['fast'])} steps")
    assert worst < 2e-3
