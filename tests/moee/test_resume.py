"""Mixtures of models, and experts inside layers, go on under another layout: every ordered pair of five."""

import shutil
from itertools import permutations
from pathlib import Path

import pytest

from tests.moee.test_layers import EXPERTS, PATTERN

TP, EP = "--tensor-model-parallel-size 2 --sequence-parallel", "--expert-model-parallel-size 2"
LAYOUTS = {"single": (1, ""), "ep2": (2, EP), "tp2": (2, TP), "dp2": (2, ""), "tp2-ep2": (4, f"{TP} {EP}")}
GRANULARITIES = ("model", "layer")
TOLERANCE = 1e-5
STEPS = {"train-iters": 6, "save-interval": 3}


@pytest.fixture(scope="module")
def write(write_config, write_mixture):
    """Write the configuration of a granularity."""

    def get(folder: Path, granularity: str) -> Path:
        if granularity == "model":
            return write_mixture(folder, {"megatron": STEPS}, top_k=1, balance=0.5)
        recurrence = {"pattern": PATTERN, "loop_routers": True, "random_loops": [1, 2]}
        return write_config(folder, recurrence=recurrence, megatron={**EXPERTS, **STEPS})

    return get


@pytest.fixture(scope="module")
def half(tmp_path_factory, write, train):
    """Folders of runs that stopped after three of six steps, by granularity and layout."""
    folders: dict[tuple[str, str], Path] = {}

    def get(granularity: str, layout: str) -> Path:
        if (granularity, layout) not in folders:
            folder = folders[granularity, layout] = tmp_path_factory.mktemp(layout)
            ranks, flags = LAYOUTS[layout]
            train(write(folder, granularity), ranks, f"{flags} --exit-interval 3")
        return folders[granularity, layout]

    return get


@pytest.fixture(scope="module")
def whole(tmp_path_factory, write, train):
    """The steps of one process without a stop, by granularity."""
    return {name: train(write(tmp_path_factory.mktemp(name), name)) for name in GRANULARITIES}


@pytest.mark.full
@pytest.mark.parametrize(("first", "second"), permutations(LAYOUTS, 2))
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_resume_matrix(granularity, first, second, tmp_path, write, half, whole, train):
    path = write(tmp_path, granularity)
    shutil.copytree(half(granularity, first) / "run/checkpoints", tmp_path / "run/checkpoints")
    ranks, flags = LAYOUTS[second]
    steps = train(path, ranks, flags)
    assert [step["iteration"] for step in steps] == [4, 5, 6]
    for ours, theirs in zip(steps, whole[granularity][3:], strict=True):
        for value in ("loss", "grad_norm", "balance_loss"):
            assert ours[value] == pytest.approx(theirs[value], rel=TOLERANCE), (first, second, ours, theirs)
