"""A training step of a mixture is that of plain PyTorch, under every layout; a resume under another goes on."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import _train, run_ranks
from tests.sgt.conftest import ONE_STEP, distance, evaluate, first_gradient
from tests.test_bad_input import verb

TOLERANCE = 1e-5
STAY = f"{ONE_STEP} --lr 0 --weight-decay 0"  # the checkpoint holds the weights of before the step
ALL = {"experts": 2}
SOME = {"experts": 4, "top_k": 2, "capacity": 1.25, "balance": 0.5}
# No room over an even share, and micro-batches that leave an expert without a row.
ONE = {"experts": 3, "top_k": 1, "capacity": 1.0, "balance": 0.1}
WEIGHT = 0.3  # of what is predicted ahead


def written(write_mixture, folder, options):
    """A configuration; `depths` is of multi-token prediction, the other options are keys of `moee`."""
    keys = {key: value for key, value in options.items() if key != "depths"}
    sections = {"mtp": {"depths": options["depths"], "weight": WEIGHT}} if "depths" in options else None
    return write_mixture(folder, sections, **keys)


def record(path, folder, flags):
    """Train, and keep the rows that are trained on, and those of the evaluation after it."""
    import torch

    from cherry_megatron import objective

    batches, read = [], objective.next_batch

    def next_batch(*args, **kwargs):
        batch = read(*args, **kwargs)
        batches.append({key: batch[key] for key in ("tokens", "labels", "loss_mask", "experts")})
        return batch

    objective.next_batch = next_batch
    _train(path, [], flags.split())
    # Micro-batches of the global batch of eight; of the evaluations the last is that with all loops.
    for name, micro in (("batch", batches[:4]), ("held_out", batches[-4:])):
        whole = {key: torch.cat([b[key] for b in micro]) for key in micro[0] if micro[0][key] is not None}
        torch.save(whole, folder / f"{name}.pt")


def expected(folder, options):
    """The reference's step on the recorded rows, and its loss on the held-out ones; loss and reports of both.

    Of the held-out rows, and of the others, the loss with one loop of two as well.
    """
    import torch

    from cherry_megatron.model.pattern import parse, unroll
    from cherry_megatron.storage.checkpoint import open_checkpoint
    from tests.moee.reference import step

    checkpoint = open_checkpoint(folder / "run" / "checkpoints")
    state = {name: torch.from_numpy(np.array(checkpoint.read(name))) for name in checkpoint.model}
    batch, held_out = torch.load(folder / "batch.pt"), torch.load(folder / "held_out.pt")
    for rows in (batch, held_out):
        assert not rows["loss_mask"][:, :7].any(), "the prefix of 8 has 7 targets"
        assert rows["loss_mask"][:, 7:].all()
    walk = [(visit.layer, visit.loop) for visit in unroll(parse("*-[*-]x2"), 2, "cycle")]
    model = {"walk": walk, "heads": 4, "groups": 4, "size": 8}
    options = {"top_k": options["experts"], "prefix": 8, "depths": 0, "weight": WEIGHT, **options}
    loss, gradient, report, chosen, ahead, _ = step(state, batch, options, model)
    if "experts" in batch:
        assert [set(row.nonzero().flatten().tolist()) for row in batch["experts"]] == chosen
        assert (batch["experts"].sum(0) > 0).all()
    # Evaluation has room for all.
    roomy = {**options, "capacity": float(options["experts"])}
    later, _, held_out_report, _, later_ahead, _ = step(state, held_out, roomy, model)
    gradient = {name: value.numpy() for name, value in gradient.items()}
    model["walk"] = [(visit.layer, visit.loop) for visit in unroll(parse("*-[*-]x2"), 1, "cycle")]
    once = [step(state, rows, roomy, model)[0] for rows in (batch, held_out)]
    return gradient, (loss, report, ahead), (later, held_out_report, later_ahead), once


@pytest.fixture(scope="module")
def single(tmp_path_factory, write_mixture):
    """One process's step, and what the reference gives on its rows."""
    done = {}

    def get(options):
        key = str(options)
        if key not in done:
            folder = tmp_path_factory.mktemp("single")
            path = written(write_mixture, folder, options)
            run_ranks(folder / "output", 1, record, path, folder, STAY)
            (wanted,) = run_ranks(folder / "reference", 1, expected, folder, options)
            done[key] = (folder, *wanted)
            compare(folder / "run", *wanted)
        return done[key]

    return get


def compare(run, gradient, trained, evaluated, once):
    """The step and the evaluation that a run has recorded are the reference's."""
    from cherry_megatron.runs import read_evaluations, read_steps

    (step,), (evaluation,) = read_steps(run), read_evaluations(run)
    assert distance(first_gradient(run), gradient) <= TOLERANCE
    assert evaluation["losses"]["1"] == pytest.approx(once[1], rel=TOLERANCE)
    # In training nobody asks what is accepted.
    trained = *trained[:2], {key: value for key, value in trained[2].items() if key.startswith("loss")}
    for (loss, report, ahead), found, ours, later in (
        (trained, step["loss"], step["moee"], step.get("mtp")),
        (evaluated, evaluation["losses"]["2"], evaluation["moee"]["2"], evaluation.get("mtp", {}).get("2")),
    ):
        assert (later or {}) == pytest.approx(ahead, rel=TOLERANCE)
        assert found == pytest.approx(loss, rel=TOLERANCE)
        del ours["bytes-per-token"]
        assert ours == pytest.approx(report, rel=TOLERANCE, abs=1e-6)


def check(options, ranks, flags, tmp_path, single, write_mixture, train):
    _, gradient, trained, *evaluated = single(options)
    if options["experts"] > 2:
        _, report, _ = trained
        assert report["displaced"] > 0, "every row found room, which tests little"
        assert len({report[f"load/{expert}"] for expert in range(options["experts"])}) > 1
        assert len({report[f"wanted/{expert}"] for expert in range(options["experts"])}) > 1
    train(written(write_mixture, tmp_path, options), ranks, f"{STAY} {flags}")
    compare(tmp_path / "run", gradient, trained, *evaluated)


EP, TP = "--expert-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel"
OVERLAP = f"{EP} --overlap-grad-reduce --overlap-param-gather"  # of parameters from the second step on
SAMPLE = {
    "some-tp2": (SOME, 2, TP),
    "some-ahead-ep2": ({**SOME, "depths": 2}, 2, EP),
}
REST = {
    f"{name}-{layout}": (options, *split)
    for name, options in {
        "all": ALL,
        "some": SOME,
        "one": ONE,
        "all-ahead": {**ALL, "depths": 1},
        "some-ahead": {**SOME, "depths": 2},
    }.items()
    for layout, split in {
        "ep2": (2, EP),
        "tp2": (2, TP),
        "dp2": (2, ""),
        "micro4": (1, "--micro-batch-size 4"),
        "micro1-ep2": (2, f"--micro-batch-size 1 {EP}"),
        "tp2-plain": (2, "--tensor-model-parallel-size 2"),
        "tp2-ep2": (4, f"{TP} {EP}"),
        "ep2-dp4": (4, EP),
        "ep2-overlap": (2, OVERLAP),
        "ep2-recompute": (
            2,
            f"{EP} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        ),
    }.items()
    if f"{name}-{layout}" not in SAMPLE and not (name == "one" and "ep2" in layout)
}


@pytest.mark.parametrize("name", SAMPLE)
def test_step_is_that_of_plain_pytorch(name, tmp_path: Path, single, write_mixture, train):
    check(*SAMPLE[name], tmp_path, single, write_mixture, train)


@pytest.mark.full
@pytest.mark.parametrize("name", REST)
def test_step_is_that_of_plain_pytorch_rest(name, tmp_path: Path, single, write_mixture, train):
    check(*REST[name], tmp_path, single, write_mixture, train)


def test_an_expert_is_a_model(tmp_path: Path, single, write_config, train):
    """Expert 0 has the names and initial weights of a model alone, and its loss on the same tokens."""
    from cherry_megatron.runs import read_steps
    from cherry_megatron.storage.checkpoint import open_checkpoint

    folder, *_ = single(ALL)
    path = write_config(tmp_path, recurrence={"pattern": "*-[*-]x2"})
    (step,) = train(path, 1, STAY, ("data.prefix=8",))
    assert step["loss"] == pytest.approx(read_steps(folder / "run")[0]["moee"]["loss/0"], rel=TOLERANCE)
    alone, mixture = (open_checkpoint(run / "run" / "checkpoints") for run in (tmp_path, folder))
    start = "experts.0."
    assert {n.removeprefix(start) for n in mixture.model if n.startswith(start)} == set(alone.model)
    for name in alone.model:
        assert np.array_equal(alone.read(name), mixture.read(start + name)), name
    weight = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert not np.array_equal(mixture.read(f"experts.0.{weight}"), mixture.read(f"experts.1.{weight}"))


def test_what_a_router_has_learned_stays(tmp_path: Path, single, write_mixture, train):
    """Trained with all experts it is centred too, and not again where a mixture with a top k starts from it."""
    from cherry_megatron.storage.checkpoint import open_checkpoint

    folder, *_ = single(ALL)
    start = {"load": str(folder / "run"), "finetune": True}
    train(write_mixture(tmp_path, {"megatron": start}, experts=2, top_k=1), 1, STAY)
    before, after = (
        open_checkpoint(run / "run" / "checkpoints").read("router.centre") for run in (folder, tmp_path)
    )
    assert before.any()
    assert np.array_equal(before, after)


def refused(path, overrides):
    from cherry_megatron.checkpoints import unloadable
    from cherry_megatron.config import load
    from cherry_megatron.platform.machine import prepare

    prepare()
    return unloadable(load(path, overrides))


def test_a_run_keeps_its_experts(tmp_path: Path, single):
    folder, *_ = single(ALL)
    for overrides, says in {
        ("moee.experts=4",): ["moee.experts 2, not 4"],
        ("moee=null",): ["moee.experts 2, not None", "moee.router_hidden 8, not None"],
        ("moee.top_k=1", "moee.capacity=2.0"): [],
    }.items():
        ((*found,),) = run_ranks(tmp_path, 1, refused, folder / "config.yaml", overrides)
        assert len(found) == len(says)
        assert all(words in line for words, line in zip(says, found, strict=True)), found


def test_a_mixture_starts_from_one_of_as_many_experts(tmp_path: Path, single, write_config):
    from tests.surgery.conftest import model_tensors, save

    mixture, deep = single(ALL)[0], single({**SOME, "depths": 2})[0]
    alone = save(tmp_path / "alone", model_tensors(2))
    one = write_config(tmp_path, recurrence={"pattern": "*-[*-]x2"})
    for path, load, further, says in (
        (mixture / "config.yaml", alone, (), "is a single model, and moee.experts is 2: make a mixture of 2 by"),
        (
            mixture / "config.yaml",
            mixture / "run",
            ("moee.experts=4",),
            "is a mixture of 2 models, and moee.experts",
        ),
        (one, mixture / "run", (), "is a mixture of 2 models, and the configuration has no section moee"),
        (mixture / "config.yaml", mixture / "run", (), None),
        (mixture / "config.yaml", mixture / "run", ("mtp.depths=1",), "holds 0 of mtp.depths 1"),
        (deep / "config.yaml", deep / "run", (), None),
        (deep / "config.yaml", deep / "run", ("mtp.depths=3",), "holds 2 of mtp.depths 3"),
    ):
        overrides = (f"megatron.load={load}", "megatron.finetune=true", f"run={tmp_path / 'new'}", *further)
        ((*found,),) = run_ranks(tmp_path / "output", 1, refused, path, overrides)
        assert len(found) == (says is not None)
        assert all(says in line and "cherry assemble-moee" in line for line in found), found


@pytest.mark.full
def test_losses_of_something_else_do_not_stand_among_the_runs_own(tmp_path: Path, single):
    """Those of other tokens, or with another number of experts; and a run keeps to what it is trained for."""
    folder, *_ = single(ALL)
    path, evaluations = folder / "config.yaml", folder / "run" / "evaluations.jsonl"
    before = evaluations.read_text()
    for other, noted, says in (
        ("moee.top_k=1", "moee.top_k differs from", "was trained with moee.top_k 2, not 1"),
        ("moee.prefix=4", "moee.prefix differs from", "with moee.prefix 8, not 4"),
        ("data.prefix=9", "data.prefix or moee.prefix differs from", "without a loss of the first 8 tokens"),
    ):
        (said,) = run_ranks(tmp_path, 1, evaluate, path, [other])
        assert f"note: {noted} training" in said
        ((status, errors),) = run_ranks(
            tmp_path, 1, verb, tmp_path, ["pretrain", "--config", str(path), "--set", other]
        )
        assert status == 2
        assert says in errors
    assert evaluations.read_text() == before


def test_random_loops_are_those_of_all_experts(tmp_path: Path, single, write_mixture, train):
    *_, once = single(ALL)
    (step,) = train(write_mixture(tmp_path, {"recurrence": {"random_loops": [1, 1]}}, **ALL), 1, STAY)
    assert step["loss"] == pytest.approx(once[0], rel=TOLERANCE)


@pytest.mark.full
def test_bf16(tmp_path: Path, single, write_mixture, train):
    """The loss is that of float32 but for rounding, and the router is centred."""
    from cherry_megatron.storage.checkpoint import open_checkpoint

    _, _, (loss, *_), *_ = single(SOME)
    (step,) = train(write_mixture(tmp_path, **SOME), 1, f"{STAY} --bf16")
    assert step["loss"] == pytest.approx(loss, rel=1e-3)
    assert np.any(open_checkpoint(tmp_path / "run" / "checkpoints").read("router.centre") != 0)


TWO = {"experts": 2, "top_k": 1, "balance": 0.5}
SMALL = {"global-batch-size": 4}
LAYOUTS = {
    "single": (1, ""),
    "ep2": (2, EP),
    # Some micro-batches leave an expert without a row, and overlapped reductions wait for its gradients.
    "overlap": (2, f"{OVERLAP} --micro-batch-size 1"),
    "tp2": (2, TP),
    "tp2-ep2": (4, f"{TP} {EP}"),
    "dp2": (2, ""),
}
EACH = 4  # steps under a layout


def resume(layouts, tmp_path, write_mixture, train):
    """Some steps under each layout, going on from the one before, are those of a run without a stop."""
    steps = EACH * len(layouts)
    schedule = {"megatron": {"train-iters": steps, "save-interval": EACH, **SMALL}, "mtp": {"depths": 1}}
    undisturbed = train(write_mixture(tmp_path / "undisturbed", schedule, **TWO))
    saved = f"iter_{EACH:07}"
    kept, path = "run/checkpoints", write_mixture(tmp_path / "resumed", schedule, **TWO)
    shutil.copytree(tmp_path / "undisturbed" / kept / saved, tmp_path / "resumed" / kept / saved)
    (tmp_path / "resumed" / kept / "latest_checkpointed_iteration.txt").write_text(str(EACH))
    for number, layout in enumerate(layouts[1:], start=2):
        ranks, flags = LAYOUTS[layout]
        found = train(path, ranks, f"{flags} --exit-interval {EACH * number}")
    assert [step["iteration"] for step in found] == list(range(EACH + 1, steps + 1))
    for ours, theirs in zip(found, undisturbed[EACH:], strict=True):
        assert ours["mtp"] == pytest.approx(theirs["mtp"], rel=TOLERANCE)
        for value in ("loss", "grad_norm", "balance_loss"):
            assert ours[value] == pytest.approx(theirs[value], rel=TOLERANCE), (ours, theirs)


def test_resume_under_another_layout(tmp_path: Path, write_mixture, train):
    resume(["single", "overlap", "single"], tmp_path, write_mixture, train)


@pytest.mark.full
def test_resume_under_every_layout(tmp_path: Path, write_mixture, train):
    resume(["single", "tp2-ep2", "dp2", "ep2", "tp2", "overlap", "single"], tmp_path, write_mixture, train)


def test_selective_training_of_a_mixture(tmp_path: Path, write_mixture, train):
    """The highest losses of the mixture are found, and weighted, alike under a split."""
    found = [
        train(
            write_mixture(tmp_path / name, {"megatron": SMALL}, **TWO),
            ranks,
            f"{ONE_STEP} {flags}",
            ("sgt.top_loss=0.2",),
        )[0]
        for name, (ranks, flags) in (("one", (1, "")), ("split", (2, EP)))
    ]
    for value in ("loss", "selected_loss", "weighted_loss", "grad_norm"):
        assert found[0][value] == pytest.approx(found[1][value], rel=TOLERANCE)
    assert found[0]["selected_loss"] > found[0]["weighted_loss"] > found[0]["loss"]


@pytest.mark.full
def test_two_evaluations_tell_how_far_the_router_has_moved(tmp_path: Path, write_mixture, train):
    """Not at all without a learning rate: the router is centred before the first evaluation too.

    The micro-batches of two ranks are the halves of those of one.
    """
    from cherry_megatron.runs import read_evaluations

    drift, moving = {}, f"{ONE_STEP} --lr 0.02"
    for name, ranks, flags in (
        ("still", 1, STAY),
        ("moving", 1, f"{moving} --micro-batch-size 4"),
        ("two", 2, moving),
    ):
        path = write_mixture(tmp_path / name, **SOME)
        train(path, ranks, flags, ("evaluation.at_start=true",))
        start, end = read_evaluations(path.parent / "run")
        assert "router-drift" not in start["moee"]["2"]
        if name == "still":
            assert start["losses"] == pytest.approx(end["losses"])
        drift[name] = [end["moee"]["2"][value] for value in ("router-drift", "changed-choices")]
    assert drift["still"] == [0, 0]
    assert drift["moving"][0] > 0
    assert drift["two"] == pytest.approx(drift["moving"], rel=1e-3)
    assert drift["moving"][1] in [n / 8 for n in range(1, 9)]
