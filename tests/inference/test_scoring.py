"""Log-likelihoods of continuations against whole passes of one text at a time, and the same under every layout."""

from pathlib import Path

import pytest

from tests.conftest import run_ranks
from tests.inference.test_generate import with_model
from tests.moee.conftest import write_mixture  # noqa: F401

SPLITS = (1, 3, 1, 2, 5)  # tokens of each prompt that are the continuation
PREFIX = 8


def pairs_of(prompts):
    """Contexts and continuations: some of one token after the same text, short contexts, a full sequence."""
    texts = [prompt + prompts[2][:7] for prompt in prompts]
    cut = [(text[:-count], text[-count:]) for text, count in zip(texts, SPLITS, strict=True)]
    choices = [(prompts[0], [token]) for token in (5, 300, 77)]
    long = (prompts[2] * 2)[:97]
    short = [(text[:2], text[2:]) for text in texts]
    return [*cut, *choices, *short, (long[:1], long[1:]), (long[:60], long[60:])]


def likelihoods(prompts, loops, at_once, model):
    """What `score` gives, with so many positions in one go."""
    from cherry_megatron.inference import scoring

    before, scoring.POSITIONS = scoring.POSITIONS, at_once
    found = scoring.score(model, pairs_of(prompts), loops)
    scoring.POSITIONS = before
    return found


def plain(prompts, model):
    """The same by whole passes in float64 sums, what was found in one go and in many, and what the likeliest is."""
    import torch

    from cherry_megatron.inference.scoring import score

    found = [likelihoods(prompts, 3, many, model) for many in (2048, 7)]
    wanted = []
    with torch.no_grad():
        for context, continuation in pairs_of(prompts):
            read = [*context, *continuation][:-1]
            logits = model[0].eval()(torch.tensor([read]), torch.arange(len(read))[None], None)[0]
            likely = logits[-len(continuation) :].double().log_softmax(-1)
            said = torch.tensor(continuation)
            total = float(likely.gather(1, said[:, None]).sum())
            wanted.append((total, bool((likely.argmax(-1) == said).all())))
        logits = model[0](torch.tensor([prompts[0]]), torch.arange(len(prompts[0]))[None], None)[0, -1]
    likeliest = int(logits.argmax())
    greedy = [told for _, told in score(model, [(prompts[0], [token]) for token in (likeliest, likeliest - 1)], 3)]
    return found, wanted, (greedy, [likelihoods(prompts, loops, 2048, model) for loops in (1, 2)])


def same(found, wanted):
    assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


@pytest.fixture(scope="module")
def single(speaking: Path, tmp_path_factory):
    (found,) = run_ranks(tmp_path_factory.mktemp("single"), 1, with_model, speaking, "", plain)
    return found


def test_log_likelihoods_are_those_of_whole_passes_in_one_go_and_in_pieces(single):
    (at_once, in_pieces), wanted, (greedy, (one, two)) = single
    same(at_once, wanted)
    same(in_pieces, wanted)
    assert greedy == [True, False]
    totals = [[total for total, _ in found] for found in (at_once, one, two)]
    assert len({round(of[0], 3) for of in totals}) == 3, "other loops must be another model"


def broken(prompts, model):
    import torch

    from cherry_megatron.errors import CherryError

    model[0].decoder.final_norm.weight.data[0] = torch.nan
    with pytest.raises(CherryError, match="not finite"):
        likelihoods(prompts, 3, 2048, model)
    return True


def test_a_model_that_gives_no_numbers_is_refused(speaking, tmp_path):
    assert run_ranks(tmp_path, 1, with_model, speaking, "", broken) == [True]


# name: (ranks, Megatron flags)
LAYOUTS = {
    "tp2-sp-pp2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
    "dp3": (3, "--global-batch-size 6"),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "pp4": (4, "--pipeline-model-parallel-size 4"),
    "pp2-dp2": (4, "--pipeline-model-parallel-size 2"),
    "micro4": (1, "--micro-batch-size 4"),
}


def check(name, speaking, single, tmp_path):
    ranks, flags = LAYOUTS[name]
    for found in run_ranks(tmp_path, ranks, with_model, speaking, flags, likelihoods, 3, 2048):
        same(found, single[1])


def test_layout(speaking, single, tmp_path: Path):
    check("tp2-sp-pp2", speaking, single, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "tp2-sp-pp2"])
def test_every_layout(name, speaking, single, tmp_path: Path):
    check(name, speaking, single, tmp_path)


def mixed(prompts, model):
    """What `score` gives of a mixture, and sums of probabilities of the experts that each context asks for.

    Also how many choices there are, and how many would be others if what is scored were seen too.
    """
    import torch

    from cherry_megatron.model.mixture import mixture_of

    mixture = mixture_of(model[0])
    mixture.router.outer.data *= 40  # gates that differ from text to text
    found = likelihoods(prompts, 2, 7, model)
    if len(mixture.experts) < mixture.options.experts:
        return found, None, 0, 0
    wanted, asked, others = [], set(), 0

    def top(tokens):
        scores = mixture.router(tokens).exp().mean(1)[0]
        return sorted(range(len(scores)), key=lambda e: -float(scores[e]))[: mixture.options.top_k]

    with torch.no_grad():
        for context, continuation in pairs_of(prompts):
            tokens = [*context, *continuation][:-1]
            read, places = torch.tensor([tokens]), torch.arange(len(tokens))[None]
            chosen = top(read[:, : len(context)][:, :PREFIX])
            others += set(chosen) != set(top(read[:, :PREFIX]))
            gates = mixture.router(read)[0].double().exp()[-len(continuation) :]
            experts = [mixture.experts[str(e)].eval()(read, places, None)[0, -len(continuation) :] for e in chosen]
            weight = gates[:, chosen] / gates[:, chosen].sum(1, keepdim=True)
            likely = sum(weight[:, [n]] * logits.double().softmax(-1) for n, logits in enumerate(experts))
            said = torch.tensor(continuation)
            total = float(likely.gather(1, said[:, None]).log().sum())
            wanted.append((total, bool((likely.argmax(-1) == said).all())))
            asked.add(tuple(chosen))
    return found, wanted, len(asked), others


def test_a_mixture_gives_the_sum_of_probabilities_on_one_rank_and_on_two(write_mixture, train, tmp_path):  # noqa: F811
    sections = {"megatron": {"seq-length": 96, "max-position-embeddings": 96, "train-iters": 4, "lr": 1e-2}}
    path = write_mixture(tmp_path, sections, experts=4, top_k=2, prefix=PREFIX)
    train(path)
    ((found, wanted, asked, others),) = run_ranks(tmp_path / "one", 1, with_model, path, "", mixed)
    assert asked > 1, "texts of the same experts alone are no test"
    assert others > 0, "contexts that ask for the experts of the whole text are no test of a leak"
    same(found, wanted)
    flags = "--expert-model-parallel-size 2"
    for theirs, *_ in run_ranks(tmp_path / "two", 2, with_model, path, flags, mixed):
        same(theirs, wanted)


@pytest.mark.full
def test_experts_inside_layers_on_one_rank_and_on_two(write_config, train, tmp_path):
    lengths = {"seq-length": 96, "max-position-embeddings": 96, "num-experts": 4, "train-iters": 4, "lr": 1e-2}
    path = write_config(tmp_path, recurrence={"pattern": "*-[*E]x3*E"}, megatron=lengths)
    train(path)
    (((at_once, in_pieces), wanted, _),) = run_ranks(tmp_path / "one", 1, with_model, path, "", plain)
    same(at_once, wanted)
    same(in_pieces, wanted)
    flags = "--expert-model-parallel-size 2"
    for found in run_ranks(tmp_path / "two", 2, with_model, path, flags, likelihoods, 3, 2048):
        same(found, wanted)
