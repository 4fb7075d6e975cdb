"""Drafts by multi-token prediction: depths say over a cache what they say of whole texts, and change no text."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.conftest import PROMPTS, run_ranks
from tests.inference.test_generate import TEMPERATURE, TOKENS, continued, said, with_model

TOLERANCE = 1e-5
DEPTHS, DRAFTED, ROUNDS, LOOPS = 2, 4, 5, 3


@pytest.fixture(scope="module")
def deep(tmp_path_factory, write_config, train) -> Path:
    """The configuration of a trained run with two depths."""
    path = write_config(
        tmp_path_factory.mktemp("deep"),
        recurrence={"injection": "add"},
        mtp={"depths": DEPTHS, "weight": 0.5},
        megatron={
            "seq-length": 96,
            "max-position-embeddings": 96,
            "global-batch-size": 4,
            "train-iters": 8,
            "lr": 1e-2,
        },
    )
    train(path)
    return path


def by_rounds(prompts, model):
    """What depths say while texts grow by random drafts, of which a random number is taken.

    Returns:
        Each text with its drafts, how many these are, and the logits after it (on the last stage).
    """
    from megatron.core import mpu

    from cherry_megatron.inference.generate import evaluating
    from cherry_megatron.inference.reader import Reader

    draw, texts, found = random.Random(5), [list(prompt) for prompt in prompts], []
    drafts = [[] for _ in texts]
    reader = Reader(model, len(texts), 96, LOOPS, DEPTHS)
    with evaluating(model):
        for number in range(ROUNDS):
            read = [text + draft for text, draft in zip(texts, drafts, strict=True)]
            reader.logits_after(read, len(drafts[0]) + 1)
            if number == 3:
                del texts[1], drafts[1]
                reader.keep([0, *range(2, len(prompts))])
            for text, draft in zip(texts, drafts, strict=True):
                text += [*draft[: draw.randint(0, len(draft))], draw.randrange(300, 500)]
            drafts = [[] for _ in texts]
            for drafted in range(DRAFTED):
                read = [text + draft for text, draft in zip(texts, drafts, strict=True)]
                logits = reader.logits_ahead(read, drafted)
                assert (logits is not None) == mpu.is_pipeline_last_stage()
                if logits is not None:
                    found += [(text, drafted, each[0].numpy()) for text, each in zip(read, logits, strict=True)]
                for draft in drafts:
                    draft.append(draw.randrange(300, 500))
    return found


def of_whole_text(state, text, drafted, walk, depths=DEPTHS):
    """Logits [v] after one text, by plain PyTorch: all of it at once, every depth at all positions that it has."""
    import torch

    from tests.model import reference

    sizes, tokens = {"heads": 4, "groups": 4, "size": 8}, torch.tensor([text])
    known = len(text) - drafted - 1  # the model's states: of all but the text's last token
    before = states = reference.states(state, tokens[:, :known], walk, injection="add", **sizes)
    for step in range(1, drafted + 2):
        depth = min(step, depths)
        # The last depth goes on from what it started from, and behind that from its own last states.
        before = states if step <= depths else torch.cat((before, states[:, -1:]), 1)
        follows = tokens[:, depth : depth + before.shape[1]]
        states = reference.depth_states(state, follows, before, depth, **sizes)
    return states[0, -1] @ state["output_layer.weight"].T


def of_whole_texts(path, texts):
    """The same as `by_rounds`, from the checkpoint alone, each text by itself."""
    import torch

    from cherry_megatron.model.pattern import parse, unroll
    from cherry_megatron.storage.checkpoint import open_checkpoint
    from tests.model.reference import local_name

    checkpoint = open_checkpoint(path.parent / "run" / "checkpoints")
    state = {local_name(name): torch.from_numpy(np.array(checkpoint.read(name))) for name in checkpoint.model}
    walk = [(visit.layer, visit.loop) for visit in unroll(parse("*-[*-*-]x3*-"), LOOPS, "cycle")]
    return [of_whole_text(state, text, drafted, walk).numpy() for text, drafted in texts]


@pytest.fixture(scope="module")
def single(deep, tmp_path_factory):
    """What one process finds."""
    (found,) = run_ranks(tmp_path_factory.mktemp("single"), 1, with_model, deep, "", on_one_rank)
    return found


def test_over_a_cache_as_of_the_whole_text(deep, single, tmp_path: Path):
    rounds, *_ = single
    texts = [(text, drafted) for text, drafted, _ in rounds]
    (wanted,) = run_ranks(tmp_path, 1, of_whole_texts, deep, texts)
    assert len(rounds) == DRAFTED * (3 * len(PROMPTS) + 2 * (len(PROMPTS) - 1))
    assert max(len(text) for text, _ in texts) > 96 * 2 // len(PROMPTS), "a prompt read in one piece is no test"
    for (text, drafted, logits), whole in zip(rounds, wanted, strict=True):
        assert np.abs(whole).max() > 0.5
        assert np.abs(logits - whole).max() <= TOLERANCE * max(1, np.abs(whole).max()), (len(text), drafted)


def texts_of(_, count, model):
    """Texts of so many prompts without drafts and with them, and the share of drafts that was taken."""
    from cherry_megatron.inference.draft import Drafting

    draw = random.Random(4)
    prompts = [[draw.randrange(300, 500) for _ in range(draw.randint(1, 20))] for _ in range(count)]
    # A frequent token ends texts, so that rows leave the batch one after the other.
    end = continued(model, prompts, 0.0, tokens=24).texts[0][12]
    found = []
    for temperature, options in ((0.0, {}), (1.0, {"top_k": 50, "top_p": 0.9})):
        options = {"tokens": 24, "end": end, **options}
        expected = continued(model, prompts, temperature, **options)
        for tokens in (None, 1, DRAFTED):
            ours = continued(model, prompts, temperature, drafting=Drafting(tokens=tokens), **options)
            found.append((ours.texts == expected.texts, ours.accepted / ours.drafted, ours.drafted))
    return found, len({len(text) for text in expected.texts})


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.full)])
def test_texts_are_those_without_drafts(count, deep, tmp_path: Path):
    ((found, lengths),) = run_ranks(tmp_path, 1, with_model, deep, "", texts_of, count)
    assert lengths > 2
    for same, share, _ in found:
        assert same
        assert 0.02 < share < 0.98, "drafts that are all wrong, or all right, are no test"


SP = "--tensor-model-parallel-size 2 --sequence-parallel"
SAMPLE = {"tp2-sp": (2, SP)}
REST = {
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "tp2-sp-pp2": (4, f"{SP} --pipeline-model-parallel-size 2"),
    "dp2": (2, ""),
    "micro4": (1, "--micro-batch-size 4"),
}


def with_drafts(prompts, model):
    """What depths say, and texts with drafts by them, greedy and drawn."""
    from cherry_megatron.inference.draft import Drafting

    drafts = Drafting(tokens=DRAFTED)
    texts = [continued(model, prompts, temperature, drafting=drafts).texts for temperature in (0.0, TEMPERATURE)]
    return by_rounds(prompts, model), texts


def on_one_rank(prompts, model):
    """The same, and texts without drafts."""
    plain = [continued(model, prompts, temperature).texts for temperature in (0.0, TEMPERATURE)]
    return *with_drafts(prompts, model), plain


def check(layout, deep, single, tmp_path):
    ranks, flags = layout
    rounds, drafts, plain = single
    assert drafts == plain
    heard = False
    for found, texts in run_ranks(tmp_path, ranks, with_model, deep, flags, with_drafts):
        assert texts == plain
        for (text, drafted, ours), (also, as_many, theirs) in zip(found, rounds, strict=False):
            assert (text, drafted) == (also, as_many)
            assert np.abs(ours - theirs).max() <= TOLERANCE * max(1, np.abs(theirs).max())
        heard |= len(found) == len(rounds)
    assert heard


@pytest.mark.parametrize("name", SAMPLE)
def test_layout(name, deep, single, tmp_path: Path):
    check(SAMPLE[name], deep, single, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", REST)
def test_layout_rest(name, deep, single, tmp_path: Path):
    check(REST[name], deep, single, tmp_path)


def test_the_verb_drafts_and_says_how_many_were_taken(deep, single, data, tmp_path: Path):
    given = ["--config", str(deep), "--tokens", str(TOKENS), "--temperature", "0", "--draft-mtp"]
    ((status, out, errors),) = run_ranks(tmp_path, 1, said, [*given, "--prompt", *PROMPTS[:2]])
    tokenizer = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json"))
    texts = [tokenizer.decode(text, skip_special_tokens=False) for text in single[2][0]]
    assert status == 0
    assert out == "".join(f"> {prompt}\n{text}\n\n" for prompt, text in zip(PROMPTS[:2], texts, strict=False))
    speed = r"12 tokens .* tokens/s; \d+ of \d+ drafted tokens accepted \(\d+%\)"
    assert re.fullmatch(speed, errors.splitlines()[-1])
