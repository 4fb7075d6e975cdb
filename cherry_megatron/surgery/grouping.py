"""Which source layers each compressed layer is made from, and with what weights::

    adjacent                the paper's: equal runs of neighbours, 48 -> 6 as 0-7, 8-15, ...
    slots                   by the loop order: a core layer takes the source layers that its unrolled
                            slots stand in for, so that in `cycle` order it takes every fourth
    0-7,8-36/4,...          written out: a group a compressed layer, in order; a-b is a run, a-b/n every
                            n-th of it, + joins, as in 0-3+6

Layers are counted from 0.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from cherry_megatron.errors import CherryError
from cherry_megatron.model.options import Recurrence
from cherry_megatron.model.pattern import Visit, unroll

Method = Literal["average", "weighted", "select", "random"]
METHODS = get_args(Method)


@dataclass(frozen=True)
class Mix:
    """What one compressed layer is made of.

    Attributes:
        members: the source layers that it is the mean of.
        weights: one for each; their sum is not one.
        group: all source layers that it stands in for, in the order of its loops.
    """

    members: tuple[int, ...]
    weights: tuple[float, ...]
    group: tuple[int, ...]


def make_groups(text: str, layers: int, recurrence: Recurrence) -> list[tuple[int, ...]]:
    """The source layers of each compressed layer.

    Args:
        text: as in the module's description.
        layers: of the source.
        recurrence: the compressed model.

    Raises:
        CherryError: if there are too few layers, or the groups are not as many as the compressed layers.
    """
    wanted = len(recurrence.parsed.layers)
    if layers < wanted:
        raise CherryError(
            f"recurrence.pattern {recurrence.pattern} has {wanted} layers, and the source only {layers}; use "
            "no more"
        )
    if text == "adjacent":
        return _even(range(layers), wanted)
    if text == "slots":
        return slot_groups(layers, recurrence, *slot_window(layers, recurrence))
    groups = [_parse(part, layers, text) for part in text.split(",")]
    if len(groups) != wanted:
        raise CherryError(f"--groups {text!r} names {len(groups)} groups; recurrence.pattern has {wanted} layers")
    return groups


def _even(layers: Sequence[int], groups: int) -> list[tuple[int, ...]]:
    """Runs of neighbours whose lengths differ by one at most, the longer ones first."""
    short, longer = divmod(len(layers), groups)
    ends = [group * short + min(group, longer) for group in range(groups + 1)]
    return [tuple(layers[a:b]) for a, b in pairwise(ends)]


def slot_window(layers: int, recurrence: Recurrence) -> tuple[int, int]:
    """The source layers, from the first to before the last, that the core's slots divide: as many a slot."""
    pattern = recurrence.parsed
    before, after = len(pattern.prelude), len(pattern.coda)
    outside = before + after
    if not outside:
        return 0, layers
    slots = len(_walked(recurrence))
    inside = (layers - outside) // slots * slots or layers - outside
    first = round((layers - inside) * before / outside)
    return first, first + inside


def slot_groups(
    layers: int, recurrence: Recurrence, begin: int, end: int, share: bool = True
) -> list[tuple[int, ...]]:
    """Divide source layers from `begin` to before `end` over the core's slots, the rest over prelude and coda.

    Args:
        layers: of the source.
        recurrence: the compressed model.
        begin, end: the window, see `slot_window`.
        share: where there are fewer layers than slots, a slot takes one of its neighbour's instead of none.
    """
    pattern = recurrence.parsed
    before, after = len(pattern.prelude), len(pattern.coda)
    walked, middle = _walked(recurrence), range(begin, end)
    groups: dict[int, list[int]] = {layer: [] for layer in range(before, before + len(pattern.core))}
    for slot, visit in enumerate(walked):
        run = range(slot * len(middle) // len(walked), (slot + 1) * len(middle) // len(walked))
        if share and not run:
            run = range(run.start, run.start + 1)
        groups[visit.layer] += [middle[k] for k in run]
    core = [tuple(sorted(set(group))) for group in groups.values()]
    return [
        *(_even(range(begin), before) if before else []),
        *core,
        *(_even(range(end, layers), after) if after else []),
    ]


def _walked(recurrence: Recurrence) -> list[Visit]:
    """The core's slots."""
    pattern = recurrence.parsed
    return [visit for visit in unroll(pattern, pattern.loops, recurrence.order) if visit.loop is not None]


def groups_text(groups: Sequence[tuple[int, ...]]) -> str:
    """Groups as `make_groups` reads them."""
    return ",".join("+".join(_pieces(group)) for group in groups)


def _pieces(group: tuple[int, ...]) -> Iterator[str]:
    """Runs of neighbours, of three or more every n-th, and what is left one by one."""
    start = 0
    while start < len(group):
        rest = group[start:]
        step = rest[1] - rest[0] if len(rest) > 1 else 0
        length = next((k for k in range(1, len(rest)) if rest[k] - rest[k - 1] != step), len(rest))
        if step == 1:
            yield f"{rest[0]}-{rest[length - 1]}"
        elif step > 1 and length > 2:
            yield f"{rest[0]}-{rest[length - 1]}/{step}"
        else:
            yield str(rest[0])
            length = 1
        start += length


def _parse(part: str, layers: int, whole: str) -> tuple[int, ...]:
    members: list[int] = []
    for piece in part.split("+"):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+)(?:/(\d+))?)?\s*", piece)
        if found is None:
            raise CherryError(
                f"--groups {whole!r}: {piece.strip()!r} is no run of layers; write e.g. 0-7,8-15 or 8-36/4, "
                "or adjacent or slots"
            )
        first, last, step = int(found[1]), int(found[2] or found[1]), int(found[3] or 1)
        if step < 1 or last < first or last >= layers:
            raise CherryError(f"--groups {whole!r}: {piece.strip()!r} is not within the layers 0-{layers - 1}")
        members += range(first, last + 1, step)
    twice = next((layer for layer in members if members.count(layer) > 1), None)
    if twice is not None:
        raise CherryError(
            f"--groups {whole!r}: {part.strip()!r} names layer {twice} twice; name it once (weights are given by "
            "--method weighted)"
        )
    return tuple(members)


def mix(
    groups: Sequence[tuple[int, ...]], method: Method, weights: Sequence[float] = (), keep: int | None = None
) -> list[Mix]:
    """What each compressed layer is made of.

    Args:
        groups: from `make_groups`.
        method: `average`; `weighted` by `weights`, of which there are as many as a group has members;
            `select` keeps member `keep` of each group, by default the middle one; `random` takes nothing
            of the members but their shape.

    Raises:
        CherryError: if weights or keep do not fit.
    """
    if method in ("average", "random"):
        return [Mix(group, (1.0,) * len(group), group) for group in groups]
    if method == "select":
        for group in groups:
            if keep is not None and not 0 <= keep < len(group):
                raise CherryError(f"--keep {keep}: a group has {len(group)} layers, counted from 0")
        return [Mix((group[len(group) // 2 if keep is None else keep],), (1.0,), group) for group in groups]
    if not weights or any(not 0 <= weight < float("inf") for weight in weights) or not sum(weights):
        raise CherryError(
            "--method weighted needs --weights, e.g. 1,2,2,1: one number a layer of a group, none negative"
        )
    for group in groups:
        if len(group) != len(weights):
            raise CherryError(f"--weights names {len(weights)} weights, but a group has {len(group)} layers")
    return [Mix(group, tuple(map(float, weights)), group) for group in groups]
