"""Generation against a plain loop over the model, and the same under every layout."""

import contextlib
import io
import math
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.conftest import PROMPTS, run_ranks

TOKENS = 6
TEMPERATURE = 0.8
SEED = 7


def with_model(path: Path, flags: str, called, *arguments):
    """What a function gives that is called with prompts, arguments and the model of a run's newest checkpoint."""
    from cherry_megatron.config import load
    from cherry_megatron.inference.prompts import encode_prompts
    from cherry_megatron.platform.machine import prepare

    machine = prepare()
    from cherry_megatron.inference.generate import MULTIPLE
    from cherry_megatron.pretrain import load_only, pretrain

    config = load(path, (), flags.split())
    prompts = encode_prompts(config, PROMPTS, TOKENS, "the test").ids
    prompts[2] = (prompts[2] * MULTIPLE)[: MULTIPLE - 3]  # passes get longer in the middle of its continuation
    given = []

    def evaluation(*_):
        return lambda model: given.append(called(prompts, *arguments, model))

    pretrain(config, machine, load_only(config), evaluation=evaluation)
    return given[0]


def greedy_and_drawn(prompts, end, model):
    """Continuations that end at the likeliest tokens' fourth, and drawn ones without an end."""
    from cherry_megatron.inference.generate import generate

    return (
        generate(model, prompts, TOKENS, 0.0, SEED, end),
        generate(model, prompts, TOKENS, TEMPERATURE, SEED, end=-1),
    )


def on_one_rank(prompts, model):
    """All that is compared, and the likeliest tokens by a plain loop: each text by itself, nothing behind it."""
    import torch
    from megatron.core.utils import get_attr_wrapped_model

    from cherry_megatron.inference.generate import generate

    model[0].train()
    before = torch.get_rng_state()
    drawn = generate(model, prompts[3:], TOKENS, TEMPERATURE, SEED, end=-1)
    assert model[0].training, "the model is left as it was"
    assert torch.equal(torch.get_rng_state(), before), "the training's draws are disturbed"
    model[0].eval()
    plain = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(TOKENS):
            logits = model[0](torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
            tokens.append(int(logits[0, -1].argmax()))
        plain.append(tokens[len(prompt) :])
    end = plain[0][3]
    found = {"plain": plain, "end": end, "drawn": drawn, "both": greedy_and_drawn(prompts, end, model)}
    get_attr_wrapped_model(model[0], "decoder").loops = 1
    return {**found, "one loop": generate(model, prompts[:2], TOKENS, TEMPERATURE, SEED, end=-1)}


@pytest.fixture(scope="module")
def single(speaking: Path, tmp_path_factory):
    (found,) = run_ranks(tmp_path_factory.mktemp("single"), 1, with_model, speaking, "", on_one_rank)
    return found


def test_the_likeliest_tokens_are_those_of_a_plain_loop_up_to_the_end(single):
    greedy, end = single["both"][0], single["end"]
    assert len({token for text in single["plain"] for token in text}) > 5, "a model that says one thing is no test"
    assert greedy == [text[: text.index(end) + 1] if end in text else text for text in single["plain"]]
    assert len({len(text) for text in greedy}) > 1


def test_a_continuation_does_not_depend_on_the_other_prompts(single):
    assert single["drawn"] == single["both"][1][3:]
    assert single["drawn"] != single["plain"][3:]


def picked():
    """Shares of tokens among many draws, by temperature, with what they should be; and picks of odd logits."""
    import torch

    from cherry_megatron.inference.generate import pick

    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    generator = torch.Generator().manual_seed(2)
    found = {}
    for temperature in (0.5, 1.0, 3.0):
        weights = [math.exp(value / temperature) for value in logits.tolist()]
        drawn = [pick(logits, temperature, generator) for _ in range(4000)]
        found[temperature] = [(drawn.count(n) / 4000, weight / sum(weights)) for n, weight in enumerate(weights)]
    inf, nan = float("inf"), float("nan")
    odd = [[1.0, -inf, 3.0], [nan, nan, nan], [0.0, inf, nan]]
    return found, [[pick(torch.tensor(row), temperature, generator) for temperature in (0, 1e-320)] for row in odd]


def test_draws_follow_the_tempered_distribution(tmp_path: Path):
    ((found, odd),) = run_ranks(tmp_path, 1, picked)
    for temperature, shares in found.items():
        for share, expected in shares:
            spread = (expected * (1 - expected) / 4000) ** 0.5
            assert share == pytest.approx(expected, abs=4 * spread), temperature
    assert odd[0] == [2, 2] and odd[2] == [1, 1]
    assert all(token in range(3) for token in odd[1]), "a model that has diverged says something"


# name: (ranks, Megatron flags)
SAMPLE = {
    "dp2": (2, ""),
    "tp2-sp-pp2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
}
REST = {
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp4": (4, "--pipeline-model-parallel-size 4"),
    "dp3": (3, "--global-batch-size 6"),
    "tp2-dp2": (4, "--tensor-model-parallel-size 2"),
    "pp2-dp2": (4, "--pipeline-model-parallel-size 2"),
    "micro4": (1, "--micro-batch-size 4"),
}


def check(layout, speaking, single, tmp_path):
    ranks, flags = layout
    for found in run_ranks(tmp_path, ranks, with_model, speaking, flags, greedy_and_drawn, single["end"]):
        assert found == single["both"]


@pytest.mark.parametrize("name", SAMPLE)
def test_layout(name, speaking, single, tmp_path: Path):
    check(SAMPLE[name], speaking, single, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", REST)
def test_layout_rest(name, speaking, single, tmp_path: Path):
    check(REST[name], speaking, single, tmp_path)


def said(arguments: list[str]) -> tuple[int, str]:
    from cherry_megatron.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main(["generate", *arguments])
    return status, out.getvalue()


def test_the_verb_prints_prompts_with_what_follows(speaking: Path, single, data: Path, tmp_path: Path):
    options = ["--tokens", str(TOKENS), "--temperature", str(TEMPERATURE), "--seed", str(SEED), "--loops", "1"]
    arguments = ["--config", str(speaking), *options, "--prompt", *PROMPTS[:2]]
    ((status, out),) = run_ranks(tmp_path, 1, said, arguments)
    tokenizer = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    expected = [tokenizer.decode(text, skip_special_tokens=False) for text in single["one loop"]]
    assert single["one loop"] != single["both"][1][:2]
    assert status == 0
    assert out == "".join(f"> {prompt}\n{text}\n\n" for prompt, text in zip(PROMPTS, expected, strict=False))
