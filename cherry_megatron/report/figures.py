"""Plots of what runs' folders have step by step."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from cherry_megatron.monitor.document import Plot
from cherry_megatron.monitor.look import darkest, figure, strokes, svg
from cherry_megatron.report.sources import Folder

_POINTS = 300  # of a curve at most; more are means of several steps
_FIELDS = 60  # the same of a map


def over_steps(
    file: str, caption: str, label: str, folders: Sequence[Folder], value: Callable[[dict[str, Any]], float | None]
) -> list[Plot]:
    """A curve a run.

    Args:
        file, caption: of the plot.
        label: of the y axis.
        folders: of the runs.
        value: of a line of steps.jsonl; None where it has none.

    Returns:
        The plot, or nothing if there is nothing to draw.
    """

    def plot(axes: Axes, runs: list[Folder]) -> None:
        for number, run in enumerate(runs):
            points = [(step["iteration"], value(step)) for step in run.steps]
            means = thinned([(at, known) for at, known in points if known is not None], _POINTS)
            if means:
                axes.plot(*zip(*means, strict=True), label=run.name, **strokes(number))
        axes.set_xlabel("step")

    return _plot(file, caption, figure(plot, list(folders), label))


def expert_map(file: str, folder: Folder) -> list[Plot]:
    """The share of each expert over a run's steps, as greys: of a mixture what each explains, else the load."""
    shares = {
        tag: [(step["iteration"], step["moee"][tag]) for step in folder.steps if tag in step.get("moee", {})]
        for tag in _tags(folder)
    }
    if not shares:
        return []
    kind = next(iter(shares)).split("/")[0]
    rows = {
        tag.removeprefix(f"{kind}/").replace("/", ", expert ") if kind == "load" else f"expert {tag.split('/')[1]}":
        thinned(points, _FIELDS)
        for tag, points in shares.items()
    }  # fmt: skip

    def plot(axes: Axes, found: list[tuple[str, list[tuple[float, float]]]]) -> None:
        columns = min(len(points) for _, points in found)
        values = np.array([[share for _, share in points[-columns:]] for _, points in found])
        steps = [at for at, _ in found[0][1][-columns:]]
        ends = (steps[0], steps[-1] + (steps[-1] == steps[0]))
        shown = axes.imshow(
            values, cmap="Greys", vmin=0.0, vmax=darkest(values), aspect="auto", interpolation="nearest",
            extent=(*ends, len(found) - 0.5, -0.5),
        )  # fmt: skip
        axes.set_yticks(range(len(found)), [name for name, _ in found])
        axes.set_xlabel("step")
        assert axes.figure is not None
        axes.figure.colorbar(shown, ax=axes, pad=0.02).outline.set_visible(False)

    what = "share of the tokens that each expert explains" if kind == "responsibility" else "load of each expert"
    made = figure(plot, list(rows.items()), "", max(1.8, 0.25 * len(rows) + 0.8))
    return _plot(file, f"{folder.name}: {what}, over the steps.", made)


def _tags(folder: Folder) -> list[str]:
    """Of each expert what the lines of steps.jsonl have of it."""
    known = {tag: None for step in folder.steps for tag in step.get("moee", {})}
    explained = [tag for tag in known if tag.startswith("responsibility/")]
    return explained or [tag for tag in known if tag.startswith("load/layer-") and "/loop-" not in tag]


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many points, each the mean of equally many neighbours but for the last."""
    width = -(-len(points) // most)
    groups = [points[begin : begin + width] for begin in range(0, len(points), width)] if points else []
    return [(statistics.fmean(x for x, _ in group), statistics.fmean(y for _, y in group)) for group in groups]


def _plot(file: str, caption: str, made: Any) -> list[Plot]:
    return [] if made is None else [Plot(file, svg(made), caption)]
