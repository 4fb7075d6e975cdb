"""What is predicted further ahead is weighted by the selection of its own target, under every split."""

from pathlib import Path

import pytest

from tests.conftest import run_ranks
from tests.sgt.conftest import ONE_STEP
from tests.test_multi_token import ALPHA, STAY, compare, expected, record, sections, with_answers


def test_a_prediction_is_weighted_by_its_target(tmp_path: Path, marked, selective, train):
    from cherry_megatron.runs import read_rho

    given, options = sections(2, with_answers(marked, tmp_path / "data")), {"marks": "some", "alpha": ALPHA}
    path = selective(tmp_path, given, **options)
    run_ranks(tmp_path / "output", 1, record, path, tmp_path, STAY)
    (wanted,) = run_ranks(tmp_path / "reference", 1, expected, tmp_path, 2, read_rho(tmp_path / "run"))
    compare(tmp_path / "run", wanted)
    split = tmp_path / "split"
    train(selective(split, given, **options), 2, f"{STAY} --micro-batch-size 1")
    compare(split / "run", wanted)


@pytest.mark.full
def test_the_probe_has_a_part_for_it(tmp_path: Path, selective, train):
    """Its losses count in the gradients that are compared; without it there is no such part."""
    from cherry_megatron.runs import read_probes

    parts = {}
    for depths in (0, 1):
        path = selective(tmp_path / str(depths), {"mtp": {"depths": depths}}, marks="some", probe_interval=1)
        train(path, 1, ONE_STEP)
        (probe,) = read_probes(path.parent / "run")
        parts[depths] = probe["coupling"]
    assert parts[1].keys() - parts[0].keys() == {"mtp"}
    assert 0 < abs(parts[1]["mtp"]["cos"]) < 1
    assert parts[1]["all"] != parts[0]["all"]
