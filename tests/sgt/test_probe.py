"""The probe: the coupling of independently computed gradients, the same on all ranks, and nothing else changes."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run_ranks
from tests.sgt.conftest import ONE_STEP, first_gradient

PROBED = {"marks": "some", "alpha": 0.7, "probe_interval": 1}


def couplings(run: Path) -> list[dict[str, dict[str, float]]]:
    return [json.loads(line)["coupling"] for line in (run / "probes.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def probed(tmp_path_factory, selective, train) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("probed")
    train(selective(folder, **PROBED, probe_loops=True), 1, ONE_STEP)
    return couplings(folder / "run")[0]


PARTS = {
    "all": ("",),
    "embedding": ("embedding.",),
    "attention": ("self_attention", "input_layernorm", "self_attn"),
    "ffn": ("mlp",),
    "head": ("output_layer", "final_norm"),
}


def test_coupling_is_that_of_the_gradients(probed, tmp_path, selective, train):
    """From the gradients of two trainings: on all tokens, and on the selected ones."""
    gradients, steps = {}, {}
    for alpha in (0.0, 1.0):
        steps[alpha] = train(selective(tmp_path / str(alpha), marks="some", alpha=alpha), 1, ONE_STEP)[0]
        gradients[alpha] = first_gradient(tmp_path / str(alpha) / "run")
    loss, chosen, other = (steps[0.0][name] for name in ("loss", "selected_loss", "unselected_loss"))
    tokens = 8 * 32
    number = round(tokens * (loss - other) / (chosen - other))
    mean = steps[1.0]["selected_loss"] / steps[1.0]["weighted_loss"]  # instead of sum / (rho * tokens)
    selected = {name: mean * value for name, value in gradients[1.0].items()}
    others = {
        name: (tokens * value - number * selected[name]) / (tokens - number)
        for name, value in gradients[0.0].items()
    }
    seen = set()
    for part, starts in PARTS.items():
        names = [name for name in selected if any(start in name for start in starts)]
        seen |= {*names} if part != "all" else set()
        dot = sum(float((selected[name] * others[name]).sum()) for name in names)
        ours = sum(float((selected[name] ** 2).sum()) for name in names)
        theirs = sum(float((others[name] ** 2).sum()) for name in names)
        assert probed[part]["cos"] == pytest.approx(dot / np.sqrt(ours * theirs), rel=1e-4), part
        assert probed[part]["ratio"] == pytest.approx(dot / ours, rel=1e-4), part
    assert seen == selected.keys()


LAYOUTS = {
    "tp2-dp2": (4, "--tensor-model-parallel-size 2"),
    "tp2-sp-pp2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
    "dp2-overlap": (2, "--overlap-grad-reduce --overlap-param-gather"),
    "micro8": (1, "--micro-batch-size 8"),
    "recompute": (1, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
}


def check(layout, probed, tmp_path, selective, train):
    ranks, flags = LAYOUTS[layout]
    loops = "overlap" not in flags
    train(selective(tmp_path, **PROBED, probe_loops=loops), ranks, f"{ONE_STEP} {flags}")
    (found,) = couplings(tmp_path / "run")
    assert found.keys() == {*PARTS, *(("loop-1", "loop-2", "loop-3") if loops else ())} <= probed.keys()
    for part, values in found.items():
        assert values == pytest.approx(probed[part], rel=1e-5), part


def test_coupling_over_ranks(probed, tmp_path, selective, train):
    check("tp2-dp2", probed, tmp_path, selective, train)


@pytest.mark.full
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp2-dp2"])
def test_coupling_under_every_layout(layout, probed, tmp_path, selective, train):
    check(layout, probed, tmp_path, selective, train)


UNDISTURBED = {
    "one": (1, ""),
    "dp2-overlap": (2, "--overlap-grad-reduce --overlap-param-gather"),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
}


def undisturbed(layout, tmp_path, selective, train):
    """With dropout, which draws from the generators that a probe must not move."""
    ranks, flags = UNDISTURBED[layout]
    flags += " --train-iters 3 --hidden-dropout 0.1 --attention-dropout 0.1"
    plain = train(selective(tmp_path / "plain", marks="some", alpha=0.7), ranks, flags)
    probed = train(selective(tmp_path / "probed", **{**PROBED, "probe_interval": 2}), ranks, flags)
    assert len(couplings(tmp_path / "probed" / "run")) == 1
    for ours, theirs in zip(probed, plain, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_training_does_not_notice(tmp_path, selective, train):
    undisturbed("one", tmp_path, selective, train)


@pytest.mark.full
@pytest.mark.parametrize("layout", [name for name in UNDISTURBED if name != "one"])
def test_no_layout_notices(layout, tmp_path, selective, train):
    undisturbed(layout, tmp_path, selective, train)


def descend() -> tuple[float, float]:
    """How fast a step along the selected tokens' gradient lowers the loss of the others, and <g_S, g_U>."""
    from cherry_megatron.model.options import Recurrence
    from tests.model.test_stack import build

    model, _, tokens = build(Recurrence(pattern="*-[*-]x2*-"))
    import torch

    from cherry_megatron.sgt.loss import loss_function

    tokens = tokens % 4  # what is learned of some tokens holds for others
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    selected = (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.3).float()

    def mean(weights):
        losses = model(tokens, positions, None, labels=tokens.roll(-1, 1))
        total, _, _ = loss_function(torch.ones_like(selected), losses, selected, weights)
        return total / weights.sum()

    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(mean(weights), parameters) for weights in (selected, 1 - selected))
    dot = sum(float((a.double() * b.double()).sum()) for a, b in zip(ours, theirs, strict=True))
    eta, after = 1e-4, []
    with torch.no_grad():
        for sign in (-1, 2):  # to -eta, then to +eta
            for parameter, gradient in zip(parameters, ours, strict=True):
                parameter.add_(gradient, alpha=sign * eta)
            after.append(float(mean(1 - selected).double()))
    return (after[1] - after[0]) / (2 * eta), dot


def test_a_step_on_selected_tokens_lowers_the_loss_of_others_by_their_coupling(tmp_path):
    ((slope, dot),) = run_ranks(tmp_path, 1, descend)
    assert dot > 0
    assert slope == pytest.approx(dot, rel=1e-3)


def loop_by_loop() -> float:
    """The relative error of the sum over loops of the core's gradients."""
    from cherry_megatron.model.options import Recurrence
    from tests.model.test_stack import build

    model, _, tokens = build(Recurrence(pattern="*-[*-*-]x3*-", loop_scales=True, loop_rank=2))
    import torch

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    core = sorted(model.decoder.core_parameters(), key=id)

    def gradient(loop):
        model.decoder.learning_loop = loop
        loss = model(tokens, positions, None, labels=tokens.roll(-1, 1)).sum()
        model.decoder.learning_loop = None
        assert all(parameter.requires_grad for parameter in core)
        return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, core)])

    whole, parts = gradient(None), [gradient(loop) for loop in range(3)]
    assert all(float(part.norm()) > 0.05 * float(whole.norm()) for part in parts)
    return float((sum(parts) - whole).norm() / whole.norm())


def test_gradients_of_the_loops_add_up(tmp_path):
    (error,) = run_ranks(tmp_path, 1, loop_by_loop)
    assert error < 1e-6
