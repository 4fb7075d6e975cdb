"""The layer pattern language of Megatron's HybridModel, extended by loops, and its unrolling::

    *-[*-*-*-*-]x8*-        one prelude layer, four core layers walked eight times, one coda layer
    *-[(*-)x4]x8*-          the same
    (*-)x48                 48 layers of their own, no loop

`*` is attention, `-` an MLP, `E` a mixture of experts. `( )xN` writes a group out N times as
separate layers; `[ ]xN` is the recurrent core: stored once, walked N times. A *layer* is an
attention symbol with the feed-forward symbols that follow it.

The unrolled order of the core is `cycle` (1234 1234 ...) or `sequence` (1111... 2222...).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cherry_megatron.errors import CherryError

Order = Literal["cycle", "sequence"]
ORDERS = get_args(Order)
ATTENTION, MLP, MOE = "*", "-", "E"
AHEAD = ATTENTION + MLP  # the sublayers of each depth of multi-token prediction
SYMBOLS = {ATTENTION: "attention", MLP: "MLP", MOE: "mixture of experts"}
_GROUP = re.compile(r"\(([^()\[\]]*)\)x(\d+)")
# Effective layers: twice those of the deepest Transformers (Wang et al. 2022, DeepNet, arXiv 2203.00555). Balancing
# stages takes the square of their number: more would seem to hang.
MOST_LAYERS = 2000


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern. Each of the three parts is a tuple of layers such as ("*-", "*-")."""

    prelude: tuple[str, ...]
    core: tuple[str, ...]
    coda: tuple[str, ...]
    loops: int

    @property
    def layers(self) -> tuple[str, ...]:
        """The stored layers, in order."""
        return self.prelude + self.core + self.coda

    def effective(self, loops: int) -> int:
        """How many layers a forward pass walks with so many loops."""
        return len(self.prelude) + loops * len(self.core) + len(self.coda)

    @property
    def symbols(self) -> str:
        """The stored sublayers as one flat Megatron pattern, e.g. `*-*-*-`."""
        return "".join(self.layers)

    def first_symbol(self, layer: int) -> int:
        """Index in `symbols` of the first sublayer of a stored layer."""
        return sum(len(text) for text in self.layers[:layer])


@dataclass(frozen=True)
class Visit:
    """One effective layer: the stored layer `layer`, in loop `loop` if it belongs to the core."""

    layer: int
    loop: int | None


def parse(text: str) -> Pattern:
    """Parse a pattern with at most one loop.

    Raises:
        CherryError: naming the offending part of the pattern.
    """

    def fail(why: str) -> CherryError:
        return CherryError(f"recurrence.pattern {text!r}: {why}")

    def expand(match: re.Match[str]) -> str:
        if not 1 <= int(match[2]) <= MOST_LAYERS:
            raise fail(f"{match[0]!r} repeats a group {match[2]} times; use 1 to {MOST_LAYERS}")
        return match[1] * int(match[2])

    flat = _GROUP.sub(expand, text.replace(" ", ""))
    if "(" in flat or ")" in flat:
        raise fail("a group is written (layers)xN, without another group or loop inside")
    found = re.fullmatch(r"([^\[\]]*)(?:\[([^\[\]]*)\]x(\d+)([^\[\]]*))?", flat)
    if found is None:
        raise fail("a loop is written [layers]xN, and there can be one")
    prelude, core, loops, coda = found[1], found[2], found[3], found[4]
    if core is None:
        prelude, core, loops, coda = "", prelude, "1", ""
    for symbol in prelude + core + coda:
        if symbol == "|":
            raise fail("stages are balanced by cost, or given by recurrence.stages; take out '|'")
        if symbol == "/":
            raise fail("multi-token prediction is set by mtp.depths; take out '/'")
        if symbol not in SYMBOLS:
            group = ", and repeat layers with brackets: (*-)x4" if symbol == "x" or symbol.isdigit() else ""
            raise fail(f"{symbol!r} is not a layer; use '*' (attention) and '-' (MLP) or 'E' (experts){group}")
    if not core:
        raise fail("it holds no layers" if not prelude + coda else "the loop holds no layers")
    if int(loops) < 1:
        raise fail(f"the loop is walked {loops} times; use 1 or more")
    pattern = Pattern(_layers(prelude), _layers(core), _layers(coda), int(loops))
    if (effective := pattern.effective(pattern.loops)) > MOST_LAYERS:
        raise fail(f"{effective} effective layers are more than {MOST_LAYERS}; use fewer layers or loops")
    return pattern


def _layers(symbols: str) -> tuple[str, ...]:
    """Cut "*-*E" into ("*-", "*E"): a layer starts at each attention symbol."""
    return tuple(re.findall(r"\*[^*]*|^[^*]+", symbols))


def unroll(pattern: Pattern, loops: int, order: Order) -> tuple[Visit, ...]:
    """The effective layers in the order in which a forward pass walks them.

    Args:
        pattern: the parsed pattern.
        loops: how often the core is walked (may differ from the pattern's own number).
        order: `cycle` or `sequence`.
    """
    first, last = len(pattern.prelude), len(pattern.prelude) + len(pattern.core)
    core = range(first, last)
    if order == "cycle":
        walked = [Visit(layer, loop) for loop in range(loops) for layer in core]
    else:
        walked = [Visit(layer, loop) for layer in core for loop in range(loops)]
    before = [Visit(layer, None) for layer in range(first)]
    after = [Visit(layer, None) for layer in range(last, len(pattern.layers))]
    return (*before, *walked, *after)


def balance(costs: Sequence[float], stages: int) -> list[int]:
    """Cut a row of costs into contiguous, non-empty stages so that the dearest is as cheap as can be.

    Args:
        costs: the cost of each effective layer; put the embedding's on the first, the head's on the last.
        stages: how many pieces; at most len(costs).

    Returns:
        The length of each stage. Of equal solutions the one with the earliest cuts.
    """
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    n = len(costs)
    # best[k][i]: smallest possible maximum when the first i layers form k stages.
    best = [[float("inf")] * (n + 1) for _ in range(stages + 1)]
    cut = [[0] * (n + 1) for _ in range(stages + 1)]
    best[0][0] = 0.0
    for k in range(1, stages + 1):
        for i in range(k, n + 1):
            for j in range(k - 1, i):
                dearest = max(best[k - 1][j], total[i] - total[j])
                if dearest < best[k][i]:
                    best[k][i], cut[k][i] = dearest, j
    lengths = []
    end = n
    for k in range(stages, 0, -1):
        lengths.append(end - cut[k][end])
        end = cut[k][end]
    return lengths[::-1]
