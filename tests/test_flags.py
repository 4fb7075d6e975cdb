"""What is known of Megatron's flags without its import is what its own parser has."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cherry_megatron.errors import CherryError
from cherry_megatron.flags import TABLE, action_of, megatron_arguments, outline_values, parse_flags, table_of_flags


def test_the_table_is_that_of_megatrons_parser():
    assert TABLE.read_text() == table_of_flags(), "make it anew: python -m cherry_megatron.flags"


VALUES = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.integers(), max_size=3),
    st.sampled_from(["64", "64.0", "1e-5", "many", ""]),
)  # fmt: skip


@settings(deadline=None)  # the first one imports Megatron
@given(VALUES, st.sampled_from(["hidden-size", "norm-epsilon", "swiglu", "tokenizer-model"]))
def test_a_value_is_taken_or_refused_as_by_megatrons_parser(value, flag):
    def theirs() -> object:
        return getattr(parse_flags(megatron_arguments({flag: value})), action_of(flag).dest)

    try:
        ours = outline_values({flag: value})[flag]
    except CherryError as error:
        with pytest.raises(CherryError) as found:
            theirs()
        assert str(found.value) == str(error)
        return
    if value is not None and flag in ("hidden-size", "norm-epsilon"):
        assert repr(ours) == repr(theirs())
    else:
        theirs()
        assert ours is value


def test_megatron_is_not_imported_for_it():
    code = (
        "import sys; from cherry_megatron.flags import outline_values; outline_values({'hidden-size': 8}); "
        "assert not {'megatron', 'torch'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
