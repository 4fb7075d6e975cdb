"""Generation with experts inside layers: as whole passes say, and the same under every layout."""

from pathlib import Path

import pytest

from tests.conftest import run_ranks
from tests.inference.test_generate import TOKENS, continued, with_model


def all_kinds(prompts, model):
    """Greedy and drawn texts, and greedy ones with drafts and with an end."""
    from cherry_megatron.inference.draft import Drafting

    found = [continued(model, prompts, temperature, loops=2).texts for temperature in (0.0, 0.8)]
    found.append(continued(model, prompts, 0.0, loops=2, drafting=Drafting(loops=1, tokens=2)).texts)
    return [*found, continued(model, prompts, 0.0, loops=2, end=found[0][0][2]).texts]


def on_one_rank(prompts, model):
    """The same, and what whole passes of one text at a time find likeliest."""
    import torch

    found, plain = all_kinds(prompts, model), []
    with torch.no_grad():
        for prompt in prompts:
            tokens = list(prompt)
            for _ in range(TOKENS):
                logits = model[0].eval()(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
                tokens.append(int(logits[0, -1].argmax()))
            plain.append(tokens[len(prompt) :])
    return found, plain


@pytest.fixture(scope="module")
def trained(write_config, train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    lengths = {"seq-length": 96, "max-position-embeddings": 96}
    path = write_config(
        folder,
        recurrence={"pattern": "*-[*E]x2*E"},
        megatron={**lengths, "num-experts": 4, "train-iters": 6, "lr": 1e-2},
    )
    train(path)
    (found,) = run_ranks(folder / "one", 1, with_model, path, "", on_one_rank)
    return path, *found


def test_the_likeliest_tokens_are_those_of_whole_passes(trained):
    _, (greedy, drawn, drafted, ended), plain = trained
    assert greedy == drafted == plain
    assert drawn != greedy
    assert len({len(text) for text in ended}) > 1, "texts that end together do not test ranks that wait"


TP = "--tensor-model-parallel-size 2 --sequence-parallel"
LAYOUTS = {
    "ep2": (2, "--expert-model-parallel-size 2"),
    "dp2": (2, ""),
    "tp2": (2, TP),
    "tp2-ep2": (4, f"{TP} --expert-model-parallel-size 2"),
    "tp2-whole-experts-ep2": (4, f"{TP} --expert-tensor-parallel-size 1 --expert-model-parallel-size 2"),
    "tp2-whole-experts": (4, f"{TP} --expert-tensor-parallel-size 1"),
    "ep2-dp4": (4, "--expert-model-parallel-size 2"),
    "pp2-ep2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
}


@pytest.mark.parametrize(
    "name", [name if name == "ep2" else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]
)
def test_the_layout_does_not_matter(name, trained, tmp_path: Path):
    path, found, _ = trained
    ranks, flags = LAYOUTS[name]
    for theirs in run_ranks(tmp_path, ranks, with_model, path, flags, all_kinds):
        assert theirs == found


def with_drafts(prompts, model):
    """Greedy and drawn texts without drafts, and whether they are those with drafts by multi-token prediction."""
    from cherry_megatron.inference.draft import Drafting

    found = []
    for temperature in (0.0, 0.8):
        plain = continued(model, prompts, temperature, loops=2)
        drafts = [continued(model, prompts, temperature, loops=2, drafting=Drafting(tokens=k)) for k in (None, 3)]
        assert all(drafted.drafted > 0 for drafted in drafts)
        found.append((plain.texts, all(drafted.texts == plain.texts for drafted in drafts)))
    return found


@pytest.mark.full
def test_drafts_by_multi_token_prediction_change_no_text(write_config, train, tmp_path: Path):
    path = write_config(
        tmp_path / "deep",
        recurrence={"pattern": "*-[*E]x2*E"},
        mtp={"depths": 2, "weight": 0.3},
        megatron={
            "seq-length": 96, "max-position-embeddings": 96, "num-experts": 4, "train-iters": 6, "lr": 1e-2,
        },
    )  # fmt: skip
    train(path)
    (one,) = run_ranks(tmp_path / "one", 1, with_model, path, "", with_drafts)
    assert all(same for _, same in one) and one[0] != one[1]
    assert (
        run_ranks(tmp_path / "two", 2, with_model, path, "--expert-model-parallel-size 2", with_drafts) == [one] * 2
    )
