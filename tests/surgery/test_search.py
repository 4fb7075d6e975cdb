"""The search for a grouping, on losses that are made up."""

import math
import random
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cherry_megatron.errors import CherryError
from cherry_megatron.model.options import Recurrence
from cherry_megatron.surgery.grouping import groups_text, make_groups, slot_groups
from cherry_megatron.surgery.search import Found, Groups, Search

PAPER = "*-[(*-)x4]x8*-"
SMALL = "*-[*-]x2*-"


def parsed(text: str, layers: int, pattern: str) -> Groups:
    return tuple(make_groups(text, layers, Recurrence(pattern)))


def any_loss(seed: int):
    """A loss without any order to it, but the same for the same groups."""
    return lambda groups: random.Random(f"{seed}/{groups}").random()


def run(
    loss, layers: int = 48, pattern: str = PAPER, budget: int = 40, seed: int = 0, order: str = "cycle"
) -> tuple[Found, list[Groups]]:
    """What is found, and what was scored on the way."""
    seen: list[Groups] = []

    def score(groups: Groups) -> float:
        seen.append(groups)
        return loss(groups)

    return Search(layers, Recurrence(pattern, order=order), budget, seed).run(score), seen  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_with_budget_for_all_groupings_it_scores_all_and_finds_the_best(seed):
    everything = {
        tuple(tuple(layer for layer in range(5) if chosen[layer] == group) for group in range(3))
        for chosen in product(range(3), repeat=5)
        if set(chosen) == {0, 1, 2}
    }
    found, seen = run(any_loss(seed), 5, SMALL, 1000, seed)
    assert set(seen) == everything and found.scored == len(everything) == len(seen)
    assert parsed(found.groups, 5, SMALL) == min(everything, key=any_loss(seed))


def test_boundaries_move_to_where_they_should_be():
    """A loss that grows with the distance of each boundary, as a landscape that can be descended has it."""
    wanted = [5, 11, 20, 31, 40]

    def loss(groups: Groups) -> float:
        scattered = sum(below[-1] > above[0] for below, above in pairwise(groups))
        return sum(abs(group[0] - at) for group, at in zip(groups[1:], wanted, strict=True)) + 100 * scattered

    found, _ = run(loss, budget=400)
    assert found.groups == "0-4,5-10,11-19,20-30,31-39,40-47" and found.loss == 0 < found.adjacent


def test_the_window_of_the_slots_moves():
    def in_slots(groups: Groups) -> Groups:
        return tuple(slot_groups(48, Recurrence(PAPER), len(groups[0]), 48 - len(groups[-1]), share=False))

    def loss(groups: Groups) -> float:
        return abs(len(groups[0]) - 12) if groups == in_slots(groups) else 100

    found, _ = run(loss)
    groups = parsed(found.groups, 48, PAPER)
    assert found.loss == 0 < found.slots
    assert groups[0] == tuple(range(12)) and groups == in_slots(groups)


@settings(max_examples=40)
@given(
    st.integers(6, 60),
    st.sampled_from([PAPER, "[*-*-]x3", "*-[*-]x2*-*-", "*-[*-*-]x3"]),
    st.sampled_from(["cycle", "sequence"]),
    st.integers(2, 60),
    st.integers(),
)
def test_what_holds_of_every_search(layers, pattern, order, budget, seed):
    found, seen = run(any_loss(seed), layers, pattern, budget, seed, order)
    recurrence = Recurrence(pattern, order=order)
    starts = [tuple(make_groups(text, layers, recurrence)) for text in ("adjacent", "slots")]
    assert seen[: len(set(starts))] == list(dict.fromkeys(starts))
    assert (found.adjacent, found.slots) == tuple(map(any_loss(seed), starts))
    assert len(seen) == len(set(seen)) == found.scored <= budget
    assert found.loss == min(map(any_loss(seed), seen))
    shared = len([layer for group in starts[1] for layer in group]) > layers
    for groups in seen:
        assert all(groups) and all(list(group) == sorted(set(group)) for group in groups)
        members = [layer for group in groups for layer in group]
        assert set(members) == set(range(layers)) and (shared or len(members) == layers)
    assert run(any_loss(seed), layers, pattern, budget, seed, order) == (found, seen)


def test_another_seed_walks_elsewhere():
    assert run(any_loss(0), seed=1)[1] != run(any_loss(0), seed=2)[1]


def test_of_equal_groupings_the_earlier_is_found():
    assert run(lambda _: 1.0)[0].groups == groups_text(parsed("adjacent", 48, PAPER))


def test_what_is_no_number_is_worst():
    slots = parsed("slots", 48, PAPER)
    found, _ = run(lambda groups: 1.0 if groups == slots else math.nan)
    assert found.groups == groups_text(slots) and found.adjacent == math.inf


@pytest.mark.parametrize("budget", [1, 0, -3])
def test_a_budget_that_does_not_reach_for_both_beginnings_is_refused(budget):
    with pytest.raises(CherryError, match=rf"--budget {budget}: use 2 or more"):
        Search(48, Recurrence(PAPER), budget, 0)
