"""Seconds of single operations, by hand."""

from dataclasses import replace

import pytest

from cherry_megatron.planner.coefficients import read
from cherry_megatron.planner.hardware import GPUS
from cherry_megatron.planner.rates import Rates
from tests.planner.conftest import DERIVED

H100 = Rates(GPUS["h100"], read("h100", DERIVED))


def test_a_large_product_has_the_rate_and_a_thin_one_the_bandwidth(ideal):
    assert ideal.product(8192, 8192, 8192) == pytest.approx(2 * 8192**3 / 989e12)
    assert ideal.product(8192, 8192, 8192, fp8=True) == pytest.approx(2 * 8192**3 / 1979e12)
    slow = Rates(replace(ideal.gpu, bandwidth=1e12), ideal.measured)
    assert slow.product(8192, 8, 8192) == pytest.approx(2 * (2 * 8192 * 8 + 8192**2) / 1e12)


def test_a_products_smallest_dimension_tells():
    """Measured: 790 and 735 TFLOP/s."""
    assert 2 * 8192**3 / H100.product(8192, 8192, 8192) == pytest.approx(790e12, rel=0.01)
    assert 2 * 32768 * 1280 * 6400 / H100.product(32768, 1280, 6400) == pytest.approx(735e12, rel=0.01)


def test_attention_follows_its_flops_and_its_heads(ideal):
    assert ideal.attention(1000, 1280, 128, 4096) == pytest.approx(6 * 1280 * 4096 * 1000 / 989e12)
    narrow, wide = (H100.attention(1000, 1280, size, 4096) for size in (64, 128))
    assert narrow > H100.attention(1000, 1280, 96, 4096) > wide
    assert H100.attention(1000, 1280, 32, 4096) == pytest.approx(2 * narrow)


@pytest.mark.parametrize(("kind", "times"), [("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2)])
def test_collectives_send_what_rings_send(kind, times, ideal):
    rates = Rates(replace(ideal.gpu, link=450e9, network=50e9), ideal.measured)
    assert rates.exchange(kind, 8e9, 8, 8) == pytest.approx(times * 7e9 / 450e9)
    assert rates.exchange(kind, 8e9, 1, 1) == 0
    # Two hosts: of each, one or four ranks with an adapter each, or eight that NVLink limits no more.
    assert rates.exchange(kind, 8e9, 2, 1) == pytest.approx(times * 4e9 / 50e9)
    assert rates.exchange(kind, 8e9, 8, 4) == pytest.approx(times * 7e9 / 200e9)
    assert rates.exchange(kind, 8e9, 16, 8) == pytest.approx(times * 7.5e9 / 400e9)
