"""Transformer Engine without a GPU: its layers with their kernels replaced by torch's formulas.

What a training builds, asks for and saves on a GPU can so be walked on a CPU, wherever Transformer Engine imports:
PyTorch's CUDA libraries have to be in LD_LIBRARY_PATH. Only the kernels themselves remain for a GPU to show.
"""

from collections import Counter
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def pretend() -> Counter:
    """Have this process take its machine for one with Transformer Engine; gives the number of calls by kernel."""
    from cherry_megatron.platform import machine

    found = machine.inspect_machine()
    unless_local = ("no-rope-fusion", "no-persist-layer-norm", "no-masked-softmax-fusion")
    flags = {flag: value for flag, value in found.flags.items() if flag not in unless_local}
    libraries = (machine.Library("transformer-engine", "2.20", True),)
    pretended = replace(found, libraries=libraries, flags={**flags, "transformer-impl": "transformer_engine"})
    machine.inspect_machine = lambda: pretended
    machine.prepare()
    calls: Counter = Counter()
    _replace_layers()
    _replace_kernels(calls)
    replace_updates()
    return calls


def _replace_layers() -> None:
    from megatron.core.extensions import transformer_engine as layers

    from cherry_megatron import pretrain

    layers.TELinear.forward = lambda self, x: (F.linear(x, self.weight), None)
    layers.TEDotProductAttention.forward = _attend
    make = pretrain.model_provider

    def make_as_on_a_gpu(config: Any) -> Any:
        provide = make(config)

        @wraps(provide)
        def build(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.is_available = lambda: True  # or its modules are not built
            try:
                return provide(*args, **kwargs)
            finally:
                torch.cuda.is_available = lambda: False

        return build

    pretrain.model_provider = make_as_on_a_gpu


def _attend(self: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Causal, [s, b, n, d] to [s, b, n * d]."""
    length, batch = query.shape[:2]
    heads = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    found = F.scaled_dot_product_attention(*heads, is_causal=True)
    return found.permute(2, 0, 1, 3).reshape(length, batch, -1)


def _replace_kernels(calls: Counter) -> None:
    import transformer_engine_torch as kernels
    from megatron.core.models.common.language_module import language_module

    def cross_entropy(logits: Tensor, labels: Tensor, *_: Any) -> Tensor:
        calls["cross-entropy"] += 1
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.reshape(-1), reduction="none")
        return losses.view(logits.shape[:2])

    def swiglu(x: Tensor, quantizer: None) -> Tensor:
        calls["SwiGLU"] += 1
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def swiglu_backward(gradient: Tensor, x: Tensor, quantizer: None) -> Tensor:
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            gate, up = again.chunk(2, -1)
            (found,) = torch.autograd.grad(F.silu(gate) * up, again, gradient)
        return found

    language_module.te_parallel_cross_entropy = cross_entropy
    kernels.swiglu, kernels.dswiglu = swiglu, swiglu_backward


def replace_updates() -> None:
    """The norm of all gradients, and what clips them, which Megatron takes from there wherever it imports."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    def scale(_size: int, _flag: Tensor, lists: list[list[Tensor]], factor: Tensor) -> None:
        for source, target in zip(*lists, strict=True):
            target.copy_(source * factor)

    clip_grads.multi_tensor_applier = utils.local_multi_tensor_applier
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.multi_tensor_scale_tensor_impl = scale
