"""What is predicted further ahead is weighted by the selection of its own target, under every split."""

from pathlib import Path

import pytest

from tests.conftest import run_ranks
from tests.test_multi_token import ALPHA, STAY, compare, expected, record, sections


def test_a_prediction_is_weighted_by_its_target(tmp_path: Path, selective, train):
    from cherry_megatron.runs import read_rho

    options = {"marks": "some", "alpha": ALPHA}
    path = selective(tmp_path, sections(2), **options)
    run_ranks(tmp_path / "output", 1, record, path, tmp_path, STAY)
    (wanted,) = run_ranks(tmp_path / "reference", 1, expected, tmp_path, 2, read_rho(tmp_path / "run"))
    compare(tmp_path / "run", wanted)
    split = tmp_path / "split"
    train(selective(split, sections(2), **options), 2, f"{STAY} --micro-batch-size 1")
    compare(split / "run", wanted)
