"""`cherry report --sgt`: what selective runs recover of the full runs that they pair with, over seeds."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cherry_megatron.errors import CherryError
from cherry_megatron.monitor.document import Block, Listing, Table
from cherry_megatron.sgt.pairs import Pair, Run, differing, pair, read_run

_RECOVERED = (
    "", "alpha", "rho", "loss at step 0", "lowest loss", "at step", "recovered", "efficiency",
    "recovered at equal steps", "efficiency at equal steps", "step",
)  # fmt: skip
_BESIDE = (
    "", "alpha", "selected loss", "unselected loss", "cos to the optimum", "cos at the end", "ratio to the optimum",
    "ratio at the end",
)  # fmt: skip
_NOTES = (
    "Held-out loss over all output tokens with all loops, in nats a token; mean ± standard deviation over seeds "
    "(their number), each seed beside the full run of the same seed. Recovered: the gain of the selective run "
    "since step 0 over that of the full run, each at the step of its own lowest loss; at equal steps: both at the "
    "last step that both have. Efficiency: recovered / rho.",
    "Losses of selected and unselected held-out tokens: at the last evaluation. cos and ratio of the gradients of "
    "selected and unselected tokens: mean over the probes up to the lowest loss, and the last probe.",
)
ANCHOR = "At alpha below 1 the anchor supervises every token, so the efficiency there is not per supervised token."


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone, each with its full run.

    Attributes:
        pairs: one a seed.
    """

    pairs: list[Pair]

    @property
    def label(self) -> str:
        """What was supervised."""
        return self.pairs[0].run.label

    @property
    def is_full(self) -> bool:
        """Whether every token counts the same."""
        return self.pairs[0].run.is_full

    @property
    def alpha(self) -> str:
        """Weight of the selected tokens, with its schedule."""
        sgt = self.pairs[0].run.sgt
        if sgt is None:
            return "-"
        start, alpha = sgt["alpha_start"], f"{sgt['alpha']:g}"
        return alpha if start is None else f"{start:g} to {alpha} in {sgt['alpha_steps']} steps"

    def each(self, number: Callable[[Pair], float | None]) -> list[float]:
        """A number of every seed; none if a seed lacks it: a mean over some would be another quantity."""
        found = [number(pair) for pair in self.pairs]
        known = [value for value in found if value is not None]
        return known if len(known) == len(found) else []

    def coupling(self, name: str) -> list[tuple[int, list[float]]]:
        """(step, `cos` or `ratio` of each seed) of every probe that all seeds have."""
        of_seeds = [pair.run.couplings(name) for pair in self.pairs]
        steps = sorted(set.intersection(*(set(found) for found in of_seeds)))
        return [(step, [found[step] for found in of_seeds]) for step in steps]


@dataclass(frozen=True)
class Compared:
    """What came of comparing runs.

    Attributes:
        rows: in the order of the runs; the full runs that selective ones pair with have rows too.
        problems: a sentence of each run that could not be compared.
    """

    rows: list[Row]
    problems: list[str]


def comparison(folders: Sequence[Path]) -> list[Block]:
    """The comparison of runs.

    Args:
        folders: of full and selective runs, in any order.

    Raises:
        CherryError: if one is no run, or cannot be compared.
    """
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    if all(run.is_full for run in runs):
        raise CherryError("none of these runs is selective; name some with an sgt section and an alpha above 0")
    compared = compare(runs)
    if compared.problems:
        raise CherryError(compared.problems[0])
    pairs = [pair for row in compared.rows for pair in row.pairs if not row.is_full]
    names = Listing([f"{pair.run.name} with {pair.full.name}" for pair in pairs])
    return [*tables(compared.rows), "Pairs:", names]


def compare(runs: Sequence[Run]) -> Compared:
    """Pair selective runs with full ones, and put those that differ in their seed alone together."""
    problems: list[str] = []
    selective = list(_paired([run for run in runs if not run.is_full], runs, problems))
    compared_with = [found.full.settings for found in selective]
    full = _paired([run for run in runs if run.is_full and run.settings in compared_with], runs, problems)
    pairs = {found.run.name: found for found in (*selective, *full)}
    rows: dict[str, dict[int, Pair]] = {}
    for found in (pairs[run.name] for run in runs if run.name in pairs):
        seeds = rows.setdefault(found.run.row, {})
        if found.run.seed in seeds:
            problems.append(_twice(seeds[found.run.seed].run, found.run))
        seeds.setdefault(found.run.seed, found)
    return Compared([Row(list(seeds.values())) for seeds in rows.values()], problems)


def _paired(wanted: Sequence[Run], runs: Sequence[Run], problems: list[str]) -> Iterator[Pair]:
    for run in wanted:
        try:
            yield pair(run, runs)
        except CherryError as error:
            problems.append(str(error))


def _twice(first: Run, second: Run) -> str:
    keys = differing(first, second)
    what = f"that differ in {', '.join(keys)}" if keys else "of one configuration"
    return f"{first.name} and {second.name} are two runs with seed {first.seed} {what}; compare them one at a time"


def tables(rows: Sequence[Row]) -> list[Block]:
    """The two tables with their notes."""
    anchored = any(not row.is_full and row.alpha != "1" for row in rows)
    both = (Table(_RECOVERED, [*map(_recovered, rows)]), Table(_BESIDE, [*map(_beside, rows)]))
    return [*both, *_NOTES, *([ANCHOR] if anchored else [])]


def _recovered(row: Row) -> list[str]:
    rho = row.each(lambda pair: pair.run.rho)
    start = spread(row.each(lambda pair: pair.run.losses[0]))
    lowest = spread(row.each(lambda pair: pair.run.losses[pair.run.optimum]))
    numbers = [
        spread(row.each(lambda pair: pair.recovered), 3),
        spread(row.each(lambda pair: pair.efficiency), 2),
        spread(row.each(lambda pair: pair.recovered_at_last_step), 3),
        spread(row.each(lambda pair: pair.efficiency_at_last_step), 2),
        _different([pair.last_step for pair in row.pairs]),
    ]
    return [
        row.label,
        row.alpha,
        _different([float(f"{share:.3g}") for share in rho]),
        start,
        lowest,
        _different([pair.run.optimum for pair in row.pairs]),
        *(["-"] * len(numbers) if row.is_full else numbers),
    ]


def _beside(row: Row) -> list[str]:
    return [
        row.label,
        row.alpha,
        spread(row.each(lambda pair: pair.run.last_loss_of("selected"))),
        spread(row.each(lambda pair: pair.run.last_loss_of("unselected"))),
        spread(row.each(lambda pair: pair.run.coupling_to_optimum("cos")), 3),
        spread(row.each(lambda pair: pair.run.last_coupling("cos")), 3),
        spread(row.each(lambda pair: pair.run.coupling_to_optimum("ratio")), 3),
        spread(row.each(lambda pair: pair.run.last_coupling("ratio")), 3),
    ]


def _different(values: Sequence[float]) -> str:
    """The values that seeds have, each once."""
    return ", ".join(map(str, sorted(set(values)))) or "-"


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation (number)."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation} ({len(values)})"
