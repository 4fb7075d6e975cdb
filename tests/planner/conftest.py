"""A GPU that reaches what its datasheet says, so that seconds can be computed by hand; jobs of configurations."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cherry_megatron.config import load
from cherry_megatron.planner.coefficients import read
from cherry_megatron.planner.hardware import GPUS
from cherry_megatron.planner.job import Job, job_of
from cherry_megatron.planner.rates import Rates

CONFIGS = Path(__file__).parents[2] / "configs"
DERIVED = Path(__file__).with_name("derived.yaml")  # whatever a calibration has written since


@pytest.fixture
def ideal() -> Rates:
    """No latency, nobody waits; memory and links have no limit, products and attention the peak."""
    nothing = dict.fromkeys(("launch", "latency", "skew", "small_products", "short_attention"), 0.0)
    host = {name: 0.0 for name in vars(read("h100", DERIVED)) if name.startswith("host_") and name != "host_fp8"}
    measured = replace(
        read("h100", DERIVED), products=1.0, fp8_products=1.0, attention_64=1.0, attention_128=1.0, stream=1.0,
        link=1.0, network=1.0, attention_forward=1 / 3, **nothing, **host,
    )  # fmt: skip
    return Rates(replace(GPUS["h100"], bandwidth=1e30, link=1e30, network=1e30), measured)


@pytest.fixture
def job() -> Callable[..., Job]:
    """Of a shipped configuration with overrides."""

    def make(name: str, *overrides: str, batch: int | None = None, flags: tuple[str, ...] = ()) -> Job:
        return job_of(load(CONFIGS / f"{name}.yaml", overrides, flags), batch)

    return make
