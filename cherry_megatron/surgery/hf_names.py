"""Which tensors a model has here and in the form of Hugging Face, and how the ones become the others.

The tables are the whole of it: a name of a sublayer's tensor here -> its name there, and how it is cut. A form is
`llama`, which transformers and other programs know, or `cherry`, whose code lies beside the weights
(cherry_megatron/huggingface); there tensors are what they are here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cherry_megatron.model.pattern import AHEAD, ATTENTION, MLP, MOE
from cherry_megatron.storage.layers import (
    DEPTHS,
    EMBEDDING,
    EXPERT_FC1,
    EXPERT_FC2,
    EXPERT_NORM,
    FC1,
    FC2,
    FINAL_NORM,
    HEAD,
    JOIN,
    LINEARS,
    LOOP_A,
    LOOP_B,
    LOOP_SCALES,
    PROJ,
    QKV,
    ROLES,
    ROUTER,
    inner_prefix,
    sublayer_prefixes,
)
from cherry_megatron.surgery.assemble import expert_prefix
from cherry_megatron.surgery.cuts import Cut, Halves, Heads, Padded, Size, Whole

if TYPE_CHECKING:
    from cherry_megatron.surgery.hf_form import Form

TOP = {EMBEDDING: "model.embed_tokens.weight", FINAL_NORM: "model.norm.weight", HEAD: "lm_head.weight"}
DEPTH = {
    "enorm.weight": "token_norm.weight", "hnorm.weight": "state_norm.weight", JOIN: "join.weight",
    "final_layernorm.weight": "norm.weight",
}  # fmt: skip
MIXTURE_ROUTER = ("embedding", "inner", "outer", "centre")
CHERRY = {
    ATTENTION: {
        f"{QKV}.layer_norm_weight": "norm.weight",
        f"{QKV}.weight": "qkv_proj.weight",
        f"{PROJ}.weight": "o_proj.weight",
        f"{QKV}.layer_norm_loop_scale": "norm.loop_scale",
        "self_attn_bda.loop_scale": "output_scale",
        f"{QKV}.{LOOP_A}": "qkv_loops.a",
        f"{QKV}.{LOOP_B}": "qkv_loops.b",
        f"{PROJ}.{LOOP_A}": "o_loops.a",
        f"{PROJ}.{LOOP_B}": "o_loops.b",
    },
    MLP: {
        f"{FC1}.layer_norm_weight": "norm.weight",
        f"{FC1}.weight": "up_proj.weight",
        f"{FC2}.weight": "down_proj.weight",
        f"{FC1}.layer_norm_loop_scale": "norm.loop_scale",
        "mlp_bda.loop_scale": "output_scale",
        f"{FC1}.{LOOP_A}": "up_loops.a",
        f"{FC1}.{LOOP_B}": "up_loops.b",
        f"{FC2}.{LOOP_A}": "down_loops.a",
        f"{FC2}.{LOOP_B}": "down_loops.b",
    },
    MOE: {
        f"{EXPERT_NORM}.weight": "norm.weight",
        ROUTER: "router",
        f"{EXPERT_FC1}.weight": "up_proj",
        f"{EXPERT_FC2}.weight": "down_proj",
        f"{EXPERT_NORM}.loop_scale": "norm.loop_scale",
        "mlp_bda.loop_scale": "output_scale",
    },
}
LLAMA = {
    ATTENTION: {
        f"{QKV}.layer_norm_weight": ("input_layernorm.weight",),
        f"{QKV}.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        f"{PROJ}.weight": ("self_attn.o_proj.weight",),
    },
    MLP: {
        f"{FC1}.layer_norm_weight": ("post_attention_layernorm.weight",),
        f"{FC1}.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        f"{FC2}.weight": ("mlp.down_proj.weight",),
    },
}


@dataclass(frozen=True)
class Row:
    """One tensor of ours.

    Attributes:
        ours: its name.
        shape: its shape.
        theirs: the names of what it becomes.
        cut: how.
        group: tensors of one group are converted together.
    """

    ours: str
    shape: Size
    theirs: tuple[str, ...]
    cut: Cut
    group: str


def rows(form: "Form") -> list[Row]:
    """All tensors of a model."""
    if form.moee is None:
        return list(_model(form, "", ""))
    found = [row for e in range(form.moee.experts) for row in _model(form, expert_prefix(e), expert_prefix(e))]
    shapes: dict[str, Size] = {name: shape for name, (shape, _) in form.moee.router(form.shape.vocabulary).items()}
    shapes["centre"] = (form.moee.experts,)
    names = [f"router.{name}" for name in MIXTURE_ROUTER]
    return found + [Row(n, shapes[n[7:]], (n,), Whole(), "router") for n in names]


def _model(form: "Form", ours: str, theirs: str) -> Iterator[Row]:
    """The tensors of one model, whose names begin so."""
    hidden, vocabulary = form.shape.hidden, form.shape.vocabulary
    words = Padded(form.words)
    yield Row(ours + EMBEDDING, (vocabulary, hidden), (theirs + TOP[EMBEDDING],), words, ours + EMBEDDING)
    pattern = form.recurrence.parsed
    core = range(len(pattern.prelude), len(pattern.prelude) + len(pattern.core))
    for layer, sublayers in enumerate(sublayer_prefixes(pattern)):
        for place, (symbol, prefix) in enumerate(sublayers):
            if form.kind == "llama":
                yield from _llama(form, symbol, ours + prefix, f"{theirs}model.layers.{layer}.")
            else:
                there = f"{theirs}model.layers.{layer}.sublayers.{place}."
                yield from _cherry(form, symbol, ours + prefix, there, layer in core)
    yield Row(ours + FINAL_NORM, (hidden,), (theirs + TOP[FINAL_NORM],), Whole(), ours + FINAL_NORM)
    if not form.shape.tied:
        yield Row(ours + HEAD, (vocabulary, hidden), (theirs + TOP[HEAD],), words, ours + HEAD)
    for depth in range(form.depths):
        start, there = f"{ours}{DEPTHS}{depth}.", f"{theirs}mtp.{depth}."
        for role, name in DEPTH.items():
            yield Row(
                start + role, (hidden, 2 * hidden) if role == JOIN else (hidden,), (there + name,), Whole(), start
            )
        for place, symbol in enumerate(AHEAD):
            yield from _cherry(form, symbol, start + inner_prefix(place), f"{there}layer.sublayers.{place}.", False)


def _llama(form: "Form", symbol: str, ours: str, theirs: str) -> Iterator[Row]:
    shape, shapes = form.shape, role_shapes(form, symbol, False)
    cuts: dict[str, Cut] = {
        f"{QKV}.weight": Heads(shape.heads, shape.groups, shape.head_size), f"{FC1}.weight": Halves(),
    }  # fmt: skip
    for role, names in LLAMA[symbol].items():
        there = tuple(theirs + name for name in names)
        yield Row(ours + role, shapes[role], there, cuts.get(role, Whole()), ours)


def _cherry(form: "Form", symbol: str, ours: str, theirs: str, looped: bool) -> Iterator[Row]:
    for role, shape in role_shapes(form, symbol, looped).items():
        # Vectors of all loops are one here, a row each there.
        cut = Whole((form.recurrence.parsed.loops, form.shape.hidden) if role in LOOP_SCALES[symbol] else None)
        yield Row(ours + role, shape, (theirs + CHERRY[symbol][role],), cut, ours)


def role_shapes(form: "Form", symbol: str, looped: bool) -> dict[str, Size]:
    """What a sublayer holds.

    Args:
        form: the model.
        symbol: of the sublayer.
        looped: whether it is of the core.
    """
    shape, recurrence = form.shape, form.recurrence
    hidden, loops = shape.hidden, recurrence.parsed.loops
    gate = 2 if shape.gated else 1
    found: dict[str, Size] = {ROLES[symbol][0]: (hidden,)}
    if symbol == MOE:
        routers = (loops,) if looped and recurrence.loop_routers and loops > 1 else ()
        found[ROUTER] = (*routers, shape.experts, hidden)
        found[f"{EXPERT_FC1}.weight"] = (shape.experts, gate * shape.expert_ffn, hidden)
        found[f"{EXPERT_FC2}.weight"] = (shape.experts, hidden, shape.expert_ffn)
    for linear, (inputs, outputs) in zip(LINEARS[symbol], shape.linears(symbol), strict=False):
        found[f"{linear}.weight"] = (outputs, inputs)
        if looped and recurrence.loop_rank:
            parts = gate if linear == FC1 else 1
            found[f"{linear}.{LOOP_A}"] = (loops, recurrence.loop_rank, inputs)
            found[f"{linear}.{LOOP_B}"] = (loops, parts, outputs // parts, recurrence.loop_rank)
    if looped and recurrence.loop_scales:
        found |= dict.fromkeys(LOOP_SCALES[symbol], (loops * hidden,))
    return found
