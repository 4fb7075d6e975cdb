"""Scores of a checkpoint against a second implementation of the model, window by window."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cherry_megatron.sgt.selection import models, tokens
from cherry_megatron.sgt.selection.models import ModelScores, Source
from cherry_megatron.sgt.selection.scratch import Scratch
from cherry_megatron.sgt.selection.select import select
from cherry_megatron.sgt.selection.selectors import mixed
from cherry_megatron.storage.tracker import newest
from tests.conftest import run_ranks
from tests.model import reference
from tests.sgt.selection.conftest import at_once, read_marks
from tests.surgery.conftest import read
from tests.test_bad_input import check

WINDOW, END = 32, 0
SECTIONS: dict[str, Any] = {"recurrence": {"pattern": "*-[*-]x2", "loop_scales": False}}
WALK = [(0, None), (1, 0), (1, 1)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_config, train) -> Path:
    path = write_config(tmp_path_factory.mktemp("scores"), **SECTIONS)
    train(path, flags="--train-iters 4 --lr 0.01 --lr-decay-iters 9")
    return path


def _link(data: Path, folder: Path) -> Path:
    for path in data.glob("text.*"):
        (folder / path.name).symlink_to(path)
    return folder / "text"


def _scores(prefix: Path, path: Path, name: str) -> list[np.ndarray]:
    """What is written as the scores of every piece; Megatron is set up in this process."""
    tokens.PIECE_TOKENS, models.worker_processes = 7000, at_once
    found: dict[int, np.ndarray] = {}
    write = Scratch.write

    def keep(scratch: Scratch, piece: Any, kind: str, array: np.ndarray) -> None:
        found[piece.number] = array
        write(scratch, piece, kind, array)

    Scratch.write = keep
    select(prefix, ModelScores(name, prefix, Source(path), None), 0.15, name, 1)
    return [found[number] for number in sorted(found)]


@pytest.mark.parametrize("name", ["top-loss", pytest.param("entropy", marks=pytest.mark.full)])
def test_they_are_those_of_the_model_written_by_hand(name, trained, tmp_path):
    session_data = Path(yaml_of(trained)["megatron"]["data-path"][0]).parent
    prefix = _link(session_data, tmp_path)
    (parts,) = run_ranks(tmp_path / "logs", 1, _scores, prefix, trained, name)
    state = {reference.local_name(k): v for k, v in read(newest(trained.parent / "run/checkpoints")).items()}
    ids = np.fromfile(f"{prefix}.bin", np.uint16).astype(np.int64)
    assert len(parts) > 1 and sum(map(len, parts)) == len(ids)
    first = 0
    for scores in parts:
        stream = np.concatenate(([ids[first - 1] if first else END], ids[first : first + len(scores)]))
        for start in range(0, len(scores), 10 * WINDOW):  # every tenth window
            inputs, labels = stream[start : start + WINDOW], stream[start + 1 : start + WINDOW + 1]
            inputs = torch.from_numpy(inputs[: len(labels)])[None]
            logits = reference.forward(state, inputs, WALK, heads=4, groups=4, size=8)[0]
            expected = F.cross_entropy(logits, torch.from_numpy(labels), reduction="none")
            if name == "entropy":
                expected = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
            found = scores[start : start + WINDOW]
            assert np.isneginf(found[labels == END]).all()
            np.testing.assert_allclose(found[labels != END], expected.numpy()[labels != END], rtol=1e-4, atol=1e-4)
        first += len(scores)


def yaml_of(path: Path) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def _against_itself(prefix: Path, path: Path) -> None:
    select(prefix, ModelScores("excess-loss", prefix, Source(path), Source(path)), 0.15, "excess-loss", 1)


@pytest.mark.full
def test_a_model_has_no_excess_over_itself(trained, tmp_path):
    """All scores are 0 then, so that the hash of the place alone decides, and ends are out."""
    prefix = _link(Path(yaml_of(trained)["megatron"]["data-path"][0]).parent, tmp_path)
    run_ranks(tmp_path / "logs", 1, _against_itself, prefix, trained)
    ids = np.fromfile(f"{prefix}.bin", np.uint16)
    marked = read_marks(tmp_path, "excess-loss")
    places = np.flatnonzero(ids != END)
    order = places[np.argsort(mixed(places.astype(np.uint64)))]
    assert set(np.flatnonzero(marked)) == set(order[: round(0.15 * len(ids))])


def test_a_run_without_a_checkpoint_is_refused(write_config, tmp_path):
    path = write_config(tmp_path / "new", **SECTIONS)
    prefix = yaml_of(path)["megatron"]["data-path"][0]
    command = ["select", "--data", prefix, "--selector", "top-loss", "--config", str(path)]
    check(tmp_path, command, "has no checkpoint to ask; train it first, or set megatron.load")


def test_several_ranks_are_refused(trained, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(models.CherryError, match="runs on one process, not on 2; start it without torchrun"):
        ModelScores("top-loss", Path("text"), Source(trained), None)
    assert os.environ["WORLD_SIZE"] == "2"
