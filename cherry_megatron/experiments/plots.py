"""The plots of an experiment: losses over tokens, loops, parameters and FLOPs, and what selections recover."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cherry_megatron.experiments.report import Row, short
from cherry_megatron.monitor.look import LOSS, figure, line, look, svg
from cherry_megatron.sgt.pairs import Pair
from cherry_megatron.sgt.report import Row as SelectiveRow

_COUPLINGS = {"cos": "cos of the gradients", "ratio": "<g_S, g_U> / |g_S|²"}


def draw(
    rows: list[Row],
    selective: list[SelectiveRow],
    plotted: Sequence[str] | None = None,
    files: Sequence[str] | None = None,
) -> dict[str, str]:
    """File name -> SVG. A plot without points is left out.

    Args:
        rows: the stages of training.
        selective: those of selective training, with the full ones that they are compared with.
        plotted: those in the plots over tokens, loops, parameters, FLOPs and probes, by default all.
        files: of the plots that are wanted, by default all.
    """
    some = [row for row in rows if plotted is None or row.name in plotted]
    labels = {row.label for row in some}
    probed = [row for row in selective if row.label in labels]
    plots: dict[str, Callable[[], Figure | None]] = {
        "loss-tokens.svg": lambda: figure(_over_tokens, some),
        "loss-loops.svg": lambda: figure(_over_loops, some),
        "loss-parameters.svg": lambda: figure(_over_parameters, some),
        "loss-flops.svg": lambda: figure(_over_flops, some),
        "losses.svg": lambda: figure(_final, rows, "", _rows_height(rows)),
        "coupling-cos.svg": lambda: figure(partial(_coupling, "cos"), probed, _COUPLINGS["cos"]),
        "coupling-ratio.svg": lambda: figure(partial(_coupling, "ratio"), probed, _COUPLINGS["ratio"]),
        "recovered.svg": lambda: figure(_recovered, selective, "", _rows_height(selective)),
    }
    made = {file: plot() for file, plot in plots.items() if files is None or file in files}
    return {file: svg(drawn) for file, drawn in made.items() if drawn is not None}


def _rows_height(rows: Sequence[Any]) -> float:
    """Inches of a plot with a line for each row."""
    return 0.8 + 0.25 * len(rows)


def _over_tokens(axes: Axes, rows: list[Row]) -> None:
    for number, row in enumerate(rows):
        line(axes, number, row.label, row.curve())
    # Losses before the first step, some above that of a uniform guess, would press the others flat.
    later = [loss for row in rows for tokens, losses in row.curve() if tokens for loss in losses]
    if later:
        margin = 0.05 * (max(later) - min(later)) or 0.1
        axes.set_ylim(min(later) - margin, max(later) + margin)
    axes.set_xlabel("training tokens of the stage")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: short(tokens)))


def _over_loops(axes: Axes, rows: list[Row]) -> None:
    for number, row in enumerate(rows):
        if len(row.by_loops()) > 1:
            line(axes, number, row.label, row.by_loops())
    axes.set_xlabel("loops")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({loops for row in rows for loops, _ in row.by_loops()}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda loops, _: f"{loops:g}"))


def _over_parameters(axes: Axes, rows: list[Row]) -> None:
    for number, row in enumerate(rows):
        _point(axes, number, row, row.parameters)
    axes.set_xlabel("stored parameters")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda parameters, _: short(parameters)))


def _over_flops(axes: Axes, rows: list[Row]) -> None:
    for number, row in enumerate(rows):
        _point(axes, number, row, row.flops)
    axes.set_xlabel("training FLOPs of the stage")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda flops, _: f"{flops:.2g}"))
    axes.xaxis.set_major_locator(MaxNLocator(4))


def _final(axes: Axes, rows: list[Row]) -> None:
    """A point a row, one below the other as in the table, with a bar from the lowest to the highest seed."""
    for place, row in enumerate(rows):
        losses = row.final()
        if losses:
            mean = statistics.mean(losses)
            bar = [[mean - min(losses)], [max(losses) - mean]]
            axes.errorbar([mean], [place], xerr=bar, linestyle="none", capsize=2, **look(0))
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_xlabel(LOSS)


def _coupling(name: str, axes: Axes, rows: list[SelectiveRow]) -> None:
    for number, row in enumerate(rows):
        line(axes, number, row.label, row.coupling(name))
    axes.set_xlabel("step")


def _recovered(axes: Axes, rows: list[SelectiveRow]) -> None:
    """Two points a row, one below the other as in the table, with bars from the lowest to the highest seed."""
    selective = [row for row in rows if not row.is_full]
    kinds: dict[str, Callable[[Pair], float | None]] = {
        "each at its lowest loss": lambda pair: pair.recovered,
        "at equal steps": lambda pair: pair.recovered_at_last_step,
    }
    for kind, (label, number) in enumerate(kinds.items()):
        found = [row.each(number) for row in selective]
        points = [(place + kind / 4, values) for place, values in enumerate(found) if values]
        if not points:
            continue
        means = [statistics.mean(values) for _, values in points]
        below = [mean - min(values) for mean, (_, values) in zip(means, points, strict=True)]
        above = [max(values) - mean for mean, (_, values) in zip(means, points, strict=True)]
        places = [place for place, _ in points]
        axes.errorbar(means, places, xerr=[below, above], linestyle="none", capsize=2, label=label, **look(kind))
    axes.set_yticks(range(len(selective)), [row.label for row in selective])
    axes.set_ylim(len(selective) - 0.4, -0.6)
    axes.set_xlabel("recovered fraction")


def _point(axes: Axes, number: int, row: Row, at: float) -> None:
    """The mean over seeds, with a bar from the lowest to the highest."""
    losses = row.final()
    if not losses:
        return
    mean = statistics.mean(losses)
    bar = [[mean - min(losses)], [max(losses) - mean]]
    axes.errorbar([at], [mean], yerr=bar, linestyle="none", capsize=2, label=row.label, **look(number))
