"""The paper's claims, and which records decide each: the table says reproduced, not reproduced or not run.

Nothing in it is typed: a claim declares the training that decides it, by what the records say of how that was made,
the one that it is held against, the quantity, and the range in which it counts as reproduced. Of several trainings
that fit the one with most seeds is taken, then the one with the lowest final loss.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cherry_megatron.experiments.report import Row, short
from cherry_megatron.monitor.document import Block, Table
from cherry_megatron.report.sources import Facts, Source, task_of
from cherry_megatron.sgt.pairs import Pair
from cherry_megatron.sgt.report import ANCHOR, spread

NOT_RUN, REPRODUCED, NOT_REPRODUCED = "not run", "reproduced", "not reproduced"
_COMPRESSED: Facts = {"start": "compress-depth", "method": "average", "looped": True, "experts": 0, "alpha": None}
_TWO: Facts = {"start": "assemble-moee", "experts": 2}
_SEMANTIC: Facts = {"marks": "semantic", "alpha": 0.7, "shuffle": "none"}


@dataclass(frozen=True)
class Trained:
    """A row, and where it is from."""

    source: Source
    row: Row


@dataclass(frozen=True)
class Claim:
    """A statement of the paper.

    Attributes:
        says: it, in short.
        paper: its figure.
        counts: what counts as reproduced, for people.
        least, most: the same as a range of the mean over seeds.
        values: the quantity of each seed, of a training and the one that it is held against; none if they lack it.
        subject: facts of the training that decides it (see sources.py), or what they must meet; None: nothing that
            is recorded decides it.
        against: the training that it is held against, out of those of one source; by default none.
        shown: how values are written; None: as mean and spread.
    """

    says: str
    paper: str
    counts: str
    least: float
    most: float
    values: Callable[[Trained, Trained | None], list[float]]
    subject: Facts | None
    against: Callable[[Trained], list[Row]] | None = None
    shown: Callable[[list[float]], str] | None = None


def _relative_loss(trained: Trained, other: Trained | None) -> list[float]:
    """Final loss over the other's, less one; seed by seed where both have the same seeds."""
    assert other is not None
    ours, theirs = _final_by_seed(trained), _final_by_seed(other)
    if not ours or not theirs:
        return []
    if ours.keys() == theirs.keys():
        return [loss / theirs[seed] - 1 for seed, loss in ours.items()]
    mean = statistics.mean(theirs.values())
    return [loss / mean - 1 for loss in ours.values()]


def _final_by_seed(trained: Trained) -> dict[int, float]:
    """Seeds stand in the order in which their tasks ended; nothing if one has no final loss."""
    losses = trained.row.final()
    return dict(zip((record["seed"] for record in trained.row.records), losses, strict=True)) if losses else {}


def _of_pairs(number: Callable[[Pair], float | None]) -> Callable[[Trained, Trained | None], list[float]]:
    def values(trained: Trained, _: Trained | None) -> list[float]:
        found = [number(pair) for pair in trained.source.pairs(trained.row)]
        known = [value for value in found if value is not None]
        return known if len(known) == len(found) else []

    return values


def _recovered_beyond(trained: Trained, other: Trained | None) -> list[float]:
    """What a training recovers, less what the other does in the mean."""
    assert other is not None
    ours, theirs = ([pair.recovered for pair in each.source.pairs(each.row)] for each in (trained, other))
    return [value - statistics.mean(theirs) for value in ours] if theirs else []


def _ended_over_full(trained: Trained, other: Trained | None) -> list[float]:
    """The share of generated texts that end, over that of full supervision, at the last evaluation of each."""
    assert other is not None
    ended = []
    for each in (trained, other):
        folders = [each.source.folders.get(record["stage"]) for record in each.row.records]
        lines = [folder.generations[-1] for folder in folders if folder is not None and folder.generations]
        ended.append([line["health"]["ended"] for line in lines])
    full = statistics.mean(ended[1]) if ended[1] else 0.0
    return [value / full for value in ended[0]] if full > 0 else []


def _dense(trained: Trained) -> list[Row]:
    """Dense models from scratch with two to three times the stored parameters, as the paper's is of 2.5 times.

    The model that was compressed is none of them: it was trained for this one too.
    """
    size, before = trained.row.parameters, trained.source.facts[trained.row.name]["ancestors"]
    dense = _rows(trained.source, {"start": "none", "looped": False, "experts": 0, "alpha": None})
    return [row for row in dense if 2 <= row.parameters / size <= 3 and row.name not in before]


def _single(trained: Trained) -> list[Row]:
    """Recurrent models without experts, but for those that it was made from."""
    before = trained.source.facts[trained.row.name]["ancestors"]
    return [row for row in _rows(trained.source, {"looped": True, "experts": 0}) if row.name not in before]


def _full(trained: Trained) -> list[Row]:
    """The full runs that a selective one pairs with."""
    names = {pair.full.name for pair in trained.source.pairs(trained.row)}
    return [
        row
        for row in trained.source.rows
        if any(record.get("run", task_of(record)) in names for record in row.records)
    ]


def _same_but(**facts: Any) -> Callable[[Trained], list[Row]]:
    """Selective trainings that differ in these facts."""

    def rows(trained: Trained) -> list[Row]:
        own = trained.source.facts[trained.row.name]
        return _rows(trained.source, {key: own[key] for key in ("marks", "alpha", "start", "shuffle")} | facts)

    return rows


def _between(least: float, most: float) -> Callable[[float], bool]:
    return lambda value: least <= value <= most


def _sizes(values: list[float]) -> str:
    return ", ".join(short(value) for value in sorted(set(values))) if values else "-"


def _percent(values: list[float]) -> str:
    return spread([100 * value for value in values], 1).replace(" (", " % (") if values else "-"


CLAIMS = (
    Claim(
        "48 layers (1.0B) are averaged to 6 (227M) that are walked as 34", "227M stored",
        "226M to 228M stored", 226e6, 228e6,
        lambda trained, _: [float(trained.row.parameters)], {**_COMPRESSED, "parameters": _between(200e6, 250e6)},
        shown=_sizes,
    ),
    Claim(
        "six averaged layers, walked as 34, recover the loss of a dense model of 2.5 times their size: 2.934 "
        "against 2.926",
        "0.3 %", "at most 1 % above the dense model", float("-inf"), 0.01,
        _relative_loss, _COMPRESSED, _dense, _percent,
    ),
    Claim(
        "supervising the 15% of the output tokens that carry meaning recovers two thirds of full supervision's "
        "gain (alpha 0.7)",
        "0.67", "0.60 or more", 0.60, float("inf"),
        _of_pairs(lambda pair: pair.recovered), _SEMANTIC, shown=lambda values: spread(values, 3),
    ),
    Claim(
        "that is 4.5 times full supervision's gain for each supervised token",
        "4.5", "4.0 or more", 4.0, float("inf"),
        _of_pairs(lambda pair: pair.efficiency), _SEMANTIC, shown=lambda values: spread(values, 2),
    ),
    Claim(
        "it is their meaning: recovered beyond random marks of the same share (the paper promises this control)",
        "not given", "above 0", 1e-9, float("inf"),
        _recovered_beyond, _SEMANTIC, _same_but(marks="random"), lambda values: spread(values, 3),
    ),
    Claim(
        "the gradients of selected and other tokens are coupled: cos in the mean up to the lowest loss",
        "0.72", "0.65 or more (the paper gives no formula)", 0.65, float("inf"),
        _of_pairs(lambda pair: pair.run.coupling_to_optimum("cos")), _SEMANTIC,
        shown=lambda values: spread(values, 3),
    ),
    Claim(
        "the same by the ratio", "0.72", "0.65 or more (the paper gives no formula)", 0.65, float("inf"),
        _of_pairs(lambda pair: pair.run.coupling_to_optimum("ratio")), _SEMANTIC,
        shown=lambda values: spread(values, 3),
    ),
    Claim(
        "the effect collapses on shuffled text: recovered there less recovered in order",
        "collapses", "-0.3 or less", float("-inf"), -0.3,
        _recovered_beyond, {"marks": "semantic", "shuffle": "tokens"}, _same_but(shuffle="none"),
        lambda values: spread(values, 3),
    ),
    Claim(
        "without the anchor (alpha 1) free generation collapses: share of texts that end, over full supervision's",
        "collapses", "at most 0.5", float("-inf"), 0.5,
        _ended_over_full, {**_SEMANTIC, "alpha": 1.0}, _full, lambda values: spread(values, 2),
    ),
    Claim(
        "a mixture of two compressed models is ahead of the best single one: 2.789 against 2.926",
        "-4.7 %", "at least half of that below", float("-inf"), -0.0235,
        _relative_loss, _TWO, _single, _percent,
    ),
    Claim(
        "two experts have 512M active parameters", "512M active", "486M to 538M active", 486e6, 538e6,
        lambda trained, _: [float(trained.row.active_parameters)], {**_TWO, "parameters": _between(400e6, 600e6)},
        shown=_sizes,
    ),
    Claim(
        "multi-token prediction decodes 1.6 to 2.1 times as fast", "1.6 to 2.1", "1.6 or more", 1.6, float("inf"),
        lambda _, __: [], None,
    ),
)  # fmt: skip


def claims(sources: Sequence[Source]) -> list[Block]:
    """The table."""
    head = ["the paper says", "its figure", "ours", "seeds", "decided by", "counts as reproduced", ""]
    about = (
        "Generated from the records. Ours: mean ± standard deviation over seeds (their number). A training decides "
        "a claim if it was made as the claim asks, whatever its size, which stands behind it. What it is held "
        "against is of the same source and text. Not run: no such training is among what this report was given, or "
        "nothing that is recorded decides the claim."
    )
    return [Table([*head], [_line(claim, sources) for claim in CLAIMS]), about, ANCHOR]


def decide(claim: Claim, sources: Sequence[Source]) -> tuple[str, list[float], Trained | None, Trained | None]:
    """The verdict, the value of each seed, the training that decides, and the one that it is held against."""
    found: list[tuple[list[float], Trained, Trained | None]] = []
    for source in sources if claim.subject is not None else ():
        for row in _rows(source, claim.subject or {}):
            trained = Trained(source, row)
            others = [Trained(source, other) for other in claim.against(trained)] if claim.against else []
            others = [other for other in others if _text(other) == _text(trained)]
            other = _best(others)
            if claim.against is not None and other is None:
                continue
            if values := claim.values(trained, other):
                found.append((values, trained, other))
    if not found:
        return NOT_RUN, [], None, None
    best = _best([trained for _, trained, _ in found])
    values, trained, other = next(entry for entry in found if entry[1] is best)
    holds = claim.least <= statistics.mean(values) <= claim.most
    return REPRODUCED if holds else NOT_REPRODUCED, values, trained, other


def _line(claim: Claim, sources: Sequence[Source]) -> list[str]:
    verdict, values, trained, other = decide(claim, sources)
    if trained is None:
        return [claim.says, claim.paper, "-", "-", "-", claim.counts, verdict]
    by = _named(trained) + (f"; against {_named(other)}" if other else "")
    if len(sources) > 1:
        by += f"; {trained.source.name}"
    seeds = ", ".join(str(record["seed"]) for record in trained.row.records)
    return [claim.says, claim.paper, (claim.shown or spread)(values), seeds, by, claim.counts, verdict]


def _named(trained: Trained) -> str:
    return f"{trained.row.label} ({short(trained.row.parameters)})"


def _rows(source: Source, wanted: Facts) -> list[Row]:
    """The rows of a source that have these facts."""
    facts = source.facts
    return [
        row for row in source.rows if all(_meets(facts[row.name].get(key), value) for key, value in wanted.items())
    ]


def _meets(fact: Any, wanted: Any) -> bool:
    return bool(wanted(fact)) if callable(wanted) else fact == wanted


def _text(trained: Trained) -> Any:
    """What its held-out losses are of, as far as it is known."""
    return trained.source.facts[trained.row.name]["text"]


def _best(trained: Sequence[Trained]) -> Trained | None:
    """Of those with most seeds the one with the lowest final loss."""

    def rank(each: Trained) -> tuple[int, float]:
        losses = each.row.final()
        return -len(each.row.records), statistics.mean(losses) if losses else float("inf")

    return min(trained, key=rank, default=None)
