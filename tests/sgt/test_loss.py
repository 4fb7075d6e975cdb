"""Selective training: one gradient under every split, and that of the formula."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run_ranks
from tests.sgt.conftest import ONE_STEP, distance, evaluate, first_gradient
from tests.test_bad_input import verb

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def step(tmp_path_factory, selective, train):
    """Train one step; returns what is recorded of it and its gradient. The same one is trained once."""
    done = {}

    def run(ranks=1, flags="", sections=None, **options):
        key = str((ranks, flags, sections, sorted(options.items())))
        if key not in done:
            folder = tmp_path_factory.mktemp("step")
            recorded = train(selective(folder, sections, **options), ranks, f"{ONE_STEP} {flags}")
            done[key] = recorded[0], first_gradient(folder / "run")
        return done[key]

    return run


def agree(found, expected, tolerance=TOLERANCE):
    for name, value in expected[0].items():
        if "loss" in name or name == "grad_norm":
            assert found[0][name] == pytest.approx(value, rel=tolerance), name
    assert distance(found[1], expected[1]) <= tolerance


def test_alpha_0_is_plain_training_bit_for_bit(step):
    plain, gradient = step()
    selective, ours = step(marks="some", alpha=0.0)
    assert (selective["loss"], selective["grad_norm"]) == (plain["loss"], plain["grad_norm"])
    assert all(np.array_equal(ours[name], gradient[name]) for name in gradient)


def test_every_token_selected_is_plain_training(step):
    agree(step(marks="every", alpha=0.7), step())


@pytest.mark.parametrize("alpha", [0.3, 0.7])
def test_alpha_mixes_all_and_selected_tokens(step, alpha):
    everything, selected = step()[1], step(marks="some", alpha=1.0)[1]
    mixed = {name: (1 - alpha) * everything[name] + alpha * selected[name] for name in everything}
    assert distance(step(marks="some", alpha=alpha)[1], mixed) <= TOLERANCE


def test_alpha_1_is_training_on_the_selected_tokens(step, marked, tmp_path_factory):
    """Another way to the same gradient: the selected tokens as the only ones with a loss, as answers are."""
    folder = tmp_path_factory.mktemp("answers")
    for suffix in ("", ".some"):
        for ending in (".bin", ".idx", ".json"):
            target = folder / f"text{suffix.replace('some', 'answers')}{ending}"
            target.write_bytes(Path(f"{marked}{suffix}{ending}").read_bytes().replace(b'"some"', b'"answers"'))
    answers, gradient = step(sections={"megatron": {"data-path": [str(folder / "text")]}})
    found, ours = step(marks="some", alpha=1.0)
    assert found["selected_loss"] == pytest.approx(answers["loss"], rel=TOLERANCE)
    # The one divides by the batch's number of selected tokens, the other by rho and the number of all.
    ratio = np.linalg.norm(ours["decoder.final_norm.weight"]) / np.linalg.norm(
        gradient["decoder.final_norm.weight"]
    )
    assert 0.5 < ratio < 2
    assert distance(ours, {name: ratio * value for name, value in gradient.items()}) <= TOLERANCE


def test_parts_add_up(step):
    found, _ = step(marks="some", alpha=0.7)
    share = (found["loss"] - found["unselected_loss"]) / (found["selected_loss"] - found["unselected_loss"])
    assert 0.1 < share < 0.2  # of this batch's tokens: about rho, and a whole number of them
    assert share * 8 * 32 == pytest.approx(round(share * 8 * 32), abs=1e-2)


SAMPLE = {
    "dp2": (2, "", {"marks": "few", "alpha": 0.7}),
    "tp2-sp-pp2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2",
        {"marks": "some", "alpha": 1.0, "skip_head": True},
    ),
    "micro4": (1, "--micro-batch-size 4", {"top_loss": 0.15, "alpha": 0.3}),
}


def check(step, ranks, flags, options):
    whole = {name: value for name, value in options.items() if name != "skip_head"}
    found, expected = step(ranks, flags, **options), step(**whole)
    if "skip_head" in options:
        assert found[0]["loss"] is None, "the loss of all tokens is not known"
        expected = {name: expected[0][name] for name in ("selected_loss", "grad_norm")}, expected[1]
    agree(found, expected)


@pytest.mark.parametrize("name", SAMPLE)
def test_split(name, step):
    check(step, *SAMPLE[name])


SPLITS = {
    "micro1": (1, "--micro-batch-size 1"),
    "micro4": (1, "--micro-batch-size 4"),
    "micro8": (1, "--micro-batch-size 8"),
    "dp2": (2, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "tp2-sp-dp2": (4, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "dp2-overlap": (2, "--overlap-grad-reduce --overlap-param-gather"),
}
OPTIONS = {
    "alpha-0": {"marks": "some", "alpha": 0.0},
    "alpha-0.3": {"marks": "some", "alpha": 0.3},
    "alpha-0.7": {"marks": "some", "alpha": 0.7},
    "alpha-1": {"marks": "some", "alpha": 1.0},
    "few": {"marks": "few", "alpha": 0.7},
    "few-skip-head": {"marks": "few", "alpha": 1.0, "skip_head": True},
    "every": {"marks": "every", "alpha": 1.0},
    "top-loss": {"top_loss": 0.15, "alpha": 0.7},
}


@pytest.mark.full
def test_fused_cross_entropy(step):
    """Against the same kernel: Megatron's native fusion rounds the gradient of the logits to BF16."""
    fused = "--cross-entropy-loss-fusion --cross-entropy-fusion-impl native"
    plain, selective = step(1, fused), step(1, fused, marks="some", alpha=0.0)
    assert (selective[0]["loss"], selective[0]["grad_norm"]) == (plain[0]["loss"], plain[0]["grad_norm"])
    assert all(np.array_equal(selective[1][name], plain[1][name]) for name in plain[1])
    agree(step(1, fused, marks="every", alpha=0.7), plain)


@pytest.mark.full
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_split(split, option, step):
    check(step, *SPLITS[split], OPTIONS[option])


def test_alpha_moves_in_a_line(tmp_path, selective, train):
    """The weighted loss of each step is that of its alpha, and a resume goes on with it."""
    path = selective(
        tmp_path, {"evaluation": {"at_start": True}}, marks="some", alpha=0.8, alpha_start=0.0, alpha_steps=4
    )
    train(path, 1, "--train-iters 6 --exit-interval 3 --lr-warmup-iters 0")
    steps = train(path, 1, "--train-iters 6 --lr-warmup-iters 0")
    assert len(steps) == 6
    from cherry_megatron.runs import read_evaluations, read_rho

    rho = read_rho(tmp_path / "run")
    assert 0.1 < rho < 0.2
    for step in steps:
        alpha = 0.8 * min(step["iteration"] - 1, 4) / 4
        # Of this batch, whose own share of selected tokens is not rho.
        share = (step["loss"] - step["unselected_loss"]) / (step["selected_loss"] - step["unselected_loss"])
        number = round(share * 8 * 32)
        expected = (1 - alpha) * step["loss"] + alpha * number / (8 * 32 * rho) * step["selected_loss"]
        assert step["weighted_loss"] == pytest.approx(expected, rel=1e-5)
    first, last = read_evaluations(tmp_path / "run")
    assert (first["iteration"], last["iteration"]) == (0, 6)
    assert first["losses"]["3"] > last["losses"]["3"]
    for evaluation in (first, last):
        selected, other = (evaluation["parts"]["3"][name] for name in ("selected", "unselected"))
        assert min(selected, other) < evaluation["losses"]["3"] < max(selected, other)


def test_other_marks_or_order_are_other_text(tmp_path, selective, train):
    """Losses of another order of the text must not stand among the run's own."""
    path = selective(tmp_path, {"data": {"shuffle": "tokens"}}, marks="some")
    train(path, 1, "--train-iters 2 --lr-warmup-iters 0")
    before = (tmp_path / "run" / "evaluations.jsonl").read_text()
    for other in ("data.shuffle=none", "sgt.marks=few"):
        (said,) = run_ranks(tmp_path / "output", 1, evaluate, path, [other])
        assert f"{other.partition('=')[0]} differs from training" in said
    assert (tmp_path / "run" / "evaluations.jsonl").read_text() == before
    (said,) = run_ranks(tmp_path / "output", 1, evaluate, path, [])
    assert "differ" not in said
    # Nor may a run go on with another objective.
    for other, says in (
        ("sgt.alpha=1.0", "sgt.alpha 0.7, not 1.0"),
        ("data.shuffle=words", "'tokens', not 'words'"),
    ):
        command = ["pretrain", "--config", str(path), "--set", other]
        ((status, errors),) = run_ranks(tmp_path / "output", 1, verb, tmp_path, command)
        assert status == 2 and says in errors and "Traceback" not in errors, errors


def weighted() -> tuple[float, float]:
    """The sum of a loss with a teacher, a balance and two depths, and the same by hand."""
    import torch

    from cherry_megatron.model.multi_token import Ahead
    from cherry_megatron.sgt.loss import loss_function

    draw = torch.Generator().manual_seed(3)
    losses, divergence = (torch.rand(2, 5, generator=draw) for _ in range(2))
    mask, selected = ((torch.rand(2, 5, generator=draw) < 0.6).float() for _ in range(2))
    weights = 0.3 + 0.7 * selected / 0.2
    balance, later = torch.rand(2, generator=draw), torch.rand(2, 2, 5, generator=draw)
    more = {"balance": balance, "ahead": Ahead(later, None, 0.3)}
    total, tokens, report = loss_function(
        mask, losses, selected, weights, divergence=divergence, share=0.25, **more
    )
    by_hand = sum(
        float(m * w * (0.75 * loss + 0.25 * apart))
        for m, w, loss, apart in zip(
            *(values.flatten() for values in (mask, weights, losses, divergence)), strict=True
        )
    )
    by_hand += float((balance * mask.sum(1)).sum())
    for depth, row, t in ((d, row, t) for d in (1, 2) for row in range(2) for t in range(5 - d)):
        target = row, t + depth
        by_hand += 0.3 / 2 * float(mask[target] * weights[target] * later[depth - 1, row, t])
    assert int(tokens) == int(mask.sum())
    assert float(report["selected loss"][1] + report["unselected loss"][1]) == float(mask.sum())
    return float(total), by_hand


def test_what_is_added_to_the_loss_has_its_weights_but_for_the_balance(tmp_path):
    """A teacher's divergence and what is predicted ahead; the balance counts each token of a sequence alike."""
    ((total, by_hand),) = run_ranks(tmp_path, 1, weighted)
    assert total == pytest.approx(by_hand, rel=1e-6)
