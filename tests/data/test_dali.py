"""DALI gives the micro-batches of the torch loader, bit for bit: alone, in trainings, and after a resume."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cherry_megatron.data.marks import ANSWERS
from cherry_megatron.versions import installed_version
from tests.conftest import _train, run_ranks
from tests.data.test_dataset import Text, build, texts
from tests.sgt.conftest import mark
from tests.test_bad_input import verb

pytestmark = pytest.mark.skipif(installed_version("nvidia-dali-cuda130") is None, reason="DALI is not installed")

some = settings(max_examples=25, database=None, suppress_health_check=list(HealthCheck), deadline=None)
splits = st.tuples(st.integers(1, 3), st.integers(1, 3))  # micro-batch size, data-parallel ranks


class Unshared:
    """A data set as it is meant: Megatron keeps the mask of its first sample for all, also where it is padded."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        for part in getattr(self.dataset, "datasets", [self.dataset]):
            part.masks_and_position_ids_are_cached = False
        return self.dataset[index]


def read(dataset: Any, split: tuple[int, int], consumed: int, by_dali: bool) -> list[list[dict[str, Any]]]:
    """The micro-batches of each data-parallel rank from a place on."""
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
    from torch.utils.data import DataLoader

    from cherry_megatron.data.dali import DaliLoader

    found = []
    for rank in range(split[1]):
        order = MegatronPretrainingSampler(len(dataset), consumed, split[0], rank, split[1])
        if by_dali:
            found.append(list(DaliLoader(DataLoader(dataset, batch_sampler=order))))
        else:
            found.append(list(DataLoader(Unshared(dataset), batch_sampler=order)))
    return found


def check_equal(dataset: Any, split: tuple[int, int], consumed: int) -> None:
    ours, theirs = (read(dataset, split, consumed, by_dali) for by_dali in (True, False))
    assert [len(batches) for batches in ours] == [len(batches) for batches in theirs]
    for mine, other in zip((b for r in ours for b in r), (b for r in theirs for b in r), strict=True):
        other.pop("dataset_id", None)
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name].dtype == other[name].dtype, name
            assert mine[name].numpy().tobytes() == other[name].numpy().tobytes(), name


def _same_batches() -> None:
    from cherry_megatron.data.dataset import MarkedDataset

    @some
    @given(texts, st.integers(1, 9), splits, st.integers(0, 12), st.integers(0, 4), *[st.booleans()] * 5)
    def check(described, sequence, split, consumed, context, picked, answers, mask_ends, shuffle, whole):
        with tempfile.TemporaryDirectory() as scratch:
            names = ("picked",) * picked + (ANSWERS,) * answers
            text = Text(Path(scratch) / "text", *described, names)
            dataset = build(
                MarkedDataset, text.prefix, sequence, None if whole else 20, "valid",
                selection="picked" if picked else None, shuffle="tokens" if shuffle else "none",
                eod_mask_loss=mask_ends, context=context, drop_last_partial_validation_sequence=False,
                create_attention_mask=False,
            )  # fmt: skip
            check_equal(dataset, split, min(consumed, len(dataset) - 1))

    check()


def test_same_batches(tmp_path):
    run_ranks(tmp_path, 1, _same_batches)


def _going_on_under_another_layout() -> None:
    from cherry_megatron.data.dataset import MarkedDataset

    def in_order(dataset: Any, split: tuple[int, int], consumed: int) -> list[list[int]]:
        ranks = read(dataset, split, consumed, True)
        return [row for step in zip(*ranks, strict=True) for batch in step for row in batch["tokens"].tolist()]

    @some
    @given(texts, splits, splits, st.integers(0, 6))
    def check(described, before, after, steps):
        with tempfile.TemporaryDirectory() as scratch:
            text = Text(Path(scratch) / "text", *described, ())
            dataset = build(MarkedDataset, text.prefix, 4, 40)
            consumed = steps * before[0] * before[1]
            if consumed >= len(dataset):
                return
            found = in_order(dataset, before, 0)[:consumed] + in_order(dataset, after, consumed)
            left_over = (len(dataset) - consumed) % (after[0] * after[1])
            assert found == [dataset[k]["tokens"].tolist() for k in range(len(dataset) - left_over)]

    check()


def test_going_on_under_another_layout(tmp_path):
    run_ranks(tmp_path, 1, _going_on_under_another_layout)


def _same_batches_of_a_blend(folder: Path) -> None:
    """One part has answers, the other has none and is learned from whole."""
    from megatron.core.datasets.blended_dataset import BlendedDataset

    from cherry_megatron.data.dataset import MarkedDataset

    parts = [
        build(
            MarkedDataset, Text(folder / name, [7] * 9, seed, ("picked", *more)).prefix, 5, 30,
            selection="picked", create_attention_mask=False,
        )
        for name, seed, more in (("answered", 1, (ANSWERS,)), ("plain", 2, ()))
    ]  # fmt: skip
    blend = BlendedDataset(parts, [2, 1], 24, parts[0].config)
    check_equal(blend, (3, 2), 6)
    masks = {0: [], 1: []}
    for number in range(len(blend)):
        masks[int(blend.dataset_index[number])].append(float(blend[number]["loss_mask"].mean()))
    assert all(masks.values()) and min(masks[0]) < 1 == min(masks[1]), "this blend tests nothing"


def test_same_batches_of_a_blend(tmp_path):
    run_ranks(tmp_path / "out", 1, _same_batches_of_a_blend, tmp_path)


# Trainings

EVALUATED = {"loops": [1, 3], "batches": 2, "at_start": True}
SCHEDULE = {"train-iters": 8, "save-interval": 4, "eval-interval": 4, "eval-iters": 2}
ANSWERS_AND_MARKS = {
    "sgt": {"marks": "picked", "alpha": 0.7},
    "data": {"shuffle": "words"},
    "megatron": {"dataloader-type": "cyclic"},
}
# name: (sections, ranks and flags of each start, which ranks of the last one read)
TRAININGS: dict[str, tuple[dict[str, Any], list[tuple[int, str]], list[bool]]] = {
    "online-left-out-resumed": (
        {
            "sgt": {"top_loss": 0.3, "alpha": 0.7, "probe_interval": 4},
            "data": {"prefix": 5},
            "guards": {"leave_out": [3, 6]},
        },
        [(1, "--exit-interval 4"), (2, "--micro-batch-size 1 --eval-micro-batch-size 4")],
        [True, True],
    ),
    "answers-marks-pp2": (ANSWERS_AND_MARKS, [(2, "--pipeline-model-parallel-size 2")], [True, True]),
    "answers-marks-tp2-pp2": (
        ANSWERS_AND_MARKS,
        [(4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2")],
        [True, False, True, False],
    ),
    "mixture": (
        {"recurrence": {"pattern": "*-[*-]x3*-"}, "moee": {"experts": 3, "top_k": 1, "prefix": 8}},
        [(2, "")],
        [True, True],
    ),
}
BY_DEFAULT = ("online-left-out-resumed", "answers-marks-pp2")


def _mark(prefix: Path) -> None:
    for name, share in (("picked", 0.15), (ANSWERS, 0.6)):
        draw = np.random.default_rng(len(name))
        mark(prefix, name, lambda documents, _, draw=draw, share=share: draw.random(len(documents)) < share)


@pytest.fixture(scope="module")
def answered(data: Path, tmp_path_factory) -> Path:
    """The path prefix of tokens of which some are answers, and some are picked."""
    folder = tmp_path_factory.mktemp("answered")
    for suffix in (".bin", ".idx", ".json"):
        (folder / f"text{suffix}").symlink_to(data / f"text{suffix}")
    run_ranks(folder / "logs", 1, _mark, folder / "text")
    return folder / "text"


def _train_counting(path: Path, flags: list[str]) -> int:
    """How many tensors DALI gave this rank."""
    from cherry_megatron.data import dali

    given, take = [], dali.to_torch_tensor
    dali.to_torch_tensor = lambda *args, **kwargs: given.append(None) or take(*args, **kwargs)
    _train(path, [], flags)
    return len(given)


def measured(run: Path) -> list[dict[str, Any]]:
    """All that a run has recorded, without times."""
    lines = [*(run / "steps.jsonl").open(), *(run / "evaluations.jsonl").open()]
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "ranks")} for line in lines]


@pytest.mark.parametrize(
    "name", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.full) for name in TRAININGS]
)
def test_same_training(name, tmp_path: Path, answered: Path, write_config):
    sections, starts, reads = TRAININGS[name]
    found, said, given = {}, {}, {}
    for loader in ("torch", "dali"):
        asked = {**sections, "data": {**sections.get("data", {}), "loader": loader}}
        asked["megatron"] = {**SCHEDULE, "data-path": [str(answered)], **sections.get("megatron", {})}
        path = write_config(tmp_path / loader, evaluation=EVALUATED, **asked)
        for ranks, flags in starts:
            given[loader] = run_ranks(path.parent / "output", ranks, _train_counting, path, flags.split())
        found[loader] = measured(path.parent / "run")
        output = (path.parent / "output" / f"rank{ranks - 1}.out").read_text()
        said[loader] = [line for line in output.splitlines() if "held-out loss" in line]
    assert [line["iteration"] for line in found["dali"] if "loss" in line] == list(range(1, 9))
    assert found["dali"] == found["torch"]
    assert said["dali"] == said["torch"] and said["dali"]
    assert [bool(count) for count in given["dali"]] == reads and not any(given["torch"])


# Bad input


def _without_dali(path: Path) -> tuple[int, str]:
    sys.modules["nvidia.dali"] = None  # as if it were not installed
    return verb(path.parent, ["pretrain", "--config", str(path)])


def test_without_dali_it_is_one_sentence(tmp_path: Path, write_config):
    path = write_config(tmp_path, data={"loader": "dali"})
    ((status, line),) = run_ranks(tmp_path / "out", 1, _without_dali, path)
    assert status == 2
    assert (
        "data.loader dali: DALI is not usable here, not installed (optional); install cherry-megatron[dali]" in line
    )
    assert not (tmp_path / "run").exists()
