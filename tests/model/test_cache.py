"""Logits over a cache equal those of one pass over the whole text, in every position."""

import itertools
from pathlib import Path

import pytest

from tests.conftest import run_ranks

TOLERANCE = 1e-5
LENGTH = 16

CASES = [
    {"pattern": "*-[*-*-]x4*-", "order": order, "loop_scales": scales, "injection": injection, "loop_rank": rank}
    for order, scales, injection, rank in itertools.product(
        ("cycle", "sequence"), (True, False), ("none", "add"), (0, 3)
    )
    if not (order == "sequence" and injection == "add")
] + [{"pattern": "*-*-*-"}, {"pattern": "*-[*--*-]x3"}]


def in_pieces(model, tokens, pieces, loops):
    """Logits [b, s, v] of the real columns of each pass; a piece holds the number of tokens of each row."""
    import torch

    from cherry_megatron.model.cache import Cache

    cache = Cache(len(tokens), LENGTH, loops)
    found = torch.full((*tokens.shape, 64), float("nan"))
    for counts, width in pieces:
        start = list(cache.held)
        filled = torch.full((len(tokens), width), 63)  # what fills a pass up must not matter
        for row, (begin, count) in enumerate(zip(start, counts, strict=True)):
            filled[row, width - count :] = tokens[row, begin : begin + count]
        cache.place(counts, width)
        logits = model(filled.cuda(), None, None, inference_context=cache).cpu()
        for row, (begin, count) in enumerate(zip(start, counts, strict=True)):
            found[row, begin : begin + count] = logits[row, width - count :]
    return found


PIECES = {
    "one": [([16, 16], 16)],
    "token by token": [([1, 1], 1)] * LENGTH,
    "several": [([5, 5], 5), ([1, 1], 1), ([7, 7], 7), ([3, 3], 3)],
    "ragged": [([3, 7], 7), ([0, 1], 1), ([4, 2], 9), ([8, 3], 8), ([1, 3], 3)],
}


def compare(cases, groups=2, implementation="local", further=None):
    """Largest differences from one pass over the whole text, with the logits' size, by what was tried."""
    import torch

    from cherry_megatron.model.options import Recurrence
    from tests.model.test_stack import build

    found = {}
    for number, case in enumerate(cases):
        walked = Recurrence(**case).loops
        more = {} if number else {"loops": walked + 1}  # another number of loops than was trained
        walks = Recurrence(**case, **more)
        model, _, tokens = build(walks, implementation=implementation, groups=groups, further=further)
        model.eval()
        for loops in {walked} if number else {1, walked, walked + 1}:
            model.decoder.loops = loops
            with torch.no_grad():
                whole = model(tokens.cuda(), torch.arange(LENGTH).expand(2, -1).cuda(), None).cpu()
                model.decoder.loops = 1  # a cache has a number of its own
                for name, pieces in PIECES.items():
                    error = (in_pieces(model, tokens, pieces, loops) - whole).abs().max()
                    found[number, loops, name] = float(error), float(whole.abs().max())
    return found


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_in_pieces_as_in_one(groups, tmp_path: Path):
    (found,) = run_ranks(tmp_path, 1, compare, CASES if groups == 2 else CASES[:1], groups)
    assert len(found) >= 8
    for tried, (error, size) in found.items():
        assert size > 0.5, tried
        assert error <= TOLERANCE, tried


def test_experts_inside_layers_see_each_token_by_itself(tmp_path: Path):
    """No token is dropped, so the choice does not depend on what else is in a pass, nor on what fills it up."""
    cases = [{"pattern": "*-[*E*-]x3*E", "loop_routers": of_loops} for of_loops in (True, False)]
    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
    (found,) = run_ranks(tmp_path, 1, compare, cases, 2, "local", experts)
    assert len(found) == 16
    for tried, (error, size) in found.items():
        assert size > 0.5, tried
        assert error <= TOLERANCE, tried


def slots_and_rows():
    """Slots after a pass; differences where a batch of three goes on with two; and memory held by the model."""
    import gc
    import weakref

    import torch

    from cherry_megatron.model.cache import Cache
    from cherry_megatron.model.options import Recurrence
    from tests.model.test_stack import build

    model, plan, tokens = build(Recurrence("*-[*-*-]x4*-"))
    model.eval()
    with torch.no_grad():
        whole = model(tokens, torch.arange(LENGTH).expand(2, -1), None)
        cache = Cache(3, LENGTH, 4)
        cache.place([6, 6, 6], 6)
        model(torch.stack((tokens[1], tokens[1], tokens[0]))[:, :6], None, None, inference_context=cache)
        visits = set(cache._slots) == set(plan.visits), len(cache._slots)
        cache.keep([2, 0])
        cache.held[1] = 4  # two tokens are forgotten and read again
        cache.place([2, 4], 4)
        pad = torch.zeros(2, dtype=torch.long)
        rows = torch.stack((torch.cat((pad, tokens[0, 6:8])), tokens[1, 4:8]))
        found = model(rows, None, None, inference_context=cache)
    errors = [float((found[0, 2:] - whole[0, 6:8]).abs().max()), float((found[1] - whole[1, 4:8]).abs().max())]
    held = weakref.ref(cache)
    del cache
    gc.collect()
    return visits, errors, held() is None


def test_a_slot_for_each_effective_layer_and_rows_that_stay(tmp_path: Path):
    ((visits, errors, freed),) = run_ranks(tmp_path, 1, slots_and_rows)
    assert visits == (True, 1 + 2 * 4 + 1)
    assert max(errors) <= TOLERANCE
    assert freed, "the model holds on to the cache's memory"


def with_megatrons_context():
    from megatron.core.inference.contexts import StaticInferenceContext

    from cherry_megatron.errors import CherryError
    from cherry_megatron.model.options import Recurrence
    from tests.model.test_stack import build

    model, _, tokens = build(Recurrence("*-[*-*-]x4*-"))
    try:
        model.eval()(tokens, None, None, inference_context=StaticInferenceContext(2, LENGTH))
    except CherryError as error:
        return str(error)
    return ""


def test_megatrons_own_context_is_refused(tmp_path: Path):
    (said,) = run_ranks(tmp_path, 1, with_megatrons_context)
    assert "loops need a slot each" in said
