"""A training step of a stack with experts inside layers is that of plain PyTorch, under every layout."""

import random
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import _train, run_ranks
from tests.sgt.conftest import ONE_STEP, distance, first_gradient

TOLERANCE = 1e-5
STAY = f"{ONE_STEP} --lr 0 --weight-decay 0"  # the checkpoint holds the weights of before the step
PATTERN, PARTS = "*-[*E*-]x2*E", (["*-"], ["*E", "*-"], ["*E"])
EXPERTS = {
    "num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24, "moe-aux-loss-coeff": 0.5, "lr": 1e-3,
}  # fmt: skip
SHARED = {"recurrence": {"pattern": PATTERN}}
OF_LOOPS = {"recurrence": {"pattern": PATTERN, "loop_routers": True, "loop_scales": False}}
AHEAD = {"recurrence": {"pattern": PATTERN}, "mtp": {"depths": 2, "weight": 0.3}}
CUT = {"recurrence": {"pattern": PATTERN, "loop_routers": True, "injection": "add", "backprop_loops": 1}}
SHARE = 0.6
ONE = {
    "recurrence": {"pattern": PATTERN},
    "megatron": {"moe-router-topk": 1, "moe-router-pre-softmax": True},
    "data": {"prefix": 9},  # not every token has a loss
}


def write(write_config, folder, sections):
    return write_config(folder, **{**sections, "megatron": {**EXPERTS, **sections.get("megatron", {})}})


def record(path, folder, flags):
    """Train, and keep the rows that are trained on."""
    import torch

    from cherry_megatron import objective

    batches, read = [], objective.next_batch

    def next_batch(*args, **kwargs):
        batch = read(*args, **kwargs)
        batches.append({key: batch[key] for key in ("tokens", "labels", "loss_mask")})
        return batch

    objective.next_batch = next_batch
    _train(path, [], flags.split())
    # The load is counted first, on the same four micro-batches.
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(batches[:4], batches[4:8], strict=True))
    torch.save({key: torch.cat([b[key] for b in batches[:4]]) for key in batches[0]}, folder / "batch.pt")


def expected(folder, sections):
    """The reference's step on the recorded rows."""
    import torch

    from cherry_megatron.storage.checkpoint import open_checkpoint
    from tests.moee.layer_reference import step

    checkpoint = open_checkpoint(folder / "run" / "checkpoints")
    state = {name: torch.from_numpy(np.array(checkpoint.read(name))) for name in checkpoint.model}
    megatron = {**EXPERTS, **sections.get("megatron", {})}
    batch, further = torch.load(folder / "batch.pt"), {}
    if "mtp" in sections:
        further = {"depths": sections["mtp"]["depths"], "ahead": sections["mtp"]["weight"]}
    if "distillation" in sections:
        further = {"teacher": teacher_logits(sections["distillation"], batch["tokens"]), "share": SHARE}
    loss, balance, gradient, report = step(
        state, batch, PARTS, 2,
        coefficient=megatron["moe-aux-loss-coeff"], top_k=megatron["moe-router-topk"],
        pre_softmax=megatron.get("moe-router-pre-softmax", False),
        injection=sections["recurrence"].get("injection", "none"),
        backprop=sections["recurrence"].get("backprop_loops"), **further,
    )  # fmt: skip
    return loss, balance, {name: value.numpy() for name, value in gradient.items()}, report


def teacher_logits(distillation, tokens):
    """What a teacher without experts says, [rows, s, v]."""
    import torch

    from cherry_megatron.storage.checkpoint import open_checkpoint
    from tests.model import reference

    checkpoint = open_checkpoint(Path(distillation["load"]))
    read = {name: torch.from_numpy(np.array(checkpoint.read(name))).double() for name in checkpoint.model}
    state = {reference.local_name(name): value for name, value in read.items()}
    walk = [(layer, None) for layer in range(3)]
    return reference.forward(state, tokens, walk, heads=4, groups=4, size=8)


@pytest.fixture(scope="module")
def single(tmp_path_factory, write_config):
    """What the reference gives on the rows of one process's step, which is compared with it."""
    done = {}

    def get(sections):
        key = str(sections)
        if key not in done:
            folder = tmp_path_factory.mktemp("single")
            path = write(write_config, folder, sections)
            run_ranks(folder / "output", 1, record, path, folder, STAY)
            (done[key],) = run_ranks(folder / "reference", 1, expected, folder, sections)
            compare(folder / "run", *done[key])
        return done[key]

    return get


def compare(run, loss, balance, gradient, report):
    from cherry_megatron.runs import read_steps

    (found,) = read_steps(run)
    assert found["loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert found["balance_loss"] == pytest.approx(balance, rel=TOLERANCE)
    assert found["moee"] == pytest.approx(report, rel=TOLERANCE, abs=1e-6)
    assert distance(first_gradient(run), gradient) <= TOLERANCE


def check(sections, ranks, flags, tmp_path, single, write_config, train):
    wanted = single(sections)
    assert len({value for name, value in wanted[-1].items() if name.startswith("load/layer-2/loop-2")}) > 1
    train(write(write_config, tmp_path, sections), ranks, f"{STAY} {flags}")
    compare(tmp_path / "run", *wanted)


EP, TP = "--expert-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel"
PP = "--pipeline-model-parallel-size 2"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SAMPLE = {
    "of-loops-ep2": (OF_LOOPS, 2, EP),
    "shared-tp2": (SHARED, 2, TP),
    "one-pp2-ep2-recompute": (ONE, 4, f"{PP} {EP} {RECOMPUTE}"),
}
REST = {
    f"{name}-{layout}": (sections, *split)
    for name, sections in {"shared": SHARED, "of-loops": OF_LOOPS, "one": ONE}.items()
    for layout, split in {
        "ep2": (2, EP),
        "tp2": (2, TP),
        "tp2-whole-experts": (2, f"{TP} --expert-tensor-parallel-size 1"),
        "tp2-whole-experts-ep2": (2, f"{TP} --expert-tensor-parallel-size 1 {EP}"),
        "dp2": (2, ""),
        "pp2": (2, PP),
        "pp2-ep2": (4, f"{PP} {EP}"),
        "tp2-ep2": (4, f"{TP} {EP}"),
        "tp2-pp2": (4, f"{TP} {PP}"),
        "ep2-dp4": (4, EP),
        "micro1": (1, "--micro-batch-size 1"),
        "micro4": (1, "--micro-batch-size 4"),
        "micro8": (1, "--micro-batch-size 8"),
        "one-micro-batch": (4, f"{EP} {RECOMPUTE}"),
        "recompute": (1, RECOMPUTE),
        "micro1-ep2": (2, f"{EP} --micro-batch-size 1"),
        "ep2-overlap": (2, f"{EP} --overlap-grad-reduce --overlap-param-gather"),
        "pp2-ep2-recompute": (4, f"{PP} {EP} {RECOMPUTE}"),
    }.items()
    if f"{name}-{layout}" not in SAMPLE
}


@pytest.mark.parametrize("name", SAMPLE)
def test_step_is_that_of_plain_pytorch(name, tmp_path: Path, single, write_config, train):
    check(*SAMPLE[name], tmp_path, single, write_config, train)


@pytest.mark.full
@pytest.mark.parametrize("name", REST)
def test_step_is_that_of_plain_pytorch_rest(name, tmp_path: Path, single, write_config, train):
    check(*REST[name], tmp_path, single, write_config, train)


FURTHER = {
    "ep2": (2, EP), "tp2-ep2": (4, f"{TP} {EP}"), "pp2-recompute": (2, f"{PP} {RECOMPUTE}"),
    "micro1": (1, "--micro-batch-size 1"),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("layout", FURTHER)
def test_with_prediction_of_later_tokens(layout, tmp_path: Path, single, write_config, train):
    check(AHEAD, *FURTHER[layout], tmp_path, single, write_config, train)


@pytest.mark.full
def test_with_a_gradient_through_the_last_loop_alone(tmp_path: Path, single, write_config, train):
    """Walks without a gradient have no balance, and are not reported."""
    assert not any("/layer-2/loop-1" in name for name in single(CUT)[-1])
    check(CUT, 2, f"{PP} {RECOMPUTE}", tmp_path, single, write_config, train)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, write_config, train):
    """The sections of a student with experts, whose teacher has none."""
    path = write_config(tmp_path_factory.mktemp("teacher"), recurrence={"pattern": "(*-)x3", "loop_scales": False})
    train(path, 1, "--train-iters 10 --lr 0.01")
    distillation = {"config": str(path), "load": str(path.parent / "run"), "weight": SHARE}
    return {"recurrence": {"pattern": PATTERN}, "distillation": distillation}


@pytest.mark.full
@pytest.mark.parametrize("layout", FURTHER)
def test_a_student(layout, tmp_path: Path, taught, single, write_config, train):
    check(taught, *FURTHER[layout], tmp_path, single, write_config, train)


@pytest.mark.full
def test_a_skipped_head_changes_no_gradient(tmp_path: Path, write_config, train):
    """The load-balancing loss is divided by the same number of tokens."""
    found = []
    for skips in (True, False):
        sections = {**SHARED, "sgt": {"top_loss": 0.3, "alpha": 1.0, "skip_head": skips}, "data": {"prefix": 9}}
        path = write(write_config, tmp_path / str(skips), sections)
        train(path, 2, f"{STAY} {EP}")
        found.append(first_gradient(path.parent / "run"))
    assert distance(*found) <= TOLERANCE


def passes(path):
    """How often micro-batches go through the stack in training mode."""
    from cherry_megatron.model.stack import RecurrentStack

    count, forward = 0, RecurrentStack.forward

    def counted(self, *args, **kwargs):
        nonlocal count
        count += self.training
        return forward(self, *args, **kwargs)

    RecurrentStack.forward = counted
    _train(path, [], STAY.split())
    return count


@pytest.mark.parametrize("coefficient", [0.5, 0.0])
def test_one_pass_before_the_step_serves_balance_and_selection(coefficient, tmp_path: Path, write_config):
    """Without a load-balancing loss it is made for the selection alone."""
    sections = {**SHARED, "sgt": {"top_loss": 0.3}, "megatron": {"moe-aux-loss-coeff": coefficient}}
    path = write(write_config, tmp_path, sections)
    assert run_ranks(tmp_path / "output", 1, passes, path) == [4 + 4]


LAYOUTS = {
    "single": (1, ""),
    "ep2": (2, EP),
    "tp2-ep2": (4, f"{TP} {EP}"),
    "tp2-whole-experts": (2, f"{TP} --expert-tensor-parallel-size 1"),
    "pp2-ep2": (4, f"{PP} {EP}"),
    "dp2": (2, ""),
}
EACH = 3  # steps under a layout
SEED = 49  # which draws 2, 1, 2, 1, 1, 2 loops


def resume(layouts, tmp_path, write_config, train):
    """Some steps under each layout, going on from the one before, are those of a run without a stop."""
    sections = {
        "recurrence": {"pattern": PATTERN, "loop_routers": True, "random_loops": [1, 2]},
        "megatron": {
            "train-iters": EACH * len(layouts),
            "save-interval": EACH,
            "global-batch-size": 4,
            "seed": SEED,
            "log-interval": 2,
        },
        "sgt": {"top_loss": 0.2},
    }
    undisturbed = train(write(write_config, tmp_path / "undisturbed", sections))
    for step in undisturbed:  # a walk is reported by the steps that have it, once an interval
        drawn = random.Random(f"{SEED}/loops/{step['iteration'] - 1}").randint(1, 2)
        walks = {name.split("/")[2] for name in step["moee"] if "/layer-2/loop-" in name}
        assert len(walks) == (0 if step["iteration"] % 2 else drawn)
        loads = [
            value for name, value in step["moee"].items() if name.startswith("load/layer-2/") and "loop" not in name
        ]
        assert len(loads) == 4 and sum(loads) == pytest.approx(2)
    path = write(write_config, tmp_path / "resumed", sections)
    for number, layout in enumerate(layouts, start=1):
        ranks, flags = LAYOUTS[layout]
        found = train(path, ranks, f"{flags} --exit-interval {EACH * number}")
    assert [step["iteration"] for step in found] == list(range(1, EACH * len(layouts) + 1))[-len(found) :]
    for ours, theirs in zip(found, undisturbed[-len(found) :], strict=True):
        for value in ("loss", "selected_loss", "grad_norm", "balance_loss"):
            assert ours[value] == pytest.approx(theirs[value], rel=TOLERANCE), (ours, theirs)
        assert ours["moee"] == pytest.approx(theirs["moee"], rel=1e-4)


def test_resume_under_another_layout(tmp_path: Path, write_config, train):
    """With as many loops as each step draws, and the tokens of the highest loss selected."""
    resume(["ep2", "single"], tmp_path, write_config, train)


@pytest.mark.full
def test_resume_under_every_layout(tmp_path: Path, write_config, train):
    resume(["single", "tp2-ep2", "pp2-ep2", "dp2", "tp2-whole-experts", "ep2"], tmp_path, write_config, train)


def looked_at(path, cases):
    """Of each case: why a run is refused, before it starts and when it starts; what makes its losses others."""
    from types import SimpleNamespace

    from cherry_megatron.checkpoints import other_losses, unchanged_start, unloadable
    from cherry_megatron.config import load
    from cherry_megatron.errors import CherryError
    from cherry_megatron.platform.machine import prepare
    from cherry_megatron.runs import checkpoint_to_load

    prepare()
    found = []
    for overrides in cases:
        config, start = load(path, overrides), ""
        try:
            refused = unloadable(config)
        except CherryError as error:
            refused = [str(error)]
        try:
            unchanged_start(config, SimpleNamespace(load=str(checkpoint_to_load(config).parent)))
        except CherryError as error:
            start = str(error)
        found.append((refused, start, other_losses(config)))
    return found


def test_a_run_keeps_its_experts(tmp_path: Path, write_config, train):
    path = write(write_config, tmp_path, SHARED)
    train(path, 1, STAY)
    another = (f"run={tmp_path / 'another'}", f"megatron.load={tmp_path / 'run'}", "megatron.finetune=true")
    topk, softmax = "megatron.moe-router-topk", "megatron.moe-router-pre-softmax"
    cases = (
        (("megatron.num-experts=8",), "megatron.num-experts 4, not 8", "", []),
        (("megatron.moe-ffn-hidden-size=32",), "megatron.moe-ffn-hidden-size 24, not 32", "", []),
        (("recurrence.loop_routers=true",), "recurrence.loop_routers False, not True", "", []),
        ((f"{topk}=3",), "", f"was trained with {topk} 2, not 3; choose another run", ["moe-router-topk"]),
        ((f"{softmax}=true",), "", f"with {softmax} False, not True", ["moe-router-pre-softmax"]),
        ((*another, f"{topk}=3"), "", "", ["moe-router-topk"]),
        (another, "", "", []),
        ((*another, f"{softmax}=true"), f"{softmax} is True, but", "", ["moe-router-pre-softmax"]),
    )
    (found,) = run_ranks(tmp_path / "looked", 1, looked_at, path, [overrides for overrides, *_ in cases])
    for (_, before, start, losses), (refused, started, other) in zip(cases, found, strict=True):
        assert len(refused) == bool(before) and all(before in line for line in refused), refused
        assert start in started and bool(started) == bool(start), started
        assert other == losses
