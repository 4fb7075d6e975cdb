"""The plots of a report: for print, without colour too, and the same bytes from the same records."""

import io
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cherry_megatron.experiments.report import Row, short
from cherry_megatron.sgt.pairs import Pair
from cherry_megatron.sgt.report import Row as SelectiveRow

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
_COUPLINGS = {"cos": "cos of the gradients", "ratio": "<g_S, g_U> / |g_S|²"}
_WIDTH, _HEIGHT, _ENTRY = 6.0, 3.6, 0.2  # inches, of the axes and of a line of the legend


def draw(rows: list[Row], selective: list[SelectiveRow], plotted: Sequence[str] | None = None) -> dict[str, str]:
    """File name -> SVG. A plot without points is left out.

    Args:
        rows: the stages of training.
        plotted: those in the plots over tokens, loops, parameters, FLOPs and probes, by default all.
        selective: those of selective training, with the full ones that they are compared with.
    """
    losses: dict[str, Callable[[Axes, list[Row]], None]] = {
        "loss-tokens.svg": _over_tokens,
        "loss-loops.svg": _over_loops,
        "loss-parameters.svg": _over_parameters,
        "loss-flops.svg": _over_flops,
    }
    some = [row for row in rows if plotted is None or row.stage.name in plotted]
    drawn = {name: figure(plot, some) for name, plot in losses.items()}
    drawn["losses.svg"] = figure(_final, rows, "", max(_HEIGHT, 0.25 * len(rows)))
    labels = {row.stage.label for row in some}
    probed = [row for row in selective if row.label in labels]
    for name, label in _COUPLINGS.items():
        drawn[f"coupling-{name}.svg"] = figure(partial(_coupling, name), probed, label)
    drawn["recovered.svg"] = figure(_recovered, selective, "", max(_HEIGHT, 0.25 * len(selective)))
    return {name: _svg(made) for name, made in drawn.items() if made is not None}


def figure[R](
    plot: Callable[[Axes, list[R]], None], rows: list[R], label: str = _LOSS, height: float = _HEIGHT
) -> Figure | None:
    """One plot, or None if nothing was drawn; `label` is the y axis', `height` in inches."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        made = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = made.add_subplot()
        plot(axes, rows)
        if not axes.has_data():
            return None
        axes.set_ylabel(label)
        # Below, with room of its own: beside the axes long labels would leave them none.
        if entries := len(axes.get_legend_handles_labels()[0]):
            made.set_figheight(height + _ENTRY * entries)
            made.legend(loc="outside lower left")
        return made


def _svg(made: Figure) -> str:
    file = io.StringIO()
    with mpl.rc_context(_STYLE):
        made.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _over_tokens(axes: Axes, rows: list[Row]) -> None:
    for number, row in enumerate(rows):
        _line(axes, number, row.stage.label, row.curve())
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
            _line(axes, number, row.stage.label, row.by_loops())
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
            axes.errorbar([mean], [place], xerr=bar, linestyle="none", capsize=2, **_look(0))
    axes.set_yticks(range(len(rows)), [row.stage.label for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.3)
    axes.set_xlabel(_LOSS)


def _coupling(name: str, axes: Axes, rows: list[SelectiveRow]) -> None:
    for number, row in enumerate(rows):
        _line(axes, number, row.label, row.coupling(name))
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
        axes.errorbar(means, places, xerr=[below, above], linestyle="none", capsize=2, label=label, **_look(kind))
    axes.set_yticks(range(len(selective)), [row.label for row in selective])
    axes.invert_yaxis()
    axes.set_xlabel("recovered fraction")


def _line(axes: Axes, number: int, label: str, points: list[tuple[int, list[float]]]) -> None:
    """The mean over seeds, and a band from the lowest to the highest."""
    if not points:
        return
    x = [at for at, _ in points]
    means = [statistics.mean(losses) for _, losses in points]
    line = _LINES[number % len(_LINES)]
    axes.plot(x, means, linestyle=line, label=label, **_look(number))
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
