"""A checkpoint's layers are those of its pattern, wherever the parts of it begin."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cherry_megatron.model.pattern import parse
from cherry_megatron.storage.checkpoint import Checkpoint, Tensor
from cherry_megatron.storage.layers import EMBEDDING, FINAL_NORM, ROLES, source_layers, sublayer_prefixes


def stored(text: str) -> Checkpoint:
    """A checkpoint with the names of a model of this pattern, and nothing behind them."""
    names = [EMBEDDING, FINAL_NORM]
    for sublayers in sublayer_prefixes(parse(text)):
        names += [prefix + role for symbol, prefix in sublayers for role in ROLES[symbol]]
    found = Checkpoint.__new__(Checkpoint)
    found.folder, found.tensors = Path("stored"), {name: Tensor(name, "float32", (), ()) for name in names}
    return found


def symbols(text: str, with_pattern: bool = True) -> tuple[str, ...]:
    layers = source_layers(stored(text), experts=True, pattern=parse(text) if with_pattern else None).layers
    return tuple("".join(sublayer.symbol for sublayer in layer) for layer in layers)


parts = st.text(alphabet="*-E", max_size=6)


@given(parts, parts.filter(bool), parts)
def test_layers_are_those_of_the_pattern(prelude, core, coda):
    text = f"{prelude}[{core}]x2{coda}"
    assert symbols(text) == parse(text).layers


@pytest.mark.parametrize("text", ["*-[*-*-]x2-", "*-[-*-]x2*-", "-[-]x3-"])
def test_parts_that_begin_with_an_mlp(text):
    assert symbols(text) == parse(text).layers


def test_without_a_pattern_a_layer_begins_at_each_attention():
    assert symbols("*-[*-*-]x2-", with_pattern=False) == ("*-", "*-", "*--")
    layers = source_layers(stored("*--*-"), pattern=parse("*-*-"))  # of another model
    assert [len(layer) for layer in layers.layers] == [3, 2]
