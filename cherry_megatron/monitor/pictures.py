"""Pictures of an evaluation: the loss by loops beside earlier ones, and who sees what among experts."""

import re
from typing import TYPE_CHECKING

from cherry_megatron.monitor.tags import MOEE, of_section

if TYPE_CHECKING:  # imported when the first picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 3.8, 2.4  # inches, at which TensorBoard shows a picture without making it smaller
_EARLIER = 6  # evaluations that are drawn in grey
_OF_MODELS = ("load", "responsibility", "wanted")
_WALK = re.compile(r"load/(layer-[^/]+)(?:/(loop-[0-9]+))?/([0-9]+)")


def loss_by_loops(evaluations: dict[int, dict[int, float]]) -> "Figure | None":
    """The newest evaluation's loss over its numbers of loops, in black; those before it in grey.

    Args:
        evaluations: step -> loss by number of loops, the newest last.
    """
    from cherry_megatron.monitor.look import LOSS, figure

    def plot(axes: "Axes", found: list[tuple[int, dict[int, float]]]) -> None:
        for place, (step, losses) in enumerate(found):
            newest = place == len(found) - 1
            axes.plot(
                list(losses), list(losses.values()), marker="o", markerfacecolor="none",
                color="black" if newest else str(0.85 - 0.4 * place / len(found)),
                label=f"step {step}" if newest or place == 0 else None,
            )  # fmt: skip
        loops = sorted({loops for _, losses in found for loops in losses})
        axes.set_xscale("log", base=2)
        axes.set_xticks(loops, [str(number) for number in loops])
        axes.minorticks_off()
        axes.set_xlabel("loops")

    if not evaluations or max(map(len, evaluations.values())) < 2:
        return None
    return figure(plot, list(evaluations.items())[-_EARLIER - 1 :], LOSS, _HEIGHT, _WIDTH)


def expert_shares(further: dict[str, float], of_layers: dict[str, float]) -> "Figure | None":
    """What each expert gets, as a table of greys.

    Args:
        further: what an evaluation reports of a mixture of models, by tag.
        of_layers: what a step reports of experts inside layers, by tag without the section.
    """
    table = shares_of_models(of_section(MOEE, further)) or shares_of_layers(of_layers)
    if not table:
        return None
    from cherry_megatron.monitor.look import figure, shares

    def plot(axes: "Axes", rows: list[tuple[str, list[float]]]) -> None:
        shares(axes, dict(rows), "expert")

    return figure(plot, list(table.items()), "", 0.28 * len(table) + 0.8, _WIDTH)


def shares_of_models(reported: dict[str, float]) -> dict[str, list[float]]:
    """Load, responsibility and wanted -> the share of each expert, of what is reported of all of them."""
    experts = sum(1 for tag in reported if re.fullmatch(r"load/[0-9]+", tag))
    table = {kind: [reported.get(f"{kind}/{expert}") for expert in range(experts)] for kind in _OF_MODELS}
    return {kind: [v for v in row if v is not None] for kind, row in table.items() if row and None not in row}


def shares_of_layers(reported: dict[str, float]) -> dict[str, list[float]]:
    """A layer, or each of its loops if they are reported -> the load of each of its experts."""
    rows: dict[tuple[str, str | None], dict[int, float]] = {}
    for tag, value in reported.items():
        if found := _WALK.fullmatch(tag):
            layer, loop, expert = found.groups()
            rows.setdefault((layer, loop), {})[int(expert)] = value
    walked = {layer for layer, loop in rows if loop is not None}
    return {
        " ".join(filter(None, key)): [row[expert] for expert in sorted(row)]
        for key, row in rows.items()
        if key[1] is not None or key[0] not in walked
    }
