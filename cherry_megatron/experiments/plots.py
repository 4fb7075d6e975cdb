"""The plots of a report: for print, without colour too, and the same bytes from the same records."""

import io
import statistics
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cherry_megatron.experiments.report import Row, short

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "cherry",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "legend.frameon": False,
}
# Told apart by line and marker, by darkness, and by colour (Okabe and Ito's, for the colour-blind).
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vP*X"
_LOSS = "held-out loss, nats a token"
_WIDTH, _HEIGHT, _ENTRY = 5.0, 3.0, 0.2  # inches, of the axes and of a line of the legend


def draw(rows: list[Row]) -> dict[str, str]:
    """File name -> SVG. A plot without points is left out."""
    plots: dict[str, Callable[[Axes, list[Row]], None]] = {
        "loss-tokens.svg": _over_tokens,
        "loss-loops.svg": _over_loops,
        "loss-parameters.svg": _over_parameters,
        "loss-flops.svg": _over_flops,
    }
    drawn = {name: figure(plot, rows) for name, plot in plots.items()}
    return {name: _svg(made) for name, made in drawn.items() if made is not None}


def figure(plot: Callable[[Axes, list[Row]], None], rows: list[Row]) -> Figure | None:
    """One plot, or None if nothing was drawn."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        made = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = made.add_subplot()
        plot(axes, rows)
        if not axes.has_data():
            return None
        axes.set_ylabel(_LOSS)
        # Below, with room of its own: beside the axes long labels would leave them none.
        made.set_figheight(_HEIGHT + _ENTRY * len(axes.get_legend_handles_labels()[0]))
        made.legend(loc="outside lower left")
        return made


def _svg(made: Figure) -> str:
    file = io.StringIO()
    with mpl.rc_context(_STYLE):
        made.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _over_tokens(axes: Axes, rows: list[Row]) -> None:
    for number, row in enumerate(rows):
        _line(axes, number, row, row.curve())
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
            _line(axes, number, row, row.by_loops())
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


def _line(axes: Axes, number: int, row: Row, points: list[tuple[int, list[float]]]) -> None:
    """The mean over seeds, and a band from the lowest to the highest."""
    if not points:
        return
    x = [at for at, _ in points]
    means = [statistics.mean(losses) for _, losses in points]
    line = _LINES[number % len(_LINES)]
    axes.plot(x, means, linestyle=line, label=row.stage.label, **_look(number))
    lowest, highest = [min(losses) for _, losses in points], [max(losses) for _, losses in points]
    axes.fill_between(x, lowest, highest, color=_look(number)["color"], alpha=0.15, linewidth=0)


def _point(axes: Axes, number: int, row: Row, at: float) -> None:
    """The mean over seeds, with a bar from the lowest to the highest."""
    losses = row.final()
    if not losses:
        return
    mean = statistics.mean(losses)
    bar = [[mean - min(losses)], [max(losses) - mean]]
    axes.errorbar([at], [mean], yerr=bar, linestyle="none", capsize=2, label=row.stage.label, **_look(number))


def _look(number: int) -> dict[str, Any]:
    marker = _MARKERS[number % len(_MARKERS)]
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": marker, "markerfacecolor": "none"}
