"""A mixture that learns from a teacher: a step is that of plain PyTorch, under several layouts."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.conftest import run_ranks
from tests.moee.test_layers import RECOMPUTE
from tests.moee.test_training import EP, SOME, STAY, TOLERANCE, TP, record, written
from tests.sgt.conftest import distance, first_gradient
from tests.test_distillation import remembering

LEARNING = {"weight": 0.4, "temperature": 1.5}
AHEAD = {**SOME, "depths": 1}
SELECTIVE = {**SOME, "sgt": {"top_loss": 0.3, "alpha": 0.7}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, write_config, train) -> Path:
    path = write_config(
        tmp_path_factory.mktemp("teacher"),
        recurrence={"pattern": "(*-)x3", "loop_scales": False},
        megatron={"hidden-size": 48, "num-attention-heads": 6},
    )
    train(path, flags="--train-iters 8")
    return path


def student(write_mixture, folder: Path, teacher: Path, options: dict) -> Path:
    path = written(write_mixture, folder, {key: value for key, value in options.items() if key != "sgt"})
    content = yaml.safe_load(path.read_text())
    content["distillation"] = {"config": str(teacher), "load": str(teacher.parent / "run"), **LEARNING}
    content |= {"sgt": options["sgt"]} if "sgt" in options else {}
    path.write_text(yaml.safe_dump(content))
    return path


def expected(folder: Path, of_teacher: Path, options: dict):
    """The reference's gradient, loss and divergence of the step on the recorded rows."""
    import torch

    from cherry_megatron.model.pattern import parse, unroll
    from cherry_megatron.storage.checkpoint import open_checkpoint
    from tests.model.reference import local_name
    from tests.moee import reference

    def weights(run: Path) -> dict:
        checkpoint = open_checkpoint(run)
        return {name: torch.from_numpy(np.array(checkpoint.read(name))) for name in checkpoint.model}

    def walk(pattern: str, loops: int) -> list:
        return [(visit.layer, visit.loop) for visit in unroll(parse(pattern), loops, "cycle")]

    model = {"walk": walk("*-[*-]x2", 2), "heads": 4, "groups": 4, "size": 8}
    theirs = {local_name(name): value.double() for name, value in weights(of_teacher).items()}
    learning = {"share": LEARNING["weight"], "temperature": LEARNING["temperature"]}
    of_teacher = {"walk": walk("(*-)x3", 1), "heads": 6, "groups": 6, "size": 8}
    options = {
        "top_k": options["experts"], "prefix": 8, "depths": 0, "weight": 0.3, **options,
        "teacher": {"state": theirs, "model": of_teacher, **learning},
    }  # fmt: skip
    loss, gradient, *_, apart = reference.step(
        weights(folder / "run"), torch.load(folder / "batch.pt"), options, model
    )
    return {name: value.numpy() for name, value in gradient.items()}, loss, apart


@pytest.fixture(scope="module")
def single(tmp_path_factory, teacher, write_mixture):
    """What the reference gives on the rows of one process's step, which has been compared with it."""
    done = {}

    def get(options):
        key = str(options)
        if key not in done:
            folder = tmp_path_factory.mktemp("single")
            path = student(write_mixture, folder, teacher, options)
            ((passes, held),) = run_ranks(folder / "output", 1, remembering, record, path, folder, STAY)
            assert passes == 4 and held == 0, "a teacher's logits are not let go"
            (done[key],) = run_ranks(folder / "reference", 1, expected, folder, teacher.parent / "run", options)
            compare(folder / "run", *done[key])
        return done[key]

    return get


def compare(run: Path, gradient: dict, loss: float, apart: float) -> None:
    from cherry_megatron.runs import read_steps

    (step,) = read_steps(run)
    assert step["loss"] == pytest.approx(loss, rel=TOLERANCE), "the cross-entropy alone"
    assert step["divergence_from_teacher"] == pytest.approx(apart, rel=TOLERANCE)
    assert distance(first_gradient(run), gradient) <= TOLERANCE


CASES = {
    "some-ep2": (SOME, 2, EP),
    "some-tp2": (SOME, 2, TP),
    "ahead-dp2": (AHEAD, 2, ""),
    "all-ep2": ({"experts": 2}, 2, EP),
    "ahead-ep2-tp2": (AHEAD, 4, f"{EP} {TP}"),
    "selective-ep2-recompute": (SELECTIVE, 2, f"{EP} {RECOMPUTE} --micro-batch-size 1"),
}
SAMPLE = ("some-ep2",)


@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_step_is_that_of_plain_pytorch(name, teacher, tmp_path, single, write_mixture, train):
    options, ranks, flags = CASES[name]
    wanted = single(options)
    train(student(write_mixture, tmp_path, teacher, options), ranks, f"{STAY} {flags}")
    compare(tmp_path / "run", *wanted)
