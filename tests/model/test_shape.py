"""Hand-computed sizes and FLOPs."""

from dataclasses import replace

import pytest

from cherry_megatron.errors import CherryError
from cherry_megatron.model.shape import Shape

SMALL = Shape(hidden=8, ffn=16, heads=4, groups=2, head_size=2, vocabulary=32)


def test_weights_by_hand():
    # q 8x8, k and v 8x4 each, output 8x8; three matrices of 8x16
    assert SMALL.matmul_weights("*") == 64 + 32 + 32 + 64
    assert SMALL.matmul_weights("-") == 3 * 128
    assert SMALL.norm_weights("*-*-") == 32


def test_flops_by_hand():
    # 2 a weight; scores and values: 2 products of 2*8*5 each, half of them causal
    assert SMALL.forward_flops("*", 5) == 2 * 192 + 2 * 8 * 5
    assert SMALL.head_flops == 2 * 8 * 32


def test_experts_by_hand():
    """3 experts of 5, of which a token meets 2, and a router."""
    shape = replace(SMALL, experts=3, top_k=2, expert_ffn=5)
    assert shape.expert_weights("*E") == 3 * 8 * 5
    assert shape.matmul_weights("E") == shape.router_weights("*E") == 8 * 3
    assert shape.forward_flops("E", 7) == 2 * (8 * 3 + 2 * 3 * 8 * 5)
    assert shape.norm_weights("E") == 8


def test_uneven_groups_are_errors():
    with pytest.raises(CherryError, match="num-query-groups"):
        Shape(hidden=8, ffn=16, heads=4, groups=3, head_size=2, vocabulary=32)
