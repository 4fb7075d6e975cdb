"""A checkpoint saved under one layout goes on under another, optimizer state and all."""

import shutil
from pathlib import Path

import pytest

LAYOUTS = {
    "single": (1, ""),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "dp2": (2, ""),
    "dp2-replicated": (2, "--num-distributed-optimizer-instances 2"),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
}
SAMPLE = [("tp2-sp", "pp2"), ("pp2", "dp2"), ("dp2-replicated", "single")]
REST = [(a, b) for a in LAYOUTS for b in LAYOUTS if (a, b) not in SAMPLE]
SCHEDULE = {"recurrence": {"loop_rank": 2}, "megatron": {"train-iters": 8, "save-interval": 4}}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, write_config, train):
    """Eight steps of one process without a stop."""
    return train(write_config(tmp_path_factory.mktemp("undisturbed"), **SCHEDULE))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, write_config, train):
    """Folders of runs stopped after four of eight steps, by layout."""
    folders: dict[str, Path] = {}

    def get(layout: str) -> Path:
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp(layout)
            ranks, flags = LAYOUTS[layout]
            train(write_config(folders[layout], **SCHEDULE), ranks, f"{flags} --exit-interval 4")
        return folders[layout]

    return get


def check(first, second, tmp_path, write_config, train, saved, undisturbed):
    path = write_config(tmp_path, **SCHEDULE)
    shutil.copytree(saved(first) / "run" / "checkpoints", tmp_path / "run" / "checkpoints")
    ranks, flags = LAYOUTS[second]
    steps = train(path, ranks, flags)
    assert [s["iteration"] for s in steps] == [5, 6, 7, 8]
    for ours, theirs in zip(steps, undisturbed[4:], strict=True):
        for value in ("loss", "grad_norm", "learning_rate"):
            assert ours[value] == pytest.approx(theirs[value], rel=TOLERANCE), (first, second, ours, theirs)


@pytest.mark.parametrize(("first", "second"), SAMPLE)
def test_resume_under_another_layout(first, second, tmp_path, write_config, train, saved, undisturbed):
    check(first, second, tmp_path, write_config, train, saved, undisturbed)


@pytest.mark.full
@pytest.mark.parametrize(("first", "second"), REST)
def test_resume_matrix(first, second, tmp_path, write_config, train, saved, undisturbed):
    check(first, second, tmp_path, write_config, train, saved, undisturbed)


RATES = {
    # With an optimizer of their own.
    "experts": {"recurrence": {"pattern": "*-[*E]x2*-"}, "megatron": {"num-experts": 2}},
    "plain": {"recurrence": {"pattern": "*-[*-]x2*-"}},
}
CONSTANT = {"lr-decay-style": "constant", "lr-warmup-iters": 0, "min-lr": 0.0}


@pytest.mark.parametrize("name", ["experts", pytest.param("plain", marks=pytest.mark.full)])
def test_resume_with_another_learning_rate(name, tmp_path: Path, write_config, train):
    """Twice the rate makes twice the step: Adam's and the decay's, from the moments of the steps before."""
    from cherry_megatron.storage.checkpoint import open_checkpoint

    megatron = {**CONSTANT, "train-iters": 3, "lr": 1e-3, **RATES[name].get("megatron", {})}
    path = write_config(tmp_path / "before", recurrence=RATES[name]["recurrence"], megatron=megatron)
    train(path)
    read, learned = {}, {}
    for rate in (1e-3, 2e-3):
        changed = {**megatron, "train-iters": 4, "lr": rate, "min-lr": rate / 10}
        path = write_config(tmp_path / str(rate), recurrence=RATES[name]["recurrence"], megatron=changed)
        shutil.copytree(tmp_path / "before/run", tmp_path / str(rate) / "run")
        (*_, learned[rate]) = train(path)
    for place in ("before", *learned):
        found = open_checkpoint(tmp_path / str(place) / "run")
        read[place] = {weight: found.read(weight).astype(float) for weight in found.model}
    (slow, fast), start = learned, read["before"]
    assert [step["learning_rate"] for step in learned.values()] == pytest.approx([slow, fast])
    assert learned[slow]["grad_norm"] == learned[fast]["grad_norm"]
    for weight in start:
        moved = read[slow][weight] - start[weight]
        assert abs(moved).max() > slow / 100
        assert read[fast][weight] - start[weight] == pytest.approx(2 * moved, rel=1e-3, abs=1e-6)


def test_resume_with_dropout_is_bit_identical(tmp_path: Path, write_config, train):
    sections = {
        "megatron": {**SCHEDULE["megatron"], "hidden-dropout": 0.1, "attention-dropout": 0.1},
        "recurrence": {"random_loops": [1, 3]},
    }
    whole = train(write_config(tmp_path / "whole", **sections))
    path = write_config(tmp_path / "halves", **sections)
    train(path, flags="--exit-interval 4")
    halves = train(path)
    for ours, theirs in zip(halves, whole, strict=True):
        assert ours["iteration"] == theirs["iteration"]
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"]), ours["iteration"]
