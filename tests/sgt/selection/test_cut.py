"""The cut against a sort of everything, and the hash against the published generator."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cherry_megatron.sgt.selection.cut import cut
from cherry_megatron.sgt.selection.selectors import mixed

SCORES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 2.5, -np.inf, np.inf]), st.floats(width=32, allow_nan=False))


@st.composite
def scored(draw):
    total = draw(st.integers(1, 300))
    scores = np.array(draw(st.lists(SCORES, min_size=total, max_size=total)), np.float32)
    eligible = np.array(draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    eligible[draw(st.integers(0, total - 1))] = True
    borders = sorted({0, total, *draw(st.lists(st.integers(0, total), max_size=4))})
    return scores, eligible, borders, draw(st.integers(1, int(eligible.sum())))


@settings(max_examples=150, deadline=None)
@given(scored())
def test_it_is_the_beginning_of_a_sort(drawn):
    """By score from above, and by the hash of the place among equal scores, whatever the pieces."""
    scores, eligible, borders, count = drawn
    parts = list(pairwise(borders))

    def read():
        return ((start, scores[start:end], eligible[start:end]) for start, end in parts)

    line = cut(read, count)
    found = np.concatenate([line.selected(*part) for part in read()])
    hashes = mixed(np.arange(len(scores), dtype=np.uint64)).tolist()
    order = sorted(np.flatnonzero(eligible).tolist(), key=lambda place: (-float(scores[place]), hashes[place]))
    assert set(np.flatnonzero(found).tolist()) == set(order[:count])


def test_ties_among_many_tokens_are_cut_exactly():
    """More of one score than there are bins of hashes."""
    scores = np.zeros(200_000, np.float32)
    everywhere = np.ones(len(scores), bool)
    line = cut(lambda: iter([(5, scores, everywhere)]), 12_345)
    found = line.selected(5, scores, everywhere)
    hashes = mixed(np.arange(5, 200_005, dtype=np.uint64))
    assert found.sum() == 12_345 and hashes[found].max() < hashes[~found].min()


def test_the_hash_is_splitmix64():
    """The generator's first outputs from the seed 0, as published with it."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mixed(np.arange(3, dtype=np.uint64)).tolist() == published
    places = np.arange(1000, dtype=np.uint64)
    assert not np.intersect1d(mixed(places, 1), mixed(places)).size
