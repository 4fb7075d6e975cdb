"""Generation of a mixture against sums of probabilities, whole passes and one text at a time."""

from pathlib import Path

import pytest

from tests.conftest import run_ranks
from tests.inference.test_generate import TOKENS, continued, with_model
from tests.moee.conftest import write_mixture  # noqa: F401

PREFIX = 8  # prompts are shorter and longer


def sharpen(model):
    """Gates that differ from text to text and from token to token."""
    from cherry_megatron.model.mixture import mixture_of

    mixture = mixture_of(model[0])
    mixture.router.outer.data *= 40
    return mixture


def by_probabilities(mixture, prompts):
    """The likeliest tokens, and which experts were asked."""
    import torch

    texts, asked = [], []
    for prompt in prompts:
        tokens = list(prompt)
        scores = mixture.router(torch.tensor([prompt[:PREFIX]])).exp().mean(1)[0]
        chosen = sorted(range(len(scores)), key=lambda e: -float(scores[e]))[: mixture.options.top_k]
        for _ in range(TOKENS):
            read, places = torch.tensor([tokens]), torch.arange(len(tokens))[None]
            gates = mixture.router(read)[0, -1].double().exp()
            likely = sum(
                gates[e] * mixture.experts[str(e)](read, places, None)[0, -1].double().softmax(-1) for e in chosen
            )
            tokens.append(int(likely.argmax()))
        texts.append(tokens[len(prompt) :])
        asked.append(chosen)
    return texts, asked


def all_kinds(prompts, model):
    """Greedy and drawn texts, without drafts and with them, and one with an end."""
    from cherry_megatron.inference.draft import Drafting

    sharpen(model)
    found = [
        continued(model, prompts, temperature, loops=2, drafting=drafting).texts
        for drafting in (None, Drafting(loops=1, tokens=2))
        for temperature in (0.0, 0.8)
    ]
    return [*found, continued(model, prompts, 0.0, loops=2, end=found[0][0][2]).texts]


def on_one_rank(prompts, model):
    import torch

    found = all_kinds(prompts, model)
    model[0].eval()
    with torch.no_grad():
        mixture = sharpen(model)
        mixture.router.outer.data /= 40
        return found, *by_probabilities(mixture, prompts)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.full)], ids=["top-1", "all"])
def mixed(request, write_mixture, train, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("mixed")
    sections = {
        "megatron": {"seq-length": 96, "max-position-embeddings": 96, "train-iters": 6, "lr": 1e-2},
        "recurrence": {"injection": "add"},
    }
    path = write_mixture(folder, sections, top_k=request.param, prefix=PREFIX)
    train(path)
    (found,) = run_ranks(folder / "one", 1, with_model, path, "", on_one_rank)
    return path, *found


def test_the_likeliest_tokens_are_those_of_the_summed_probabilities(mixed):
    _, found, plain, asked = mixed
    assert found[0] == plain
    assert {len(chosen) for chosen in asked} == {len(asked[0])}
    if len(asked[0]) == 1:
        assert len({*map(tuple, asked)}) == 2, "texts of one expert alone are no test"


def test_drafts_change_no_token_and_an_end_cuts_one_text(mixed):
    _, (greedy, drawn, *drafted, ended), *_ = mixed
    assert drafted == [greedy, drawn]
    assert drawn != greedy
    end = greedy[0][2]
    assert ended == [text[: text.index(end) + 1] if end in text else text for text in greedy]


LAYOUTS = {
    "ep2": (2, "--expert-model-parallel-size 2"),
    "dp2": (2, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-ep2": (4, "--tensor-model-parallel-size 2 --expert-model-parallel-size 2"),
    "ep2-dp4": (4, "--expert-model-parallel-size 2"),
}


def check(name, mixed, tmp_path: Path):
    path, found, *_ = mixed
    ranks, flags = LAYOUTS[name]
    for theirs in run_ranks(tmp_path, ranks, with_model, path, flags, all_kinds):
        assert theirs == found


def test_experts_on_two_ranks(mixed, tmp_path):
    check("ep2", mixed, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "ep2"])
def test_every_layout(name, mixed, tmp_path):
    check(name, mixed, tmp_path)
