"""The pattern language, unrolling and balancing."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cherry_megatron.errors import CherryError
from cherry_megatron.model.pattern import MOST_LAYERS, Visit, balance, parse, unroll

layer_rows = st.lists(st.sampled_from(["*-", "*", "*E", "*--"]), max_size=4)


def test_the_papers_model():
    pattern = parse("*-[*-*-*-*-]x8*-")
    assert pattern == parse("*-[(*-)x4]x8*-") == parse(" *- [ (*-)x4 ]x8 *- ")
    assert pattern.symbols == "*-" * 6
    visits = unroll(pattern, 8, "cycle")
    assert len(visits) == 34
    assert [v.layer for v in visits] == [0, *[1, 2, 3, 4] * 8, 5]


def test_as_many_layers_as_there_may_be():
    assert parse("*-[*-]x1999").effective(1999) == MOST_LAYERS == len(parse(f"(*-)x{MOST_LAYERS}").layers)


def test_sequence_order_walks_each_layer_through_all_loops():
    visits = unroll(parse("*-[*-*-]x3*-"), 3, "sequence")
    assert visits[1:-1] == tuple(Visit(layer, loop) for layer in (1, 2) for loop in range(3))


def test_plain_stack_is_one_walk_of_its_core():
    pattern = parse("(*-)x48")
    assert (len(pattern.layers), pattern.loops, pattern.prelude, pattern.coda) == (48, 1, (), ())


@given(layer_rows, layer_rows.filter(bool), layer_rows, st.integers(1, 9), st.integers(1, 12))
def test_every_layer_is_walked_as_often_as_it_should_be(prelude, core, coda, loops, walked):
    text = f"{''.join(prelude)}[{''.join(core)}]x{loops}{''.join(coda)}"
    pattern = parse(text)
    assert (pattern.prelude, pattern.core, pattern.coda, pattern.loops) == (
        tuple(prelude), tuple(core), tuple(coda), loops,
    )  # fmt: skip
    for order in ("cycle", "sequence"):
        visits = unroll(pattern, walked, order)
        counts = [sum(v.layer == layer for v in visits) for layer in range(len(pattern.layers))]
        assert counts == [1] * len(prelude) + [walked] * len(core) + [1] * len(coda)
        assert len(set(visits)) == len(visits)


@given(st.text(alphabet="*-E()[]x12 /|M", max_size=16))
def test_any_text_is_a_pattern_or_a_clear_error(text):
    try:
        pattern = parse(text)
    except CherryError as error:
        assert "recurrence.pattern" in str(error)
        assert "\n" not in str(error)
    else:
        assert pattern.core
        assert pattern.loops >= 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no layers"),
        ("*-[]x3", "loop holds no layers"),
        ("*-[*-]x0", "0 times"),
        ("*-[*-]x2[*-]x3", "there can be one"),
        ("*-[*-]", "written [layers]xN"),
        ("*-|*-", "recurrence.stages"),
        ("*-Q", "'Q' is not a layer"),
        ("((*-)x2)x2", "without another group"),
        ("(*-)x999999999", "'(*-)x999999999' repeats a group 999999999 times; use 1 to 2000"),
        ("*-[*-]x999999999", "1000000000 effective layers are more than 2000; use fewer layers or loops"),
        ("(*-)x1999*-*-", "2001 effective layers are more than 2000"),
    ],
)
def test_errors_say_what_is_wrong(text, says):
    with pytest.raises(CherryError) as error:
        parse(text)
    assert says in str(error.value)


@given(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=9), st.integers(1, 4))
def test_balance_is_optimal(costs, stages):
    stages = min(stages, len(costs))
    lengths = balance(costs, stages)
    assert sum(lengths) == len(costs)
    assert min(lengths) >= 1

    def dearest(lengths):
        ends = [0, *itertools.accumulate(lengths)]
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(ends))

    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    best = min(dearest([b - a for a, b in itertools.pairwise([0, *c, len(costs)])]) for c in cuts)
    assert dearest(lengths) == pytest.approx(best)
