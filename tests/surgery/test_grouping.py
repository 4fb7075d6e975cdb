"""Which layers become which."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cherry_megatron.errors import CherryError
from cherry_megatron.model.options import Recurrence
from cherry_megatron.surgery.grouping import Mix, groups_text, make_groups, mix

PAPER = "*-[(*-)x4]x8*-"


def groups(text: str, layers: int = 48, pattern: str = PAPER, order: str = "cycle") -> list[list[int]]:
    return [list(g) for g in make_groups(text, layers, Recurrence(pattern, order=order))]  # type: ignore[arg-type]


def test_the_papers_groups_are_eight_neighbours_each():
    assert groups("adjacent") == [list(range(k, k + 8)) for k in range(0, 48, 8)]


def test_slots_in_cycle_order_take_every_fourth_layer_of_the_32_in_the_middle():
    first, *core, last = groups("slots")
    assert first == list(range(8)) and last == list(range(40, 48))
    assert core == [list(range(8 + k, 40, 4)) for k in range(4)]


def test_slots_in_sequence_order_are_the_neighbours():
    assert groups("slots", order="sequence") == groups("adjacent")


def test_groups_may_be_uneven_and_written_out():
    assert groups("0-2,3,4+7-8,8-36/4,37-39,40-47") == [
        [0, 1, 2], [3], [4, 7, 8], list(range(8, 37, 4)), [37, 38, 39], list(range(40, 48)),
    ]  # fmt: skip


@given(st.integers(6, 200), st.sampled_from([PAPER, "[*-*-]x3", "*-[*-]x2*-*-", "(*-)x6"]))
def test_adjacent_groups_hold_every_layer_once_and_differ_by_one_at_most(layers, pattern):
    found = groups("adjacent", layers, pattern)
    assert [layer for group in found for layer in group] == list(range(layers))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@given(
    st.integers(6, 200),
    st.sampled_from([PAPER, "[*-*-]x3", "*-[*-]x2*-*-"]),
    st.sampled_from(["cycle", "sequence"]),
)
def test_slots_hold_every_layer_and_none_is_empty(layers, pattern, order):
    found = groups("slots", layers, pattern, order)
    assert {layer for group in found for layer in group} == set(range(layers)) and all(found)


@given(
    st.lists(st.lists(st.integers(0, 47), min_size=1, max_size=12, unique=True).map(tuple), min_size=6, max_size=6)
)
def test_groups_are_written_as_they_are_read(found):
    assert groups(groups_text(found)) == [list(group) for group in found]


def test_groups_are_written_short():
    text = "0-5,6-12+14,8-36/4,0+2,5+3+4,1+4-8/2"
    assert groups_text(make_groups(text, 48, Recurrence(PAPER))) == "0-5,6-12+14,8-36/4,0+2,5+3-4,1+4-8/2"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0-7,8-15", "names 2 groups; recurrence.pattern has 6 layers"),
        ("0-7,8-15,16-23,24-31,32-39,40-48", "'40-48' is not within the layers 0-47"),
        ("a,b", "'a' is no run of layers"),
        ("7-0,1,2,3,4,5", "'7-0' is not within"),
        ("0-7/0,1,2,3,4,5", "'0-7/0' is not within"),
        ("0,1+1,2,3,4,5", r"'1\+1' names layer 1 twice; name it once"),
        ("0,1,2,3,4,2-8/3+5-6", r"'2-8/3\+5-6' names layer 5 twice"),
    ],
)
def test_groups_that_do_not_fit_are_refused(text, says):
    with pytest.raises(CherryError, match=says):
        groups(text)


def test_more_layers_than_there_are_cannot_be_made():
    with pytest.raises(CherryError, match="has 6 layers, and the source only 5; use no more"):
        groups("adjacent", 5)


def test_methods():
    pair = [(0, 1, 2), (3, 4, 5)]
    assert mix(pair, "average") == [Mix(group, (1.0,) * 3, group) for group in pair]
    assert mix(pair, "weighted", [1, 2, 1])[1] == Mix((3, 4, 5), (1.0, 2.0, 1.0), (3, 4, 5))
    assert mix(pair, "select") == [Mix((1,), (1.0,), (0, 1, 2)), Mix((4,), (1.0,), (3, 4, 5))]
    assert mix(pair, "select", keep=0)[1] == Mix((3,), (1.0,), (3, 4, 5))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("weighted",), "needs --weights"),
        (("weighted", [1, -1, 1]), "none negative"),
        (("weighted", [0, 0, 0]), "none negative"),
        (("weighted", [1, 1]), "names 2 weights, but a group has 3 layers"),
        (("select", (), 3), "--keep 3: a group has 3 layers"),
    ],
)
def test_methods_that_do_not_fit_are_refused(arguments, says):
    with pytest.raises(CherryError, match=says):
        mix([(0, 1, 2)], *arguments)
