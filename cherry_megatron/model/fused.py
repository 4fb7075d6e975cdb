"""Element-wise work of a layer in as few passes over memory as it takes, where Megatron's takes more.

A profile of an H200 (docs/performance.md) says why these three: Transformer Engine's RMSNorm has no tuned kernel
for a width of 1280 and takes twice the time of its bytes, Megatron's SwiGLU backward, which joins halves, as well,
and Transformer Engine's rotation of queries and keys takes four times that of its own.
"""

from typing import Any

import torch
from megatron.core.jit import jit_fuser
from megatron.core.transformer import TransformerConfig
from torch import Tensor


def norm_with_residual(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root mean square norm (Zhang & Sennrich 2019), and the residual stream that goes round it.

    The backward pass adds the stream's gradient in the kernel that has the norm's, not in one more pass.

    Args:
        x: [s, b, h].
        weight: [h].
        eps: added to the mean square.

    Returns:
        The norm's output and x itself, whose gradient comes back here; both [s, b, h].
    """
    found: tuple[Tensor, Tensor] = _NormWithResidual.apply(x, weight, eps)
    return found


@jit_fuser
def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: [n, h]. The output, and the float32 factor of each row, [n, 1]."""
    wide = x.float()
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * factor * weight.float()).to(x.dtype), factor


@jit_fuser
def _norm_backward(
    gradient: Tensor, residual: Tensor, x: Tensor, weight: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x, with `residual` added, and of the weight; gradient, residual, x: [n, h]."""
    unit = x.float() * factor
    wide = gradient.float()
    scaled = wide * weight.float()
    of_x = (scaled - unit * (scaled * unit).mean(-1, keepdim=True)) * factor + residual.float()
    return of_x.to(x.dtype), (wide * unit).sum(0).to(weight.dtype)


class _NormWithResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, factor = _norm(_rows(x), weight.detach(), eps)
        ctx.save_for_backward(x, weight, factor)
        return normed.view_as(x), x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, factor = ctx.saved_tensors
        of_x, of_weight = _norm_backward(_rows(gradient), _rows(residual), _rows(x), weight.detach(), factor)
        return of_x.view_as(x), of_weight if ctx.needs_input_grad[1] else None, None


def _rows(x: Tensor) -> Tensor:
    """[n, h] of [s, b, h], detached as the weight is: torch compiles anew for what has a gradient, eight times."""
    return x.detach().reshape(-1, x.shape[-1])


class SwiGLU(torch.nn.Module):
    """silu(gate) * up (Shazeer 2020) by Transformer Engine's kernels, for MLPs with `use_te_activation_func`.

    Its own module of them has an extra state, which a checkpoint of the local layers lacks. Input: [s, b, 2f], the
    gates first; output: [s, b, f].
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _SwiGLU.apply(x)
        return found


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        import transformer_engine_torch as kernels

        ctx.save_for_backward(x)
        found: Tensor = kernels.swiglu(x, None)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        import transformer_engine_torch as kernels

        (x,) = ctx.saved_tensors
        found: Tensor = kernels.dswiglu(gradient.contiguous(), x, None)
        return found


def rotate_qkv(qkv: Tensor, of_queries: Tensor, of_keys: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021) on the way from the linear layer's output to attention.

    Takes the place, and the arguments, of Transformer Engine's `apply_fused_qkv_rotary_pos_emb` in Megatron.

    Args:
        qkv: [s, b, g, (q + 2) * d]: of each group its q heads of queries, the keys and the values.
        of_queries: angles, [s, 1, 1, d], of which the second half is the first again.
        of_keys: the same.
        sizes: q * d, d and d.

    Returns:
        Queries, [s, b, g * q, d], and keys and values, [s, b, g, d].
    """
    found: tuple[Tensor, Tensor, Tensor] = _RotateQKV.apply(qkv, of_queries, sizes[-1])
    return found


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Each pair (i, i + d/2) of a head turned by its angle; x: [s, b, g, n, 2, d/2], the tables are `_tables`."""
    wide = x.float()
    return (wide * cosine + wide.flip(-2) * sine).to(x.dtype)


@jit_fuser
def _rotate(qkv: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """qkv: [s, b, g, q + 2, 2, d/2]."""
    queries = _turned(qkv[:, :, :, :-2], cosine, sine)
    keys = _turned(qkv[:, :, :, -2:-1], cosine, sine)
    return queries, keys, qkv[:, :, :, -1:].contiguous()


@jit_fuser
def _rotate_back(queries: Tensor, keys: Tensor, values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The gradient of qkv from its parts', [s, b, g, n, 2, d/2]: a rotation is undone by its transpose."""
    return torch.cat((_turned(queries, cosine, -sine), _turned(keys, cosine, -sine), values), 3)


class _RotateQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, angles: Tensor, width: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(angles)
        halves = qkv.detach().unflatten(-1, (-1, 2, width // 2))
        return tuple(part.flatten(2, 3).flatten(-2) for part in _rotate(halves, *_tables(angles.detach())))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        groups = keys.shape[2]
        parts = (
            part.detach().unflatten(2, (groups, -1)).unflatten(-1, (2, -1)) for part in (queries, keys, values)
        )
        return _rotate_back(*parts, *_tables(angles.detach())).flatten(3), None, None


@jit_fuser
def _tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines, [s, 1, 1, 1, 1, d/2], and sines, of the first half negative, [s, 1, 1, 1, 2, d/2]; float32.

    Not in the kernels that rotate, which would compute both anew for each head.
    """
    half = angles.float().unflatten(-1, (1, 2, -1))[..., :1, :]
    sine = half.sin()
    return half.cos(), torch.cat((-sine, sine), -2)
