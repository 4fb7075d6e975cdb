"""What is known of Megatron's flags without its import is what its own parser has."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cherry_megatron.errors import CherryError
from cherry_megatron.flags import (
    TABLE,
    _parser,
    action_of,
    megatron_arguments,
    outline_values,
    parse_flags,
    table_of_flags,
)
from cherry_megatron.storage.trained import FUNCTION


def test_the_table_is_that_of_megatrons_parser():
    assert TABLE.read_text() == table_of_flags(), "make it anew: python -m cherry_megatron.flags"


VALUES = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.integers(), max_size=3),
    st.sampled_from(["64", "64.0", "1e-5", "many", "", "8,0", "(8, 0)", "8,", "([0]*3+[1])*2", "[0,1]"]),
    st.sampled_from(["[0", "[a]"]),
)  # fmt: skip


@settings(deadline=None)  # the first one imports Megatron
@given(VALUES, st.sampled_from(["hidden-size", "swiglu", "tokenizer-model", *FUNCTION]))
def test_a_value_is_taken_or_refused_as_by_megatrons_parser(value, flag):
    def theirs() -> object:
        return getattr(_parser().parse_args(megatron_arguments({flag: value})), action_of(flag).dest)

    try:
        ours = outline_values({flag: value})[flag]
    except CherryError as error:
        with pytest.raises((CherryError, SyntaxError, NameError)) as found:
            theirs()
        if action_of(flag).type in (int, float):
            assert str(found.value) == str(error)
        with pytest.raises(CherryError):  # in one sentence there too
            parse_flags(megatron_arguments({flag: value}))
        return
    if action_of(flag).choices:  # which are Megatron's alone to look at
        assert ours is value
    elif value is not None and action_of(flag).type not in (None, str):
        assert repr(ours) == repr(theirs())
    else:
        theirs()
        assert ours is value


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("rotary-base", 10000.0, "megatron.rotary-base is '10000.0'; it takes a whole number: write 10000"),
        ("rotary-base", 1e99, "megatron.rotary-base is '1e+99'; it takes a whole number"),
        ("rotary-base", "nan", "megatron.rotary-base is 'nan'; it takes a whole number"),
        ("rotary-base", 0.5, "megatron.rotary-base is '0.5'; it takes a whole number"),
        ("lr", "fast", "megatron.lr is 'fast'; it takes a number"),
        ("window-size", "8,", "megatron.window-size: '8,' is not numbers such as 128,0"),
        ("lr", [1, 2], "megatron.lr is [1, 2]; it takes one value, without brackets"),
    ],
)
def test_what_is_refused_is_said_of_its_key(flag, value, says):
    with pytest.raises(CherryError) as found:
        outline_values({flag: value})
    assert str(found.value) == says


@pytest.mark.parametrize(
    ("flag", "value", "text", "how"),
    [
        ("window-size", [8, 0], "8,0", "without brackets: 8,0"),
        ("no-rope-freq", [0, 1], "[0,1]", 'in quotes and without spaces: "[0,1]"'),
    ],
)
def test_a_list_that_is_one_text_is_refused_with_the_text(flag, value, text, how):
    with pytest.raises(CherryError) as found:
        outline_values({flag: value})
    assert str(found.value) == f"megatron.{flag} is {value}; it takes one value, {how}"
    assert list(getattr(parse_flags(megatron_arguments({flag: text})), action_of(flag).dest)) == value


def test_megatron_is_not_imported_for_it():
    code = (
        "import sys; from cherry_megatron.flags import outline_values; outline_values({'hidden-size': 8}); "
        "assert not {'megatron', 'torch'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
