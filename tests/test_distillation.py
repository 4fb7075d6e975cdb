"""Learning from a teacher: the divergence against plain PyTorch, and the same training under every layout."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F

from cherry_megatron.cli import main
from cherry_megatron.storage.ancestry import describe
from cherry_megatron.storage.checkpoint import Place, open_checkpoint
from tests.conftest import _train, run_ranks
from tests.test_bad_input import verb


def _divergence(logits: torch.Tensor, theirs: torch.Tensor, temperature: float) -> tuple[list, list]:
    import os

    from cherry_megatron.distillation import Divergence

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    ours = logits.chunk(world, -1)[rank].clone().requires_grad_()
    found = Divergence.apply(ours, theirs.chunk(world, -1)[rank], temperature, torch.distributed.group.WORLD)
    (found * torch.arange(found.numel()).view(found.shape)).sum().backward()
    return found.tolist(), ours.grad.tolist()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_that_of_pytorch(world, temperature, tmp_path):
    logits, theirs = (torch.randn(3, 2, 10, generator=torch.Generator().manual_seed(k)) * 4 for k in (0, 1))
    found = run_ranks(tmp_path, world, _divergence, logits, theirs, temperature)
    student = logits.clone().requires_grad_()
    expected = temperature**2 * F.kl_div(
        (student / temperature).log_softmax(-1), (theirs / temperature).softmax(-1), reduction="none"
    ).sum(-1)
    (expected * torch.arange(6).view(3, 2)).sum().backward()
    for values, _ in found:
        torch.testing.assert_close(torch.tensor(values), expected.detach(), rtol=1e-5, atol=1e-6)
    gradient = torch.cat([torch.tensor(shard) for _, shard in found], -1)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, write_config, train) -> Path:
    """A deeper, wider model with grouped queries, trained and saved at TP=2."""
    path = write_config(
        tmp_path_factory.mktemp("teacher"),
        recurrence={"pattern": "(*-)x4", "loop_scales": False},
        megatron={
            "hidden-size": 48, "ffn-hidden-size": 96, "group-query-attention": True, "num-query-groups": 2,
            "tensor-model-parallel-size": 2,
        },
    )  # fmt: skip
    train(path, 2, "--train-iters 15")
    return path


def student(folder: Path, teacher: Path, write_config, **options) -> Path:
    path = write_config(folder)
    content = yaml.safe_load(path.read_text())
    content["distillation"] = {"config": str(teacher), "load": str(teacher.parent / "run"), **options}
    path.write_text(yaml.safe_dump(content))
    return path


LAYOUTS = {
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "dp2": (2, ""),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
}
SAMPLE = ["pp2", pytest.param("tp2-sp", marks=pytest.mark.full), pytest.param("dp2", marks=pytest.mark.full),
          pytest.param("tp2-pp2", marks=pytest.mark.full)]  # fmt: skip


def remembering(train: Callable[..., None], *arguments: Any) -> tuple[int, int]:
    """Train; how often a teacher has read, and how many of its logits were held when it read again or ended."""
    import gc
    import weakref

    from cherry_megatron.distillation import Teacher

    given, held, look = [], 0, Teacher.look

    def alive() -> int:
        gc.collect()
        return sum(each() is not None for each in given)

    def looks(self, *inputs):
        nonlocal held
        held += alive()
        look(self, *inputs)
        given.append(weakref.ref(self._seen))

    Teacher.look = looks
    train(*arguments)
    return len(given), held + alive()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, teacher, write_config) -> tuple[Path, tuple[int, int]]:
    """A student's run in one process, and what its teacher held."""
    folder = tmp_path_factory.mktemp("single")
    path = student(folder, teacher, write_config)
    (held,) = run_ranks(folder / "output", 1, remembering, _train, path, [], ["--train-iters", "8"])
    return folder / "run", held


@pytest.fixture(scope="module")
def single(alone):
    from cherry_megatron.runs import read_steps

    return read_steps(alone[0])


def test_a_teachers_logits_are_let_go_after_the_pass(alone):
    _, (passes, held) = alone
    assert passes == 8 * 4
    assert held == 0


@pytest.mark.parametrize("name", SAMPLE)
def test_the_layout_does_not_matter(name, single, teacher, tmp_path, write_config, train):
    ranks, flags = LAYOUTS[name]
    steps = train(student(tmp_path, teacher, write_config), ranks, f"--train-iters 8 {flags}")
    for ours, theirs in zip(steps, single, strict=True):
        for value in ("loss", "grad_norm"):
            assert ours[value] == pytest.approx(theirs[value], rel=1e-5)


@pytest.mark.full
def test_a_run_that_gets_a_teacher_says_so_and_records_each(teacher, tmp_path, write_config, train):
    from cherry_megatron.checkpoints import where_from
    from cherry_megatron.config import load
    from cherry_megatron.storage.lineage import read_lineage

    path = student(tmp_path, teacher, write_config)
    content = yaml.safe_load(path.read_text())
    plain = {key: value for key, value in content.items() if key != "distillation"}
    saved = tmp_path / "run/checkpoints"
    for steps, settings in ((1, plain), (2, content), (3, content)):
        path.write_text(yaml.safe_dump(settings))
        if steps > 1:
            told = where_from(load(path), SimpleNamespace(load=saved, iteration=1, train_iters=3, finetune=False))
            assert (f"with distillation.load {teacher.parent}/run for None" in told) == (steps == 2)
        train(path, flags=f"--train-iters {steps} --lr-decay-iters 9")
        teachers = [each.get("role") for each in read_lineage(saved / f"iter_000000{steps}")["parents"]]
        assert teachers == ["teacher"] * (steps > 1)
    weaker = load(path, ["distillation.weight=0.25"])
    told = where_from(weaker, SimpleNamespace(load=saved, iteration=3, train_iters=9, finetune=False))
    assert ", with distillation.weight 0.25 for " in told


def test_without_weight_it_is_plain_training_and_with_it_is_not(single, teacher, tmp_path, write_config, train):
    weightless = train(student(tmp_path / "0", teacher, write_config, weight=0.0), flags="--train-iters 8")
    plain = train(write_config(tmp_path / "plain"), flags="--train-iters 8")
    assert [s["loss"] for s in weightless] == [s["loss"] for s in plain]
    assert single[-1]["loss"] != plain[-1]["loss"] and single[0]["loss"] == plain[0]["loss"]


def _flip(file: Path, place: Place) -> None:
    """A bit in the middle of a tensor's values."""
    data = bytearray(file.read_bytes())
    data[place.offset + place.length // 2] ^= 1
    file.write_bytes(data)


def _refusals(paths: list[Path]) -> list[str]:
    """What is said of the teacher of each configuration."""
    from cherry_megatron.config import load
    from cherry_megatron.distillation import check_teacher
    from cherry_megatron.errors import CherryError
    from cherry_megatron.platform.machine import prepare

    prepare()
    found = []
    for path in paths:
        config = load(path)
        try:
            check_teacher(config.distillation, config)
        except CherryError as error:
            found.append(str(error))
        else:
            found.append("")
    return found


def test_a_teacher_is_what_its_configuration_says(teacher, tmp_path, write_config, data):
    def changed(name: str, section: str, **values) -> Path:
        """A student whose teacher has another configuration than it was trained with."""
        content = yaml.safe_load(teacher.read_text())
        content[section] |= values
        other = tmp_path / f"{name}-teacher.yaml"
        other.write_text(yaml.safe_dump(content))
        return student(tmp_path / name, teacher, write_config, config=str(other))

    shutil.copytree(data / "tokenizer", tmp_path / "tokenizer")
    with (tmp_path / "tokenizer/tokenizer.json").open("a") as file:
        file.write("\n")
    words = student(tmp_path / "words", teacher, write_config)
    content = yaml.safe_load(words.read_text())
    content["megatron"]["tokenizer-model"] = str(tmp_path / "tokenizer")
    words.write_text(yaml.safe_dump(content))
    (tmp_path / "moee.yaml").write_text(
        yaml.safe_dump({**yaml.safe_load(teacher.read_text()), "moee": {"experts": 2}})
    )
    twice, mixed = [str(teacher.parent / "run")] * 2, str(tmp_path / "mixed")
    assert main(["assemble-moee", "--load", *twice, "--save", mixed, "--config", str(tmp_path / "moee.yaml")]) == 0
    paths = [
        student(tmp_path / "fits", teacher, write_config),
        changed("layers", "recurrence", pattern="(*-)x2"),
        changed("angles", "megatron", **{"rotary-base": 500000}),
        changed("heads", "megatron", **{"num-query-groups": 4}),
        words,
        student(tmp_path / "mixture", teacher, write_config, load=mixed),
    ]
    (found,) = run_ranks(tmp_path / "out", 1, _refusals, paths)
    assert found[0] == ""
    for says, wanted in zip(
        found[1:],
        (
            "holds 4 layers, recurrence.pattern 2",
            "rotary-base is 500000",
            "query groups",
            "read the same tokens",
            "is a mixture, and a teacher is one model",
        ),
        strict=True,
    ):
        assert wanted in says, found
    for says, name in zip(found[1:4], ("layers", "angles", "heads"), strict=True):
        assert says.startswith(f"distillation.config: {tmp_path / f'{name}-teacher.yaml'}: ")
    assert found[4].startswith(f"distillation.load: {teacher.parent}/run")


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path, write_config, train):
    original = write_config(tmp_path / "original")
    train(original, flags="--train-iters 5")
    path = student(tmp_path / "copy", original, write_config, weight=1.0)
    content = yaml.safe_load(path.read_text())
    content["megatron"] |= {"load": str(tmp_path / "original/run"), "finetune": True}
    path.write_text(yaml.safe_dump(content))
    flags = "--train-iters 1 --lr-decay-iters 9 --lr-warmup-iters 0"
    assert train(path, flags=flags)[0]["grad_norm"] < 1e-5
    # Its checkpoint names both what its weights and what its losses come from.
    student_line, parent, teacher = describe(tmp_path / "copy/run", verify=False)
    assert "teacher pretrain step 5" in teacher and "teacher" not in student_line + parent


def test_the_teachers_own_settings_hold_for_it(tmp_path, write_config, train):
    """Teacher and student have the weights that the seed gives them."""
    flags = "--train-iters 1 --lr-decay-iters 9 --lr-warmup-iters 0"
    original = write_config(tmp_path / "original")
    train(original, flags=f"{flags} --lr 0 --min-lr 0")
    path = student(tmp_path / "copy", original, write_config, weight=1.0)
    same, other = (
        train(path, flags=f"{flags} --norm-epsilon {epsilon}", overrides=(f"run={tmp_path / str(epsilon)}",))
        for epsilon in (1e-5, 0.5)
    )
    assert same[0]["grad_norm"] < 1e-5 and other[0]["grad_norm"] > 1e-4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weight": 2.0}, "distillation.weight 2.0 is not from 0 to 1"),
        ({"temperature": 0.0}, "distillation.temperature 0.0 must be positive"),
        ({"config": "nowhere.yaml"}, "distillation.config: cannot read the configuration nowhere.yaml"),
        ({"load": "nowhere"}, "distillation.load: nowhere does not exist; correct the path"),
        ({"wait": 1}, "unknown key distillation.wait"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(options, says, teacher, tmp_path, write_config):
    path = student(tmp_path, teacher, write_config, **options)
    command = ["pretrain", "--config", str(path)]
    ((status, errors),) = run_ranks(tmp_path / "out", 1, verb, tmp_path, command)
    assert status == 2 and says in errors and "Traceback" not in errors, errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file, place: os.truncate(file, place.offset + 10), "is truncated"),
        (lambda file, _: file.unlink(), "is missing; restore the checkpoint"),
        (_flip, "is not what was saved (SHA-256); restore the checkpoint"),
    ],
    ids=["truncated", "missing", "flipped"],
)
def test_a_damaged_teacher_is_one_sentence(damage, says, teacher, tmp_path, write_config):
    shutil.copytree(teacher.parent / "run/checkpoints", tmp_path / "teacher")
    source = open_checkpoint(tmp_path / "teacher")
    place = source.tensors["output_layer.weight"].chunks[-1].place
    damage(source.folder / place.file, place)
    path = student(tmp_path, teacher, write_config, load=str(tmp_path / "teacher"))
    ((status, errors),) = run_ranks(tmp_path / "out", 1, verb, tmp_path, ["pretrain", "--config", str(path)])
    (line,) = [line for line in errors.splitlines() if line.startswith("cherry ")]
    assert (
        status == 2 and "distillation.load: " in line and str(source.folder / place.file) in line and says in line
    ), errors
    assert "Traceback" not in errors and not list((tmp_path / "run").glob("checkpoints/iter_*"))
