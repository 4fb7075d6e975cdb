"""A training step with multi-token prediction is that of plain PyTorch, under every layout; a resume goes on."""

from pathlib import Path

import numpy as np
import pytest

from cherry_megatron.runs import read_evaluations, read_steps
from tests.conftest import _train, run_ranks
from tests.sgt.conftest import ONE_STEP, distance, first_gradient, mark
from tests.test_bad_input import verb

TOLERANCE = 1e-5
STAY = f"{ONE_STEP} --lr 0 --weight-decay 0"  # the checkpoint holds the weights of before the step
WEIGHT = 0.3
ALPHA = 0.7


def record(path, folder, flags):
    """Train, and keep the rows that are trained on, and those of the evaluation after it."""
    import torch

    from cherry_megatron import objective

    batches, read = [], objective.next_batch

    def next_batch(*args, **kwargs):
        batch = read(*args, **kwargs)
        kept = ("tokens", "labels", "loss_mask", "selected")
        batches.append({key: batch[key] for key in kept if batch[key] is not None})
        return batch

    objective.next_batch = next_batch
    _train(path, [], flags.split())
    # Micro-batches of the global batch of eight; of the evaluations the last is that with all loops.
    for name, micro in (("batch", batches[:4]), ("held_out", batches[-4:])):
        torch.save({key: torch.cat([b[key] for b in micro]) for key in micro[0]}, folder / f"{name}.pt")


def losses(state, rows, depths, walk):
    """The model's and each depth's cross-entropy [b, s - depth], and what they find likeliest."""
    from torch.nn import functional as F

    from tests.model import reference

    model = {"heads": 4, "groups": 4, "size": 8}
    x = reference.states(state, rows["tokens"], walk, **model)
    logits = [x @ state["output_layer.weight"].T]
    logits += reference.predicted_ahead(state, rows["tokens"], x, depths, **model)
    targets = [rows["labels"][:, depth:] for depth in range(depths + 1)]
    found = [F.cross_entropy(a.transpose(1, 2), b, reduction="none") for a, b in zip(logits, targets, strict=True)]
    return found, [each.argmax(-1) for each in logits]


def expected(folder, depths, rho=None):
    """The reference's gradient on the recorded rows; the losses of the step and of the evaluation.

    With rho, the marked share of the training data, targets are weighted.
    """
    import torch

    from cherry_megatron.model.pattern import parse, unroll
    from cherry_megatron.storage.checkpoint import open_checkpoint
    from tests.model.reference import local_name

    checkpoint = open_checkpoint(folder / "run" / "checkpoints")
    trained = {n: torch.from_numpy(np.array(checkpoint.read(n))).double() for n in checkpoint.model}
    state = {local_name(name): value.requires_grad_() for name, value in trained.items()}
    walk = [(visit.layer, visit.loop) for visit in unroll(parse("*-[*-*-]x3*-"), 3, "cycle")]
    batch, held_out = torch.load(folder / "batch.pt"), torch.load(folder / "held_out.pt")
    shares = {float(mask[:, 1:].sum() / mask.sum()) for mask in batch["loss_mask"].split(2)}
    assert len(shares) > 2, "micro-batches alike in what they keep of their targets test little"
    counted = batch["loss_mask"].double()
    if rho is not None:
        counted = counted * ((1 - ALPHA) + ALPHA * batch["selected"] / rho)
    found, _ = losses(state, batch, depths, walk)
    total = (found[0] * counted).sum()
    for depth in range(1, depths + 1):
        total = total + WEIGHT / depths * (found[depth] * counted[:, depth:]).sum()
    (total / batch["loss_mask"].sum()).backward()
    gradient = {name: value.grad.numpy() for name, value in trained.items()}
    with torch.no_grad():
        later, chosen = losses(state, held_out, depths, walk)

    def means(values, rows):
        masks = [rows["loss_mask"][:, depth:] for depth in range(depths + 1)]
        return [float((v * m).sum() / m.sum()) for v, m in zip(values, masks, strict=True)]

    agrees = [chosen[depth] == chosen[0][:, depth:] for depth in range(depths + 1)]
    return gradient, means(found, batch), means(later, held_out), means(agrees, held_out)[1:]


def _mark_answers(prefix):
    mark(prefix, "answers", lambda documents, places: (places % (3 + documents % 11) > 2) & (documents % 4 > 0))


def with_answers(prefix: Path, folder: Path) -> Path:
    """The same tokens, of which blocks in some documents alone carry a loss."""
    folder.mkdir()
    for file in prefix.parent.glob(f"{prefix.name}.*"):
        (folder / file.name).symlink_to(file)
    run_ranks(folder / "logs", 1, _mark_answers, folder / prefix.name)
    return folder / prefix.name


@pytest.fixture(scope="module")
def answers(data, tmp_path_factory):
    return with_answers(data / "text", tmp_path_factory.mktemp("answers") / "data")


def sections(depths, text, **megatron):
    """Of a configuration with so many depths."""
    return {
        "mtp": {"depths": depths, "weight": WEIGHT},
        "megatron": {"eod-mask-loss": True, "data-path": [str(text)], **megatron},
    }


@pytest.fixture(scope="module")
def single(tmp_path_factory, write_config, answers):
    """One process's step, and what the reference gives on its rows."""
    done = {}

    def get(depths):
        if depths not in done:
            folder = tmp_path_factory.mktemp("single")
            path = write_config(folder, **sections(depths, answers))
            run_ranks(folder / "output", 1, record, path, folder, STAY)
            (wanted,) = run_ranks(folder / "reference", 1, expected, folder, depths)
            done[depths] = (folder, wanted)
            compare(folder / "run", wanted)
        return done[depths]

    return get


def compare(run, wanted):
    """The step and the evaluation that a run has recorded are the reference's."""
    gradient, trained, evaluated, accepted = wanted
    (step,), (evaluation,) = read_steps(run), read_evaluations(run)
    assert distance(first_gradient(run), gradient) <= TOLERANCE
    ahead = {f"loss/{depth}": value for depth, value in enumerate(trained[1:], start=1)}
    assert step["mtp"] == pytest.approx(ahead, rel=TOLERANCE)
    assert step["loss"] == pytest.approx(trained[0], rel=TOLERANCE)
    ahead = {f"loss/{depth}": value for depth, value in enumerate(evaluated[1:], start=1)}
    ahead |= {f"acceptance/{depth}": value for depth, value in enumerate(accepted, start=1)}
    assert evaluation["mtp"] == {"3": pytest.approx(ahead, rel=TOLERANCE)}
    assert evaluation["losses"]["3"] == pytest.approx(evaluated[0], rel=TOLERANCE)


TP, SP = "--tensor-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel"
PP = "--pipeline-model-parallel-size 2"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SAMPLE = {"sp2": (2, 2, SP)}
REST = {
    f"{name}-{depths}": (depths, *split)
    for depths in (1, 2)
    for name, split in {
        "micro1": (1, "--micro-batch-size 1"),
        "micro4": (1, "--micro-batch-size 4"),
        "micro8": (1, "--micro-batch-size 8"),
        "dp2": (2, ""),
        "dp2-micro1": (2, "--micro-batch-size 1"),
        "dp2-overlap": (2, "--overlap-grad-reduce --overlap-param-gather"),
        "tp2": (2, TP),
        "sp2": (2, SP),
        "pp2": (2, PP),
        "pp2-micro1": (2, f"{PP} --micro-batch-size 1"),
        "pp2-sp2": (4, f"{PP} {SP}"),
        "pp2-dp2": (4, PP),
        "pp2-dp2-overlap": (4, f"{PP} --overlap-grad-reduce --overlap-param-gather"),
        "recompute": (1, RECOMPUTE),
        "pp2-sp2-recompute": (4, f"{PP} {SP} {RECOMPUTE}"),
    }.items()
}


def check(depths, ranks, flags, tmp_path, single, write_config, train, answers):
    _, wanted = single(depths)
    train(write_config(tmp_path, **sections(depths, answers)), ranks, f"{STAY} {flags}")
    compare(tmp_path / "run", wanted)


@pytest.mark.parametrize("name", SAMPLE)
def test_step_is_that_of_plain_pytorch(name, tmp_path: Path, single, write_config, train, answers):
    check(*SAMPLE[name], tmp_path, single, write_config, train, answers)


@pytest.mark.full
@pytest.mark.parametrize("name", REST)
def test_step_is_that_of_plain_pytorch_rest(name, tmp_path: Path, single, write_config, train, answers):
    check(*REST[name], tmp_path, single, write_config, train, answers)


RESUMED = {
    "recurrence": {"random_loops": [1, 3]},
    "mtp": {"depths": 2},
    "megatron": {"train-iters": 8, "global-batch-size": 4},
}


def resume(layouts, tmp_path, write_config, train):
    """Two steps under each layout, going on from the one before, are those of a run without a stop."""
    undisturbed = train(write_config(tmp_path / "undisturbed", **RESUMED))
    path = write_config(tmp_path / "resumed", **RESUMED)
    for number, (ranks, flags) in enumerate(layouts, start=1):
        found = train(path, ranks, f"{flags} --exit-interval {8 // len(layouts) * number}")
    assert [step["iteration"] for step in found] == list(range(1, 9))
    for ours, theirs in zip(found, undisturbed, strict=True):
        assert ours["mtp"] == pytest.approx(theirs["mtp"], rel=TOLERANCE)
        for value in ("loss", "grad_norm"):
            assert ours[value] == pytest.approx(theirs[value], rel=TOLERANCE), (ours, theirs)


def test_resume_under_another_layout(tmp_path: Path, write_config, train):
    resume([(2, PP), (1, "")], tmp_path, write_config, train)


@pytest.mark.full
def test_resume_under_every_layout(tmp_path: Path, write_config, train):
    resume([(4, f"{PP} {SP}"), (2, ""), (2, SP), (2, PP)], tmp_path, write_config, train)


def refused(starts):
    """Why each of these configurations, with overrides, cannot start."""
    from cherry_megatron.checkpoints import unloadable
    from cherry_megatron.config import load
    from cherry_megatron.platform.machine import prepare

    prepare()
    return [" ".join(unloadable(load(*start))) for start in starts]


@pytest.mark.full
def test_a_model_learns_to_predict_ahead(tmp_path: Path, write_config, train):
    """More and more of it is what the model itself says; a run keeps its depths."""
    path = write_config(tmp_path, mtp={"depths": 1}, megatron={"train-iters": 20, "lr": 1e-2})
    steps = train(path, 1, "", ("evaluation.at_start=true",))
    assert steps[-1]["mtp"]["loss/1"] < steps[0]["mtp"]["loss/1"] - 0.5
    start, end = (each["mtp"]["3"]["acceptance/1"] for each in read_evaluations(tmp_path / "run"))
    assert end > start + 0.05
    other = write_config(tmp_path / "other", mtp={"depths": 2}, megatron={"load": str(tmp_path / "run")})
    command = ["pretrain", "--config", str(path), "--set", "mtp.weight=0.2"]
    ((status, errors),) = run_ranks(tmp_path, 1, verb, tmp_path, command)
    assert status == 2
    assert "trained with mtp.weight 0.1, not 0.2" in errors
    found = run_ranks(tmp_path, 1, refused, [(path, ("mtp.depths=2",)), (other, ("megatron.finetune=true",))])
    assert "trained with mtp.depths 1, not 2" in found[0][0]
    assert "holds 1 of mtp.depths 2" in found[0][1]


@pytest.mark.full
def test_bf16(tmp_path: Path, single, write_config, train, answers):
    """Losses are those of float32 but for rounding."""
    _, (_, trained, evaluated, accepted) = single(2)
    (step,) = train(write_config(tmp_path, **sections(2, answers)), 1, f"{STAY} --bf16")
    (evaluation,) = read_evaluations(tmp_path / "run")
    for depth in (1, 2):
        assert step["mtp"][f"loss/{depth}"] == pytest.approx(trained[depth], rel=1e-3)
        assert evaluation["mtp"]["3"][f"loss/{depth}"] == pytest.approx(evaluated[depth], rel=1e-3)
        assert evaluation["mtp"]["3"][f"acceptance/{depth}"] == pytest.approx(accepted[depth - 1], abs=0.1)


@pytest.mark.full
def test_a_teacher_is_of_the_next_token_alone(tmp_path: Path, write_config, train):
    """Of a student that is its own teacher only prediction ahead has a gradient: it doubles with its weight."""
    original = write_config(tmp_path / "original", mtp={"depths": 1})
    train(original, flags="--train-iters 5")
    found = []
    for weight in (0.1, 0.2):
        folder = tmp_path / str(weight)
        path = write_config(
            folder,
            mtp={"depths": 1, "weight": weight},
            distillation={"config": str(original), "load": str(tmp_path / "original/run"), "weight": 1.0},
            megatron={"load": str(tmp_path / "original/run"), "finetune": True, "clip-grad": 0.0},
        )
        (step,) = train(path, 2 if weight == 0.2 else 1, ONE_STEP + (f" {PP}" if weight == 0.2 else ""))
        found.append(step["grad_norm"])
    assert found[0] > 0
    assert found[1] == pytest.approx(2 * found[0], rel=1e-4)


@pytest.mark.full
def test_the_highest_losses_are_those_of_the_next_token(tmp_path: Path, write_config, train):
    """Online selection is the same with and without prediction ahead, under a split too."""
    found = [
        train(write_config(tmp_path / name, **sections), ranks, f"{ONE_STEP} {flags}", ("sgt.top_loss=0.2",))[0]
        for name, sections, ranks, flags in (
            ("without", {}, 1, ""),
            ("with", {"mtp": {"depths": 2}}, 1, ""),
            ("split", {"mtp": {"depths": 2}}, 2, "--micro-batch-size 1"),
        )
    ]
    for value in ("loss", "selected_loss", "weighted_loss"):
        assert found[0][value] == found[1][value]
        assert found[2][value] == pytest.approx(found[1][value], rel=TOLERANCE)
    assert found[2]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=TOLERANCE)


def test_the_model_itself_starts_as_without(single, tmp_path, write_config, train, answers):
    """Bit for bit, with the same configuration hash if there is none."""
    from cherry_megatron.storage.checkpoint import open_checkpoint

    folder, _ = single(2)
    train(write_config(tmp_path, **{**sections(2, answers), "mtp": {"depths": 0}}), 1, STAY)
    plain, ours = (open_checkpoint(run / "run/checkpoints") for run in (tmp_path, folder))
    assert {name for name in ours.model if not name.startswith("mtp.")} == plain.model.keys()
    for name in plain.model:
        assert np.array_equal(plain.read(name), ours.read(name)), name
    (step,) = read_steps(tmp_path / "run")
    assert step["loss"] == read_steps(folder / "run")[0]["loss"]
    assert "mtp" not in step
    assert "mtp" not in (tmp_path / "run/config.yaml").read_text()
