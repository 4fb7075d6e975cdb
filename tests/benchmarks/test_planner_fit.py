"""Coefficients come back from what they would give."""

from dataclasses import replace
from typing import ClassVar

import pytest

from cherry_megatron.planner.coefficients import read
from cherry_megatron.planner.hardware import GPUS
from cherry_megatron.planner.rates import Rates

GPU = GPUS["h100"]


def operations_of(measured) -> dict:
    rates = Rates(GPU, measured)
    sizes = [(8192, 8192, 8192), (32768, 1280, 6400), (16384, 640, 1280)]
    attention = []
    for head_size, sequence in ((128, 4096), (128, 1024), (64, 4096)):
        both = rates.attention(32768, 1280, head_size, sequence)
        attention.append(
            {
                "head_size": head_size, "sequence": sequence, "tokens": 32768, "width": 1280,
                "both": both, "forward": both * measured.attention_forward,
            }
        )  # fmt: skip
    kinds = ("all-gather", "reduce-scatter", "all-reduce")
    return {
        "products": [[*each, rates.product(*each)] for each in sizes],
        "fp8_products": [[*each, rates.product(*each, fp8=True)] for each in sizes[:2]],
        "attention": attention,
        "stream": 2e12,
        "collectives": [
            [kind, size, 2, rates.exchange(kind, size, 2, 2)] for kind in kinds for size in (64, 1 << 28)
        ],
    }


def test_a_fit_finds_the_coefficients_that_made_the_measurements(benchmark_script):
    """From other starting values, over all seven trainings."""
    trainings = benchmark_script("calibrate_planner").CALIBRATED
    fit = benchmark_script("planner_fit").fit
    start = read("h100")
    truth = replace(
        start, products=0.78, fp8_products=0.7, small_products=150.0, attention_64=0.33, attention_128=0.5,
        attention_forward=0.3, short_attention=400.0, stream=0.62, link=0.8, latency=1e-5, skew=0.03,
        host_forward=1.5e-3, host_backward=1.2e-3, host_unfused=0.3e-3, host_fp8=1.4, host_exchange=0.2e-3,
        overhead=3e8,
    )  # fmt: skip
    found = {
        name: {"seconds": each.seconds(GPU, truth), "gib": each.gib(GPU, truth)} for name, each in trainings.items()
    }
    fitted = fit(start, GPU, operations_of(truth), trainings, found)
    for key, value in vars(truth).items():
        if isinstance(value, float):
            assert getattr(fitted, key) == pytest.approx(value, rel=0.05), key


def test_what_was_not_measured_stays(benchmark_script):
    trainings = benchmark_script("calibrate_planner").CALIBRATED
    start = read("h100")
    fitted = benchmark_script("planner_fit").fit(start, GPU, operations_of(start), trainings, {})
    assert fitted.host_forward == start.host_forward and fitted.overhead == start.overhead


def test_the_held_out_trainings_are_twelve_and_none_is_calibrated_on(benchmark_script):
    script = benchmark_script("calibrate_planner")
    held = [training for rows in script.HELD_OUT.values() for training in rows.values()]
    assert len(held) == 12 and {training.ranks for training in held} == {1, 2}
    assert not set(held) & set(script.CALIBRATED.values())


def test_the_table_says_what_is_near_and_what_is_chosen(benchmark_script):
    script = benchmark_script("calibrate_planner")
    measured, question = read("h100"), "dense_566m, one GPU, 8 sequences"
    rows = script.HELD_OUT[question]

    class Found:
        found: ClassVar = {
            f"{question}: {name}": {
                "seconds": row.seconds(GPU, measured) * 1.1,
                "gib": row.gib(GPU, measured) * 1.2,
            }
            for name, row in rows.items()
        }

    Found.found[f"{question}: micro-batch 2"]["seconds"] = 1e-3
    lines = script.check_table(Found(), "h100", measured, {question: rows})
    assert lines[0] == "3 of 4 within 15% in time, 0 within 10% in memory."
    assert "fastest: micro-batch 2" in lines[-1]
