"""Each tensor of ours is in the form of Hugging Face where it belongs, by what transformers' own models have."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from cherry_megatron.huggingface.configuration_cherry import CherryConfig
from cherry_megatron.huggingface.modeling_cherry import CherryForCausalLM
from cherry_megatron.huggingface.modeling_cherry_mixture import CherryMixtureConfig, CherryMixtureForCausalLM
from cherry_megatron.model.options import Mixture, Recurrence
from cherry_megatron.model.pattern import parse
from cherry_megatron.model.shape import Shape
from cherry_megatron.surgery.cuts import Halves, Heads, Padded, Whole
from cherry_megatron.surgery.hf_form import Form, config_json, written
from cherry_megatron.surgery.hf_names import rows

SHAPE = Shape(hidden=24, ffn=20, heads=6, groups=2, head_size=4, vocabulary=40)
EXPERTS = replace(SHAPE, experts=4, top_k=2, expert_ffn=12)


def form(pattern, shape=SHAPE, **more):
    of_recurrence = {"order", "loop_scales", "loop_rank", "loop_routers", "injection"}
    recurrence = Recurrence(pattern, **{key: more.pop(key) for key in of_recurrence & more.keys()})
    return Form(recurrence, shape, words=40, longest=16, rotary_base=10000, epsilon=1e-5, **more)


FORMS = {
    "llama": form("(*-)x3"),
    "llama-tied": form("(*-)x3", replace(SHAPE, tied=True)),
    "all": form("*-[*-*--]x4*-", loop_scales=True, loop_rank=3, injection="add", depths=2),
    "plain": form("*-[*-]x2", replace(SHAPE, gated=False, tied=True), loop_rank=2, activation="gelu"),
    "experts": form("*-[*E*-]x3*E", EXPERTS, loop_routers=True, loop_scales=True),
    "mixture": form("*-[*-]x2*-", moee=Mixture(3, 2, 4, 8), depths=1),
}


@pytest.mark.parametrize("name", FORMS)
def test_names_and_shapes_are_those_of_the_model(name):
    model = FORMS[name]
    settings = config_json(model, "float32", {"eos": 0})
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM), "cherry": (CherryConfig, CherryForCausalLM),
        "cherry_mixture": (CherryMixtureConfig, CherryMixtureForCausalLM),
    }  # fmt: skip
    config, built = classes[model.kind]
    made = built(config(**settings))
    tied = {"lm_head.weight"} if model.shape.tied else set()
    expected = {n: tuple(t.shape) for n, t in made.state_dict().items() if n not in tied}
    found = {
        name: shape
        for row in rows(model)
        for name, shape in zip(row.theirs, row.cut.shapes(row.shape), strict=True)
    }  # fmt: skip
    assert found == expected
    assert len({row.ours for row in rows(model)}) == len(rows(model))


def test_queries_keys_and_values_are_told_apart():
    """Each row is numbered by head and kind: Megatron's order is that of its own split."""
    heads, groups, size, hidden = 6, 2, 4, 3
    whole = np.arange((heads + 2 * groups) * size * hidden).reshape(-1, hidden)
    grouped = torch.tensor(whole).view(groups, (heads // groups + 2) * size, hidden)
    query, key, value = torch.split(grouped, [heads // groups * size, size, size], 1)  # as Megatron's attention
    cut = Heads(heads, groups, size)
    for found, wanted in zip(cut.split(whole), (query, key, value), strict=True):
        assert np.array_equal(found, wanted.reshape(-1, hidden).numpy())


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_what_is_cut_is_joined_again(groups, per, size, seed):
    draw = np.random.default_rng(seed)
    for cut, shape in (
        (Heads(groups * per, groups, size), (groups * (per + 2) * size, 3)),
        (Halves(), (2 * per, 3)),
        (Whole((groups, per)), (groups * per,)),
        (Padded(per), (per, 2)),
    ):
        whole = draw.normal(size=shape)
        parts = cut.split(whole)
        assert [part.shape for part in parts] == cut.shapes(shape)
        assert sum(part.size for part in parts) == whole.size
        assert np.array_equal(cut.join(parts, shape), whole)


def test_rows_of_padding_are_zeros():
    found = Padded(3).join([np.ones((3, 2), np.float32)], (5, 2))
    assert found.tolist() == [[1, 1]] * 3 + [[0, 0]] * 2


@pytest.mark.parametrize("text", ["(*-)x48", "*-[(*-)x4]x8*-", "*--[*-*E]x2*", "[*-]x3", "*-[*-]x1*-", "*-", "-*-"])
def test_patterns_are_written_as_they_are_read(text):
    assert parse(written(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (form("*-[*-]x2"), "cherry"),
        (form("*-*--"), "cherry"),
        (form("*-*-", depths=1), "cherry"),
        (form("*-*-", loop_scales=True), "cherry"),
        (form("*-*-", replace(SHAPE, gated=False), activation="gelu"), "cherry"),
        (form("*-*-", replace(SHAPE, heads=5, groups=5)), "cherry"),  # LlamaConfig wants a multiple
        (form("*-[*-]x1*-", injection="add"), "llama"),
    ],
)
def test_the_plainest_form_is_taken(other, kind):
    assert other.kind == kind
