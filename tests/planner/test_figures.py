"""The figures that the shipped coefficients come from, and how near they are met: the model is fitted to them.

Seconds of a step and peak GiB, of benchmarks/results/2026-11-30-train-speed-after.md, -moee-parallel.md and
2026-12-01-precision.md. Of memory one constant is fitted.
"""

import pytest

from cherry_megatron.planner.choice import weigh
from cherry_megatron.planner.coefficients import read
from cherry_megatron.planner.hardware import GPUS
from cherry_megatron.planner.job import Setting
from cherry_megatron.planner.rates import Rates
from tests.planner.conftest import DERIVED

NARROW = "megatron.num-attention-heads=20"  # heads of 64
DELAYED = ("megatron.fp8-format=hybrid", "megatron.fp8-recipe=delayed")
TENSORWISE = ("megatron.fp8-format=hybrid", "megatron.fp8-recipe=tensorwise")
TWO = ("moee.experts=2", "moee.top_k=0")
WHOLE = Setting(micro_batch=8, graph=True)
ROWS = [
    ("cherry_227m", (), WHOLE, 8, 0.341, 50.8),
    ("cherry_227m", (), Setting(micro_batch=4, graph=True), 8, 0.349, 27.4),
    ("cherry_227m", (), Setting(micro_batch=4), 8, None, 27.3),
    ("cherry_227m", (NARROW,), WHOLE, 8, 0.362, 50.8),
    ("cherry_227m", DELAYED, WHOLE, 8, 0.290, 46.3),
    ("cherry_227m", (NARROW, *DELAYED), WHOLE, 8, 0.305, 46.4),
    ("cherry_227m", TENSORWISE, WHOLE, 8, 0.304, 45.0),
    (
        "cherry_1p8b",
        ("megatron.expert-model-parallel-size=1", *TWO),
        Setting(micro_batch=4, graph=True),
        8,
        0.709,
        53.3,
    ),
    # Waiting for Python, on two GPUs.
    (
        "cherry_1p8b",
        ("megatron.expert-model-parallel-size=2", *TWO),
        Setting(data=2, expert=2, micro_batch=2),
        16,
        0.859,
        None,
    ),
    ("cherry_1p8b", ("megatron.expert-model-parallel-size=2",), Setting(data=2, expert=2), 16, 5.968, None),
]


@pytest.mark.parametrize(("name", "overrides", "setting", "batch", "seconds", "gib"), ROWS)
def test_measured_steps(name, overrides, setting, batch, seconds, gib, job):
    found = weigh(job(name, *overrides, batch=batch), setting, Rates(GPUS["h200"], read("h200", DERIVED)))
    if seconds is not None:
        assert found.step.seconds == pytest.approx(seconds, rel=0.04)
    if gib is not None:
        assert found.peak / 2**30 == pytest.approx(gib, rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "products", "rest"), [((), 0.1965, 0.0572), (DELAYED, 0.1132, 0.0833)], ids=["BF16", "FP8"]
)
def test_where_a_steps_time_goes(overrides, products, rest, job):
    """A profile (2026-11-30-profile-after.md) by kernel class, of a GPU 4% slower than that of the steps above."""
    rates = Rates(GPUS["h200"], read("h200", DERIVED))
    parts = weigh(job("cherry_227m", *overrides, batch=8), WHOLE, rates).step.parts
    assert parts["matrix products"] == pytest.approx(products, rel=0.06)
    assert parts["attention"] == pytest.approx(0.0896, rel=0.06)
    assert parts["element-wise"] == pytest.approx(rest, rel=0.07)


@pytest.mark.parametrize("gpu", GPUS)
def test_these_coefficients_are_shipped_until_a_gpu_is_calibrated(gpu):
    assert read(gpu).calibrated or read(gpu) == read(gpu, DERIVED)
