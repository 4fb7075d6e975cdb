"""The layers of a checkpoint by their names, and the names of a model's tensors.

Source checkpoints may come from this project, from Megatron's HybridModel (a number a sublayer) or from its
GPTModel (a number a layer, or all layers stacked in one tensor).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from cherry_megatron.errors import CherryError
from cherry_megatron.model.pattern import AHEAD, ATTENTION, MLP, MOE, Pattern
from cherry_megatron.storage.checkpoint import Checkpoint

EMBEDDING, FINAL_NORM, HEAD = "embedding.word_embeddings.weight", "decoder.final_norm.weight", "output_layer.weight"
QKV, PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
FC1, FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
# A sublayer of experts: its norm, its router, and the experts' linear layers, each one tensor of all experts.
EXPERT_NORM, ROUTER = "pre_mlp_layernorm", "mlp.router.weight"
EXPERT_FC1, EXPERT_FC2 = "mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"
# What a sublayer holds, its norm first, and the modules whose (empty) extra state Megatron looks for.
ROLES = {
    ATTENTION: (f"{QKV}.layer_norm_weight", f"{QKV}.weight", f"{PROJ}.weight"),
    MLP: (f"{FC1}.layer_norm_weight", f"{FC1}.weight", f"{FC2}.weight"),
    MOE: (f"{EXPERT_NORM}.weight", ROUTER, f"{EXPERT_FC1}.weight", f"{EXPERT_FC2}.weight"),
}
EXTRA_STATES = {
    ATTENTION: (QKV, PROJ, "self_attention.core_attention"), MLP: (FC1, FC2), MOE: (EXPERT_FC1, EXPERT_FC2),
}  # fmt: skip
# The per-loop vectors of a core layer: on the norm's weight, on the output.
LOOP_SCALES = {
    ATTENTION: (f"{QKV}.layer_norm_loop_scale", "self_attn_bda.loop_scale"),
    MLP: (f"{FC1}.layer_norm_loop_scale", "mlp_bda.loop_scale"),
    MOE: (f"{EXPERT_NORM}.loop_scale", "mlp_bda.loop_scale"),
}
# The linear layers that have low-rank corrections, and the factors of these.
LINEARS: dict[str, tuple[str, ...]] = {ATTENTION: (QKV, PROJ), MLP: (FC1, FC2), MOE: ()}
LOOP_A, LOOP_B = "loop_a", "loop_b"
# All that a core layer has of each loop.
LOOPED = {
    symbol: (*scales, *(f"{linear}.{factor}" for linear in LINEARS[symbol] for factor in (LOOP_A, LOOP_B)))
    for symbol, scales in LOOP_SCALES.items()
}
# What a depth of multi-token prediction holds.
DEPTHS = "mtp.layers."
_DEPTH = re.compile(rf"{re.escape(DEPTHS)}(\d+)\.(.+)")
JOIN, DEPTH_NORMS = "eh_proj.weight", ("enorm.weight", "hnorm.weight", "final_layernorm.weight")


def inner_prefix(place: int) -> str:
    """What the names of a depth's sublayer begin with, behind the depth's own beginning."""
    return f"mtp_model_layer.layers.{place}."


_DEPTH_ROLES = (
    JOIN,
    *DEPTH_NORMS,
    *(inner_prefix(k) + role for k, symbol in enumerate(AHEAD) for role in ROLES[symbol]),
)
DEPTH_EXTRA_STATES = (
    JOIN.removesuffix(".weight"),
    *(inner_prefix(k) + module for k, symbol in enumerate(AHEAD) for module in EXTRA_STATES[symbol]),
)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_OTHER_NAMES = {
    "input_layernorm.weight": f"{QKV}.layer_norm_weight",
    "pre_mlp_layernorm.weight": f"{FC1}.layer_norm_weight",
}


@dataclass(frozen=True)
class Sublayer:
    """One attention, MLP or mixture of experts: its symbol and, by role, the names of its tensors."""

    symbol: str
    names: dict[str, str]


@dataclass(frozen=True)
class Source:
    """The layers of a checkpoint; each is its sublayers, and for `top` the name of each top-level tensor."""

    layers: tuple[tuple[Sublayer, ...], ...]
    top: dict[str, str]

    @property
    def depths(self) -> int:
        """Of multi-token prediction, whose tensors are top-level ones too."""
        return len({found[1] for name in self.top if (found := _DEPTH.fullmatch(name))})


def sublayer_prefixes(pattern: Pattern) -> list[list[tuple[str, str]]]:
    """For each stored layer the symbols of its sublayers and the prefixes of their tensors."""
    found = []
    for layer, symbols in enumerate(pattern.layers):
        first = pattern.first_symbol(layer)
        found.append([(symbol, f"decoder.layers.{first + k}.") for k, symbol in enumerate(symbols)])
    return found


def source_layers(
    checkpoint: Checkpoint, looped: bool = False, experts: bool = False, pattern: Pattern | None = None
) -> Source:
    """Find a checkpoint's layers.

    Args:
        checkpoint: it.
        looped: whether parameters of each loop may be there.
        experts: whether experts inside layers may be there.
        pattern: how the sublayers make layers, if they are its: a part of it may begin with an MLP. Otherwise a
            layer begins at each attention.

    Raises:
        CherryError: on a missing or an unknown tensor, by its name.
    """
    found = {name: match for name in checkpoint.model if (match := _LAYER.fullmatch(name))}
    inside = {match[1]: name for name, match in found.items() if match[2].startswith((EXPERT_FC1, ROUTER))}
    if inside and not experts:
        name = next(iter(inside.values()))
        raise CherryError(f"{checkpoint.folder} has experts inside layers ({name}); name a model without")
    numbered: dict[int, dict[str, dict[str, str]]] = {}
    for name, (number, rest) in ((name, match.groups()) for name, match in found.items()):
        feed_forward = MOE if number in inside else MLP
        role = rest if feed_forward == MOE else _OTHER_NAMES.get(rest, rest)
        symbol = _symbol(checkpoint, role, name, feed_forward, looped)
        numbered.setdefault(int(number), {}).setdefault(symbol, {})[role] = name
    others = [name for name in checkpoint.model if name not in found]
    top = {FINAL_NORM if name == "decoder.final_layernorm.weight" else name: name for name in others}
    _check_top(checkpoint, top)
    missing = sorted(set(range(len(numbered))) - set(numbered))
    if missing or not numbered:
        raise CherryError(f"{checkpoint.folder}: the layer {missing[0] if missing else 0} is missing")
    sublayers = [
        Sublayer(symbol, numbered[k][symbol]) for k in sorted(numbered) for symbol in sorted(numbered[k])
    ]  # "*" sorts before "-"
    for sublayer in sublayers:
        for role in ROLES[sublayer.symbol]:
            if role not in sublayer.names:
                raise CherryError(
                    f"{checkpoint.folder}: the tensor {role} is missing from a layer that has "
                    f"{sorted(sublayer.names)}"
                )
    return Source(tuple(_group(sublayers, pattern)), top)


def _symbol(checkpoint: Checkpoint, role: str, name: str, feed_forward: str, looped: bool) -> str:
    """Of which kind of sublayer a tensor is: attention, or what follows it."""
    for symbol in (ATTENTION, feed_forward):
        if role in ROLES[symbol]:
            return symbol
        if role in LOOPED[symbol]:
            if looped:
                return symbol
            raise CherryError(f"{checkpoint.folder} is a recurrent model already ({name}); name one without loops")
    raise CherryError(f"{checkpoint.folder}: the tensor {name} is not one of attention or MLP without biases")


def _check_top(checkpoint: Checkpoint, top: dict[str, str]) -> None:
    for name in (EMBEDDING, FINAL_NORM):
        if name not in top:
            raise CherryError(f"{checkpoint.folder}: the tensor {name} is missing")
    depths = {name: found for name in top if (found := _DEPTH.fullmatch(name))}
    numbers = sorted({int(found[1]) for found in depths.values()})
    for number, role in ((number, role) for number in range(len(numbers)) for role in _DEPTH_ROLES):
        if f"{DEPTHS}{number}.{role}" not in top:
            raise CherryError(f"{checkpoint.folder}: the tensor {DEPTHS}{number}.{role} is missing")
    known = {name for name, found in depths.items() if found[2] in _DEPTH_ROLES}
    for name in top.keys() - {EMBEDDING, FINAL_NORM, HEAD} - known:
        raise CherryError(f"{checkpoint.folder}: the tensor {name} is not known")


def _group(sublayers: list[Sublayer], pattern: Pattern | None) -> Iterator[tuple[Sublayer, ...]]:
    """The layers of a pattern of these sublayers, or else each attention with the MLPs behind it."""
    if pattern is not None and pattern.symbols == "".join(sublayer.symbol for sublayer in sublayers):
        rest = iter(sublayers)
        yield from (tuple(islice(rest, len(symbols))) for symbols in pattern.layers)
        return
    layer: list[Sublayer] = []
    for sublayer in sublayers:
        if sublayer.symbol == ATTENTION and layer:
            yield tuple(layer)
            layer = []
        layer.append(sublayer)
    yield tuple(layer)


def member(source: Checkpoint, layers: Source, number: int, place: int, symbols: str) -> dict[str, str]:
    """The names of a source sublayer's tensors by role.

    Args:
        source: the checkpoint.
        layers: its layers.
        number: of the layer.
        place: of the sublayer in it.
        symbols: what the layer should be.

    Raises:
        CherryError: if it is another.
    """
    sublayers: tuple[Sublayer, ...] = layers.layers[number]
    kinds = "".join(sublayer.symbol for sublayer in sublayers)
    if kinds != symbols:
        raise CherryError(f"{source.folder}: layer {number} is {kinds!r}, but recurrence.pattern wants {symbols!r}")
    return sublayers[place].names
