"""Whether a checkpoint is one of the model that a configuration describes.

Whatever does not fit would otherwise be noticed when training starts, or never: other heads of the same sizes, a
layer too few, another order of the loops.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from cherry_megatron.errors import CherryError
from cherry_megatron.model.options import Recurrence
from cherry_megatron.model.pattern import ATTENTION, MLP, MOE
from cherry_megatron.model.shape import heads_of
from cherry_megatron.storage.checkpoint import Checkpoint
from cherry_megatron.storage.layers import (
    EMBEDDING,
    EXPERT_FC1,
    EXPERT_FC2,
    FC1,
    FC2,
    FINAL_NORM,
    HEAD,
    LOOP_A,
    LOOP_B,
    LOOP_SCALES,
    LOOPED,
    PROJ,
    QKV,
    ROLES,
    ROUTER,
    Source,
    member,
    source_layers,
)
from cherry_megatron.storage.trained import WALK, check_heads, check_trained, recorded_recurrence


def check_model(
    source: Checkpoint,
    recurrence: Recurrence,
    config: Path,
    megatron: dict[str, Any],
    walk: Collection[str] = WALK,
    changed: Collection[str] | None = None,
) -> Source:
    """A checkpoint is one of the model that a configuration describes.

    Args:
        source: the checkpoint.
        recurrence: of the configuration.
        config: its file, for messages.
        megatron: its `megatron` section by flags.
        walk, changed: what must be as it was trained, see `check_trained`.

    Returns:
        Its layers.

    Raises:
        CherryError: naming the first that differs.
    """
    pattern = recurrence.parsed
    layers = source_layers(source, looped=True, experts=MOE in pattern.symbols, pattern=pattern)
    check_fit(source, layers, config, megatron)
    check_layers(source, layers, recurrence, config)
    check_trained(source, recurrence, config, megatron, walk, changed)
    return layers


def check_fit(source: Checkpoint, layers: Source, config: Path, megatron: dict[str, Any]) -> None:
    """A checkpoint's layers are whole, and of the sizes and the type of a configuration.

    Args:
        source: the checkpoint.
        layers: its layers.
        config: the configuration's file, for messages.
        megatron: its `megatron` section by flags.

    Raises:
        CherryError: naming the first that differs.
    """
    _check_count(source, layers)
    _check_configured(source, layers, config, megatron)
    _check_shapes(source, layers)


def _check_count(source: Checkpoint, layers: Source) -> None:
    """As many layers as the training that saved it had."""
    arguments, sublayers = source.arguments(), sum(map(len, layers.layers))
    pattern, said = arguments.get("hybrid_layer_pattern"), arguments.get("num_layers")
    counts = {sublayers}
    if isinstance(pattern, str):
        if "|" not in pattern:  # which parts stages, and layers that these share stand in each
            said = len(pattern.split("/")[0])
    else:  # a GPTModel counts layers
        counts.add(len(layers.layers))
    if said is not None and said not in counts:
        raise CherryError(
            f"{source.folder} holds {len(layers.layers)} layers ({sublayers} sublayers), but was saved by a "
            f"training of {said}; restore the checkpoint"
        )


def _check_configured(source: Checkpoint, layers: Source, config: Path, megatron: dict[str, Any]) -> None:
    """The sizes that a configuration names."""
    vocabulary, hidden = source.tensors[layers.top[EMBEDDING]].shape
    found = [("padded-vocab-size", vocabulary), ("hidden-size", hidden)]
    names = first_names(layers)
    if f"{FC2}.weight" in names:
        found.append(("ffn-hidden-size", _check_gate(source, names, FC1, FC2, config, megatron)))
    if f"{EXPERT_FC2}.weight" in names:
        own = "moe-ffn-hidden-size" if megatron.get("moe-ffn-hidden-size") is not None else "ffn-hidden-size"
        found.append((own, _check_gate(source, names, EXPERT_FC1, EXPERT_FC2, config, megatron)))
        found.append(("num-experts", source.tensors[names[f"{EXPERT_FC1}.weight"]].shape[0]))
    if "num-attention-heads" in megatron and f"{QKV}.weight" in names:
        _check_heads(source, names, config, megatron, hidden)
    for key, value in found:
        if megatron.get(key, value) != value:
            raise CherryError(
                f"{config}: megatron.{key} is {megatron[key]}, but {source.folder} has {value}; set it so"
            )
    untied = bool(megatron.get("untie-embeddings-and-output-weights"))
    if untied != (HEAD in layers.top):
        raise CherryError(
            f"{config}: megatron.untie-embeddings-and-output-weights is {untied}, but {source.folder} holds "
            f"{'no' if untied else 'a'} {HEAD}; set it to {str(not untied).lower()}"
        )


def _check_gate(
    source: Checkpoint, names: dict[str, str], first: str, second: str, config: Path, megatron: dict[str, Any]
) -> int:
    """A feed-forward sublayer's first linear layer has a gate if the configuration says so; gives its neurons."""
    rows = source.tensors[names[f"{first}.weight"]].shape[-2]
    neurons: int = source.tensors[names[f"{second}.weight"]].shape[-1]
    if rows != neurons * (2 if megatron.get("swiglu") else 1):
        raise CherryError(
            f"{config}: megatron.swiglu is {bool(megatron.get('swiglu'))}, but "
            f"{names[f'{first}.weight']} in {source.folder} has {rows} rows for {neurons} neurons "
            "(with a gate it takes two each); set it so"
        )
    return neurons


def _check_heads(
    source: Checkpoint, names: dict[str, str], config: Path, megatron: dict[str, Any], hidden: int
) -> None:
    """Heads of half the size in twice the number make tensors of the same shape."""
    heads, groups, size = heads_of(config, megatron, hidden)
    rows = source.tensors[names[f"{QKV}.weight"]].shape[0]
    if rows != (heads + 2 * groups) * size:
        raise CherryError(
            f"{config}: {heads} heads and {groups} query groups of {size} do not make the {rows} rows of "
            f"{names[f'{QKV}.weight']} in {source.folder}"
        )
    columns = source.tensors[names[f"{PROJ}.weight"]].shape[1]
    if columns != heads * size:
        raise CherryError(
            f"{config}: {heads} heads of {size} do not make the {columns} columns of {names[f'{PROJ}.weight']} "
            f"in {source.folder}"
        )
    check_heads(source, config, heads, groups, size)


def first_names(layers: Source) -> dict[str, str]:
    """The names of the tensors of the first sublayer of each kind, by role."""
    found: dict[str, str] = {}
    for symbol in (ATTENTION, MLP, MOE):
        found |= next((s.names for layer in layers.layers for s in layer if s.symbol == symbol), {})
    return found


def _check_shapes(source: Checkpoint, layers: Source) -> None:
    """Every layer is as large as the first, what is around them fits, and all is of one type."""
    embedding = source.tensors[layers.top[EMBEDDING]]
    first, hidden = first_names(layers), embedding.shape[1]
    wanted: dict[str, tuple[int, ...]] = {
        role: source.tensors[name].shape for role, name in first.items() if role not in _OF_LOOPS
    }
    for first_linear, second_linear in ((QKV, PROJ), (FC1, FC2), (EXPERT_FC1, EXPERT_FC2)):
        weight, after = f"{first_linear}.weight", f"{second_linear}.weight"
        if weight in wanted:
            *experts, rows, _ = wanted[weight]
            wanted |= {weight: (*experts, rows, hidden), after: (*experts, hidden, wanted[after][-1])}
    wanted |= {roles[0]: (hidden,) for roles in ROLES.values()}
    expected: dict[str, tuple[int, ...]] = {layers.top[FINAL_NORM]: (hidden,)}
    if HEAD in layers.top:
        expected[layers.top[HEAD]] = embedding.shape
    for sublayer in (sublayer for layer in layers.layers for sublayer in layer):
        expected |= {name: wanted[role] for role, name in sublayer.names.items() if role in wanted}
    for name, shape in expected.items():
        found = source.tensors[name]
        if found.shape != shape:
            raise CherryError(f"{source.folder}: {name} is {list(found.shape)}, not {list(shape)} like the rest")
    for name, found in source.model.items():
        if found.dtype != embedding.dtype:
            raise CherryError(f"{source.folder}: {name} is {found.dtype}, but {embedding.name} {embedding.dtype}")


_OF_LOOPS = {ROUTER, *(role for roles in LOOPED.values() for role in roles)}


def check_layers(source: Checkpoint, layers: Source, recurrence: Recurrence, config: Path) -> None:
    """A checkpoint has the stored layers of a recurrence, and of each loop what the recurrence has.

    Args:
        source: the checkpoint.
        layers: its layers.
        recurrence: of the configuration.
        config: its file, for messages.

    Raises:
        CherryError: if not.
    """
    pattern = recurrence.parsed
    if len(layers.layers) != len(pattern.layers):
        before = recorded_recurrence(source)
        dense = before is not None and before.loops == 1 and len(layers.layers) > len(pattern.layers)
        raise CherryError(
            f"{config}: {source.folder} holds {len(layers.layers)} layers, recurrence.pattern "
            f"{len(pattern.layers)} ({recurrence.pattern}); set the pattern that it was trained with"
            + (", or make a model of fewer layers of it by `cherry compress-depth`" if dense else "")
        )
    core = range(len(pattern.prelude), len(pattern.prelude) + len(pattern.core))
    for layer, symbols in enumerate(pattern.layers):
        for place, symbol in enumerate(symbols):
            names = member(source, layers, layer, place, symbols)
            _check_kinds(source, names, symbol, recurrence, layer in core, config)
            _check_loops(source, names, symbol, recurrence, config)
            if symbol == MOE:
                _check_router(source, names, recurrence, layer in core, config)


def _check_kinds(
    source: Checkpoint, names: dict[str, str], symbol: str, recurrence: Recurrence, in_core: bool, config: Path
) -> None:
    """A sublayer has vectors and corrections of each loop if the recurrence gives it some, and only then."""
    for role in LOOPED[symbol]:
        key = "loop_scales" if role in LOOP_SCALES[symbol] else "loop_rank"
        value = getattr(recurrence, key)
        if (role in names) != (in_core and bool(value)):
            has = f"holds {names[role]}" if role in names else f"has a layer without {role}"
            raise CherryError(
                f"{config}: recurrence.{key} is {value}, but {source.folder} {has}; set recurrence as it was "
                "trained with"
            )


def _check_loops(
    source: Checkpoint, names: dict[str, str], symbol: str, recurrence: Recurrence, config: Path
) -> None:
    """What a layer has of each loop is there for as many loops as the configuration says."""
    hidden = source.tensors[names[ROLES[symbol][0]]].shape[0]
    for role in LOOPED[symbol]:
        if role not in names:
            continue
        shape = source.tensors[names[role]].shape
        found = shape[0] // hidden if role in LOOP_SCALES[symbol] else shape[0]
        if role.endswith(LOOP_A) and shape[1] != recurrence.loop_rank:
            raise CherryError(
                f"{config}: {source.folder}: {names[role]} has rank {shape[1]}, recurrence.loop_rank is "
                f"{recurrence.loop_rank}; name the configuration that it was trained with"
            )
        if found != recurrence.parsed.loops:
            what = "corrections" if role.endswith((LOOP_A, LOOP_B)) else "vectors"
            raise CherryError(
                f"{config}: {source.folder}: {names[role]} has {what} of {found} loops, recurrence.pattern of "
                f"{recurrence.parsed.loops}; name the configuration that it was trained with"
            )


def _check_router(
    source: Checkpoint, names: dict[str, str], recurrence: Recurrence, in_core: bool, config: Path
) -> None:
    """A router has weights of each loop if the recurrence gives it some, and only then."""
    (hidden,) = source.tensors[names[ROLES[MOE][0]]].shape
    experts = source.tensors[names[f"{EXPERT_FC1}.weight"]].shape[0]
    loops = recurrence.parsed.loops if in_core and recurrence.loop_routers else 1
    found, wanted = (
        source.tensors[names[ROUTER]].shape,
        (experts, hidden) if loops == 1 else (loops, experts, hidden),
    )
    if found != wanted:
        raise CherryError(
            f"{config}: {source.folder}: {names[ROUTER]} is {list(found)}, not {list(wanted)} as "
            f"with recurrence.loop_routers {recurrence.loop_routers} and {recurrence.parsed.loops} loops; set "
            "recurrence as it was trained with"
        )
