"""Learned vectors of the loops: a scale on a sublayer's norm weight and on its output, per loop.

Both are one at initialization, so an unrolled stack starts as the plain one walked again, and both
fold into the weights (norm weight times scale, output projection's rows times scale), so that an
unrolled dense twin exists.
"""

from collections.abc import Callable

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from cherry_megatron.model.fused import norm_with_residual


class RMSNorm(torch.nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019) whose weight knows sequence parallelism.

    Megatron's torch norm refuses sequence parallelism. Input and output: [s, b, h].
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism each rank sees its own tokens: Megatron sums marked gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ResidualNorm(RMSNorm):
    """The norm ahead of a sublayer, which gives Megatron's layer the residual stream, too. Both: [s, b, h]."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return norm_with_residual(x, self.weight, self.eps)


class PerLoop:
    """Has parameters of each loop; the stack sets `loop` before each walk. Further loops use the last one's."""

    loop = 0
    loops = 1

    @property
    def walk(self) -> int:
        """The loop whose parameters are used."""
        return min(self.loop, self.loops - 1)


class _Scaled(PerLoop, torch.nn.Module):
    """Holds one vector a loop."""

    def __init__(self, config: TransformerConfig, loops: int) -> None:
        super().__init__()
        self.loops = loops
        # One flat parameter: Megatron decays weights of two dimensions, and these must stay near one.
        self.loop_scale = torch.nn.Parameter(torch.ones(loops * config.hidden_size, dtype=config.params_dtype))
        self.loop_scale.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def scale(self) -> Tensor:
        """The vector of the current loop, [h]."""
        return self.loop_scale.view(self.loops, -1)[self.walk]


class LoopNorm(_Scaled):
    """ResidualNorm with the weight scaled per loop."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, loops: int = 1, **_: object
    ) -> None:
        super().__init__(config, loops)
        norm = RMSNorm(config, hidden_size, eps)
        self.eps, self.weight = norm.eps, norm.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return norm_with_residual(x, self.weight * self.scale(), self.eps)


class LoopResidual(_Scaled):
    """Megatron's bias-dropout-add with the sublayer's output scaled per loop before the addition."""

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        add = get_bias_dropout_add(training, fused)

        def scaled_add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, p: float) -> Tensor:
            output, bias = output_with_bias
            scale = self.scale()
            return add((output * scale, None if bias is None else bias * scale), residual, p)

        return scaled_add
