"""Have Megatron rotate unsplit queries and keys by a kernel of ours: it calls Transformer Engine's by name."""

from collections.abc import Callable

from megatron.core.transformer import attention
from torch import Tensor


def rotate_by(kernel: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """From now on, where a configuration has `fused_single_qkv_rope`.

    Args:
        kernel: with arguments and results of `model.fused.rotate_qkv`.
    """
    attention.apply_fused_qkv_rotary_pos_emb = kernel
