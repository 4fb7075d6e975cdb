"""Draws against the distribution they should follow, and what may be drawn against a plain reference."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cherry_megatron.inference.options import Generation
from cherry_megatron.inference.sampling import drawable, shares_of
from cherry_megatron.inference.sampling import pick as pick_of

LOGITS = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2


def options(**given):
    return Generation("the test", **given)


def pick(logits, chosen, generator):
    return pick_of(shares_of(logits, chosen), chosen, generator)


def reference(weights, top_k, top_p):
    """The places that may be drawn, by exact arithmetic on whole numbers."""
    likeliest = sorted(range(len(weights)), key=lambda place: (-weights[place], place))
    likeliest = likeliest[:top_k] if top_k else likeliest
    total = sum(Fraction(weights[place]) for place in likeliest)
    found, together = set(), Fraction(0)
    for place in likeliest:
        # Where the share is met exactly, rounding decides.
        assume(top_p == 1 or abs(together - top_p * total) > Fraction(1, 10**9))
        if together < top_p * total:
            found.add(place)
        together += weights[place]
    return found


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(0, 14),
    st.fractions(Fraction(1, 100), 1),
)
def test_what_may_be_drawn(weights, top_k, top_p):
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    found = drawable(shares, top_k, float(top_p))
    expected = reference(weights, top_k, top_p)
    assert {place for place, share in enumerate(found.tolist()) if share} == expected
    for place in expected:
        assert found[place] == shares[place]


def test_by_hand():
    shares = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    assert drawable(shares, 0, 1.0) is shares
    assert drawable(shares, 2, 1.0).tolist() == [0, 0.4, 0, 0.3]
    assert drawable(shares, 0, 0.6).tolist() == [0, 0.4, 0, 0.3]
    assert drawable(shares, 0, 0.75).tolist() == [0, 0.4, 0.2, 0.3]
    assert drawable(shares, 2, 0.5).tolist() == [0, 0.4, 0, 0]  # 0.4 of 0.7
    assert drawable(shares, 0, 1e-9).tolist() == [0, 0.4, 0, 0]


@pytest.mark.parametrize(
    "given", [{"temperature": t} for t in (0.5, 1.0, 3.0)] + [{"top_k": 4}, {"temperature": 2.0, "top_p": 0.7}]
)
def test_draws_follow_the_distribution(given):
    chosen = options(**given)
    weights = [math.exp(value / chosen.temperature) for value in LOGITS.tolist()]
    allowed = drawable(torch.tensor(weights, dtype=torch.float64) / sum(weights), chosen.top_k, chosen.top_p)
    assert len(given) == 1 or 1 < int((allowed > 0).sum()) < 12
    generator = torch.Generator().manual_seed(2)
    drawn = [pick(LOGITS, chosen, generator) for _ in range(4000)]
    for place, expected in enumerate((allowed / allowed.sum()).tolist()):
        spread = (expected * (1 - expected) / 4000) ** 0.5
        assert drawn.count(place) / 4000 == pytest.approx(expected, abs=4 * spread)


def test_the_rule_of_a_draw():
    """Seeded texts stay what they were: one multinomial draw of the tempered softmax."""
    for seed in range(20):
        shares = (LOGITS.double() / 0.8).softmax(0)
        expected = int(torch.multinomial(shares, 1, generator=torch.Generator().manual_seed(seed)))
        assert pick(LOGITS, options(temperature=0.8), torch.Generator().manual_seed(seed)) == expected


def test_similar_logits_mostly_give_the_same_token():
    """With generators in the same state: at least (1 - D) / (1 + D), D the total variation distance."""
    noise = 0.3 * torch.randn(12, generator=torch.Generator().manual_seed(3))
    same = 0
    for seed in range(1000):
        both = [pick(logits, options(), torch.Generator().manual_seed(seed)) for logits in (LOGITS, LOGITS + noise)]
        same += both[0] == both[1]
    distance = float((LOGITS.softmax(0) - (LOGITS + noise).softmax(0)).abs().sum()) / 2
    bound = (1 - distance) / (1 + distance)
    assert distance > 0.02
    assert same / 1000 >= bound - 4 * (bound * (1 - bound) / 1000) ** 0.5


def test_rows_are_filtered_one_by_one():
    rows = torch.stack([LOGITS, LOGITS.flip(0), -LOGITS])
    for chosen in (
        options(temperature=0.0),
        options(top_k=3),
        options(top_p=0.5),
        options(temperature=0.7, top_p=0.9),
    ):
        together = shares_of(rows, chosen)
        assert torch.equal(together, torch.stack([shares_of(row, chosen) for row in rows]))


def test_the_smallest_share_leaves_the_likeliest():
    drawn = pick(LOGITS, options(top_k=1, top_p=1e-323), torch.Generator())
    assert drawn == int(LOGITS.argmax())


@pytest.mark.parametrize("temperature", [0, 1e-320])
def test_odd_logits(temperature):
    inf, nan = float("inf"), float("nan")
    generator = torch.Generator().manual_seed(2)
    for row, expected in (([1.0, -inf, 3.0], {2}), ([0.0, inf, nan], {1}), ([nan, nan, nan], {0, 1, 2})):
        for chosen in (options(temperature=temperature), options(temperature=temperature, top_k=1, top_p=0.5)):
            # A model that has diverged says something.
            assert pick(torch.tensor(row), chosen, generator) in expected
