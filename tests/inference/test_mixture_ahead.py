"""Drafts by the depths of a mixture's experts: a sum of their probabilities, and no text that differs."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run_ranks
from tests.inference.test_ahead import of_whole_text
from tests.inference.test_generate import continued, with_model
from tests.inference.test_mixture import PREFIX, sharpen
from tests.moee.conftest import write_mixture  # noqa: F401

EXPERTS, TOP_K, DRAFTED, LOOPS = 3, 2, 2, 2


def trained(folder: Path, depths: int, write_mixture, train) -> Path:  # noqa: F811
    """The configuration of a trained run."""
    sections = {
        "megatron": {"seq-length": 96, "max-position-embeddings": 96, "train-iters": 6, "lr": 1e-2},
        "recurrence": {"injection": "add"},
        "mtp": {"depths": depths, "weight": 0.5},
    }
    path = write_mixture(folder, sections, experts=EXPERTS, top_k=TOP_K, prefix=PREFIX, capacity=3.0)
    train(path)
    return path


@pytest.fixture(scope="module")
def mixed(write_mixture, train, tmp_path_factory) -> Path:  # noqa: F811
    return trained(tmp_path_factory.mktemp("mixed"), 1, write_mixture, train)


def said(prompts, model):
    """Texts without and with drafts, how many drafts were taken, and log-probabilities after texts with drafts."""
    from cherry_megatron.inference.draft import Drafting
    from cherry_megatron.inference.generate import evaluating
    from cherry_megatron.inference.mixture import MixtureReader

    mixture = sharpen(model)
    # A text that ends leaves the batch, and its experts.
    end = continued(model, prompts, 0.0, loops=LOOPS, tokens=5).texts[0][4]
    texts = [
        continued(model, prompts, temperature, loops=LOOPS, end=end, drafting=drafting, tokens=12)
        for drafting in (None, Drafting(tokens=DRAFTED))
        for temperature in (0.0, 0.8)
    ]
    reader, found = MixtureReader(mixture, len(prompts), 96, LOOPS, 1), []
    grown = [list(prompt) for prompt in prompts]
    with evaluating(model):
        reader.logits_after(grown, 1)
        for number in range(2 * (DRAFTED + 1)):
            if number == DRAFTED + 1:  # all drafts are taken, and read
                reader.logits_after(grown, DRAFTED + 1)
            grown = [[*text, 300 + 7 * number + row] for row, text in enumerate(grown)]
            drafted = number % (DRAFTED + 1)
            logits = reader.logits_ahead(grown, drafted)[:, 0].numpy()
            found += [(text, drafted, each) for text, each in zip(grown, logits, strict=True)]
    return [text.texts for text in texts], texts[-1].accepted / texts[-1].drafted, found


def by_sums(path, prompts, texts):
    """Probabilities after texts with drafts, by plain PyTorch."""
    import torch

    from cherry_megatron.model.pattern import parse, unroll
    from cherry_megatron.storage.checkpoint import open_checkpoint
    from tests.model import reference
    from tests.moee.reference import router

    checkpoint = open_checkpoint(path.parent / "run" / "checkpoints")
    state = {name: torch.from_numpy(np.array(checkpoint.read(name))) for name in checkpoint.model}
    gating = {name.removeprefix("router."): value for name, value in state.items() if name.startswith("router.")}
    gating["outer"] = 40 * gating["outer"]  # as `sharpen` does
    models = [
        {
            reference.local_name(name.removeprefix(f"experts.{e}.")): value
            for name, value in state.items()
            if name.startswith(f"experts.{e}.")
        }
        for e in range(EXPERTS)
    ]
    walk = [(visit.layer, visit.loop) for visit in unroll(parse("*-[*-]x2"), LOOPS, "cycle")]
    found, asked = [], set()
    for number, (text, drafted) in enumerate(texts):
        gates = router(gating, torch.tensor(text))
        prefix = min(PREFIX, len(prompts[number % len(prompts)]))
        chosen = gates[:prefix].mean(0).topk(TOP_K).indices.tolist()
        asked.add(tuple(sorted(chosen)))
        at = gates[len(text) - 2]  # the only depth sees the token behind it
        share = sum(at[e] for e in chosen)
        likely = [of_whole_text(models[e], text, drafted, walk, depths=1).softmax(-1) for e in chosen]
        found.append(sum(at[e] / share * p for e, p in zip(chosen, likely, strict=True)).numpy())
    return found, len(asked)


@pytest.fixture(scope="module")
def single(mixed, tmp_path_factory):
    (found,) = run_ranks(tmp_path_factory.mktemp("single"), 1, with_model, mixed, "", said)
    return found


def test_drafts_are_of_summed_probabilities_and_change_no_token(mixed, single, tmp_path: Path):
    texts, share, found = single
    assert texts[2:] == texts[:2]
    assert texts[0] != texts[1]
    assert len({len(text) for text in texts[0]}) > 1
    assert 0.02 < share < 0.98, "drafts that are all wrong, or all right, are no test"
    prompts = [text[:-1] for text, drafted, _ in found[: len(texts[0])]]
    ((wanted, asked),) = run_ranks(tmp_path, 1, by_sums, mixed, prompts, [each[:2] for each in found])
    assert asked > 1, "texts of the same experts alone are no test"
    for (_, _, ours), likely in zip(found, wanted, strict=True):
        assert np.abs(np.exp(ours) - likely).max() <= 1e-6


LAYOUTS = {
    "ep3": (3, "--expert-model-parallel-size 3 --global-batch-size 6"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "dp2": (2, ""),
}


@pytest.mark.full
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name, mixed, single, tmp_path: Path):
    ranks, flags = LAYOUTS[name]
    for texts, _, found in run_ranks(tmp_path, ranks, with_model, mixed, flags, said):
        assert texts == single[0]
        for (text, _, ours), (also, _, theirs) in zip(found, single[2], strict=True):
            assert text == also
            assert np.abs(np.exp(ours) - np.exp(theirs)).max() <= 1e-6


def by_two_depths(prompts, model):
    """Texts without drafts and with fewer, as many and more than there are depths; the share that was taken."""
    from cherry_megatron.inference.draft import Drafting

    sharpen(model)
    found = []
    for temperature in (0.0, 0.8):
        plain = continued(model, prompts, temperature, loops=LOOPS, tokens=12)
        for tokens in (1, 2, 5):
            drafts = Drafting(tokens=tokens)
            ours = continued(model, prompts, temperature, loops=LOOPS, tokens=12, drafting=drafts)
            found.append((ours.texts == plain.texts, ours.accepted / ours.drafted))
    return found


@pytest.mark.full
def test_drafts_by_two_depths_change_no_token(write_mixture, train, tmp_path: Path):  # noqa: F811
    path = trained(tmp_path / "deep", 2, write_mixture, train)
    (found,) = run_ranks(tmp_path / "output", 1, with_model, path, "", by_two_depths)
    assert all(same for same, _ in found)
    assert any(0.02 < share < 0.98 for _, share in found)
