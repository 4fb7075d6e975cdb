"""Generation against a plain loop over the model, and the same under every layout."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.conftest import PROMPTS, run_ranks

TOKENS = 6
TEMPERATURE = 0.8
SEED = 7
LONG = 61


def with_model(path: Path, flags: str, called, *arguments):
    """What a function gives that is called with prompts, arguments and the model of a run's newest checkpoint."""
    from cherry_megatron.config import load
    from cherry_megatron.inference.prompts import encode_prompts
    from cherry_megatron.platform.machine import prepare

    machine = prepare()
    from cherry_megatron.pretrain import load_only, pretrain

    config = load(path, (), flags.split())
    prompts = encode_prompts(config, PROMPTS, TOKENS, "the test").ids
    prompts[2] = (prompts[2] * LONG)[:LONG]  # more than a pass may hold of all prompts: it is read in pieces
    given = []

    def evaluation(*_):
        return lambda model: given.append(called(prompts, *arguments, model))

    pretrain(config, machine, load_only(config), evaluation=evaluation)
    return given[0]


def continued(model, prompts, temperature=TEMPERATURE, loops=3, end=-1, drafting=None, heard=None, **options):
    """What `generate` gives."""
    from cherry_megatron.inference.generate import generate
    from cherry_megatron.inference.options import Generation

    chosen = Generation("the test", **{"tokens": TOKENS, "temperature": temperature, **options})
    return generate(model, prompts, chosen, loops, SEED, end, drafting, heard)


def greedy_and_drawn(prompts, end, model):
    """Continuations that end at the likeliest tokens' fourth, drawn ones without an end, and both with drafts."""
    from cherry_megatron.inference.draft import Drafting

    return tuple(
        continued(model, prompts, temperature, end=stop, drafting=drafting).texts
        for drafting in (None, Drafting(loops=1, tokens=2))
        for temperature, stop in ((0.0, end), (TEMPERATURE, -1))
    )


def on_one_rank(prompts, model):
    """All that is compared, and the likeliest tokens by a plain loop: each text by itself, nothing behind it."""
    import torch

    model[0].train()
    before = torch.get_rng_state()
    drawn = continued(model, prompts[3:]).texts
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
    found["passes"] = passes_of(prompts, model)
    found["one loop"] = continued(model, prompts[:2], loops=1).texts
    found["alone"] = [continued(model, [prompt]).texts[0] for prompt in prompts]
    return found


def passes_of(prompts, model):
    """Rows and columns of each pass over all prompts."""
    from cherry_megatron.model.cache import Cache

    seen, place = [], Cache.place

    def placed(cache, counts, width):
        seen.append((len(counts), width))
        place(cache, counts, width)

    Cache.place = placed
    continued(model, prompts)
    Cache.place = place
    return seen


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
    assert single["alone"] == single["both"][1]


def test_no_pass_holds_more_than_a_micro_batch_of_training(single):
    assert max(rows * width for rows, width in single["passes"]) <= 2 * 96
    assert sum(width > 1 for _, width in single["passes"]) > 1, "a prompt that is read in one go is no test"


def test_drafts_change_no_token(single):
    assert single["both"][2:] == single["both"][:2]


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


def test_more_ranks_than_prompts(speaking, single, tmp_path: Path):
    """Replicas without a prompt wait for the others."""
    for found in run_ranks(tmp_path, 2, with_model, speaking, "", first_alone):
        assert found == single["alone"][:1]


def first_alone(prompts, model):
    return continued(model, prompts[:1]).texts


def said(arguments: list[str]) -> tuple[int, str, str]:
    from cherry_megatron.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main(["generate", *arguments])
    return status, out.getvalue(), errors.getvalue()


@pytest.mark.parametrize(
    ("options", "speed"),
    [
        ("--loops 1", r"12 tokens in [\d.]+ s, [\d.]+ tokens/s"),
        ("--stream --draft-loops 1", r"12 tokens in [\d.]+ s, [\d.]+ tokens/s; \d+ of \d+ drafted tokens .*\)"),
    ],
)
def test_the_verb_prints_prompts_with_what_follows(options, speed, speaking, single, data: Path, tmp_path: Path):
    given = ["--tokens", str(TOKENS), "--temperature", str(TEMPERATURE), "--seed", str(SEED), *options.split()]
    arguments = ["--config", str(speaking), *given, "--prompt", *PROMPTS[:2]]
    ((status, out, errors),) = run_ranks(tmp_path, 1, said, arguments)
    tokenizer = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    tokens = single["one loop"] if "--loops 1" in options else single["alone"][:2]
    expected = [tokenizer.decode(text, skip_special_tokens=False) for text in tokens]
    assert single["one loop"] != single["alone"][:2]
    assert status == 0
    assert out == "".join(f"> {prompt}\n{text}\n\n" for prompt, text in zip(PROMPTS, expected, strict=False))
    assert re.fullmatch(speed, errors.splitlines()[-1])
