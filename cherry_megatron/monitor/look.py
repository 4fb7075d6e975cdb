"""How plots look: for print, without colour too, and the same bytes from the same numbers."""

import io
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
LOSS = "held-out loss, nats a token"
_WIDTH, HEIGHT, _ENTRY = 6.0, 3.6, 0.2  # inches, of the axes and of a line of the legend
_HALF = 32  # letters of labels of which two fit beside each other


def figure[R](
    plot: Callable[[Axes, list[R]], None],
    rows: list[R],
    label: str = LOSS,
    height: float = HEIGHT,
    width: float = _WIDTH,
) -> Figure | None:
    """One plot, or None if nothing was drawn; `label` is the y axis', `height` and `width` in inches."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        made = Figure(figsize=(width, height), layout="constrained")
        axes = made.add_subplot()
        plot(axes, rows)
        if not axes.has_data():
            return None
        axes.set_ylabel(label)
        # Below, with room of its own: beside the axes long labels would leave them none.
        if labels := axes.get_legend_handles_labels()[1]:
            columns = 2 if len(labels) > 5 and max(map(len, labels)) <= _HALF else 1
            made.set_figheight(height + _ENTRY * math.ceil(len(labels) / columns))
            made.legend(loc="outside lower left", ncols=columns)
        return made


def svg(made: Figure) -> str:
    """A figure as SVG."""
    file = io.StringIO()
    with mpl.rc_context(_STYLE):
        made.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def pixels(made: Figure) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """A figure as [height, width, 3]."""
    canvas = FigureCanvasAgg(made)
    with mpl.rc_context(_STYLE):
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def line(axes: Axes, number: int, label: str, points: Sequence[tuple[float, list[float]]]) -> None:
    """The mean over seeds, and a band from the lowest to the highest."""
    if not points:
        return
    x = [at for at, _ in points]
    means = [statistics.mean(values) for _, values in points]
    axes.plot(x, means, linestyle=strokes(number)["linestyle"], label=label, **look(number))
    lowest, highest = [min(values) for _, values in points], [max(values) for _, values in points]
    axes.fill_between(x, lowest, highest, color=look(number)["color"], alpha=0.15, linewidth=0)


def strokes(number: int) -> dict[str, Any]:
    """The line of one of several that have too many points for markers."""
    return {"color": look(number)["color"], "linestyle": _LINES[number % len(_LINES)]}


def look(number: int) -> dict[str, Any]:
    """Colour and marker of one of several."""
    marker = _MARKERS[number % len(_MARKERS)]
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": marker, "markerfacecolor": "none"}


def darkest(values: "np.ndarray[Any, Any]") -> float:
    """What is black in a map of shares, so that the mean is half dark unless something is more than twice it."""
    return max(2 * float(values.mean()), float(values.max())) or 1.0


def shares(axes: Axes, table: dict[str, list[float]], across: str) -> None:
    """Shares as dark fields with their numbers, a row each: white is none, the mean is half dark.

    Args:
        axes: to draw on.
        table: row -> shares, all of one length.
        across: what the columns are.
    """
    values = np.array(list(table.values()))
    most = darkest(values)
    axes.imshow(values, cmap="Greys", vmin=0.0, vmax=most, aspect="auto")
    rows, columns = values.shape
    if columns <= 16 and rows <= 32:
        for (row, column), value in np.ndenumerate(values):
            ink = "white" if value > 0.6 * most else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=7)
    axes.set_yticks(range(rows), list(table))
    if columns <= 32:
        axes.set_xticks(range(columns))
    axes.set_xlabel(across)
    axes.tick_params(length=0)
