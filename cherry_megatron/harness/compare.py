"""`cherry evaluate --compare A B`: two evaluations of the same items, paired.

The interval is that of the mean difference of an item, from the paired standard error (Miller 2024, Adding Error
Bars to Evals, arXiv 2411.00640, section 4.2):

    d_i = b_i - a_i        se = sqrt(sum_i (d_i - mean d)^2 / (n - 1) / n)        mean d +- 1.96 se

Where an item is right or wrong, p is McNemar's exact test (McNemar 1947, Psychometrika 12): how likely it is that
the items that changed split at least as unevenly as here if a change were as often for the better as for the worse.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cherry_megatron.errors import CherryError
from cherry_megatron.files import cannot_write, write_atomically
from cherry_megatron.harness.results import Evaluated, read

SHOWN = 20  # changed items on the screen
ALL = "all tasks"
_Z = 1.959964  # of 95% of a normal distribution
type Key = tuple[str, str, int]  #: task, filter, item
type Values = list[tuple[float, float]]  #: of each item in A and in B


@dataclass(frozen=True)
class Paired:
    """The difference of two models over the same items.

    Attributes:
        items: how many.
        first, second: mean of each model.
        error: standard error of their difference; NaN for one item.
        better, worse: items with a larger and a smaller value in the second.
        p: McNemar's exact test; None where values are other than 0 and 1.
    """

    items: int
    first: float
    second: float
    error: float
    better: int
    worse: int
    p: float | None

    @property
    def difference(self) -> float:
        return self.second - self.first

    @property
    def interval(self) -> tuple[float, float]:
        """95% of the difference."""
        return self.difference - _Z * self.error, self.difference + _Z * self.error


def paired(values: Values) -> Paired:
    """Statistics of pairs, at least one; formulas above."""
    items = len(values)
    first, second = (math.fsum(side) / items for side in zip(*values, strict=True))
    gains = [b - a for a, b in values]
    spread = math.fsum((gain - (second - first)) ** 2 for gain in gains)
    error = math.sqrt(spread / (items - 1) / items) if items > 1 else math.nan
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    binary = all(value in (0, 1) for pair in values for value in pair)
    return Paired(items, first, second, error, better, worse, _mcnemar(better, worse) if binary else None)


def _mcnemar(better: int, worse: int) -> float:
    changed = better + worse
    tail = sum(math.comb(changed, count) for count in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**changed)


def compare(first: Path, second: Path, changed: Path | None = None) -> list[str]:
    """What `cherry evaluate --compare` prints.

    Args:
        first, second: evaluations, or runs whose newest is meant.
        changed: a file for all items that changed, as lines of JSON.

    Raises:
        CherryError: if there is none, or they have no task or not the same items in common.
    """
    a, b = read(first), read(second)
    pairs = _pairs(a, b)
    differing = list(_changed(pairs))
    if changed is not None:
        try:
            write_atomically(changed, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in differing))
        except OSError as error:
            raise cannot_write(changed, error) from None
    lines = [f"A  {a.named}", f"B  {b.named}"]
    if a.results["asked"]["fewshot"] != b.results["asked"]["fewshot"] or _prompts_differ(pairs):
        lines.append("note: the prompts of A and B are not the same")
    lines += ["", *_table(_rows(pairs, b)), "", f"{len(differing)} items changed (metric, task, item: A -> B)"]
    for line in differing[:SHOWN]:
        change = f"{line['A']:g} -> {line['B']:g}"
        lines.append(f"  {line['metric']:<10} {line['task']}, {line['item']}: {change}   {_end(line['prompt'])}")
    if len(differing) > SHOWN:
        lines.append(f"  and {len(differing) - SHOWN} more" + ("" if changed else "; --changed FILE has them all"))
    return lines


def _pairs(a: Evaluated, b: Evaluated) -> dict[Key, tuple[dict[str, Any], dict[str, Any]]]:
    """The samples of both by item, of the tasks that both have."""
    sides = [{(line["task"], line["filter"], line["item"]): line for line in each.samples()} for each in (a, b)]
    common = {key[0] for key in sides[0]} & {key[0] for key in sides[1]}
    if not common:
        raise CherryError(f"{a.folder} and {b.folder} have no task in common; evaluate both on the same --tasks")
    for task in sorted(common):
        hashes = [{key: line["doc_hash"] for key, line in side.items() if key[0] == task} for side in sides]
        if hashes[0] != hashes[1]:
            raise CherryError(
                f"{a.folder} and {b.folder} were not asked the same items of {task}; evaluate both with the same "
                "data and --limit"
            )
    return {key: (line, sides[1][key]) for key, line in sides[0].items() if key[0] in common}


def _prompts_differ(pairs: dict[Key, tuple[dict[str, Any], dict[str, Any]]]) -> bool:
    return any(a["prompt"] != b["prompt"] for a, b in pairs.values())


def _numbers(a: dict[str, Any], b: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Metrics of an item that have a mean over items; others, as f1, are of all together."""
    for metric, value in a["metrics"].items():
        other = b["metrics"].get(metric)
        if isinstance(value, int | float) and isinstance(other, int | float):
            yield metric, float(value), float(other)


def _rows(
    pairs: dict[Key, tuple[dict[str, Any], dict[str, Any]]], b: Evaluated
) -> Iterator[tuple[str, str, Paired]]:
    """Task or group, metric, and how they differ; of a group over its items, each of the same weight."""
    values: dict[tuple[str, str], Values] = defaultdict(list)
    groups = {name: children for name, children in b.results.get("group_subtasks", {}).items() if children}
    tasks = {key[0] for key in pairs}
    within = {task: [group for group in groups if task in _leaves(group, groups)] for task in tasks}
    for (task, chosen, _), sides in pairs.items():
        for metric, *both in _numbers(*sides):
            named = metric if chosen == "none" else f"{metric},{chosen}"
            for name in (task, *within[task], *([ALL] if len(tasks) > 1 else [])):
                values[name, named].append((both[0], both[1]))
    order = [*tasks, *groups, ALL]
    for (name, metric), given in sorted(
        values.items(), key=lambda row: (order.index(row[0][0]) >= len(tasks), row)
    ):
        yield name, metric, paired(given)


def _leaves(name: str, groups: dict[str, Sequence[str]]) -> set[str]:
    """The tasks of a group and of those in it."""
    if name not in groups:
        return {name}
    return set().union(*(_leaves(child, groups) for child in groups[name]))


def _table(rows: Iterator[tuple[str, str, Paired]]) -> list[str]:
    heads = ("", "metric", "items", "A", "B", "B - A", "95% interval", "better", "worse", "p")
    cells = [heads]
    for name, metric, found in rows:
        low, high = found.interval
        means = (
            f"{found.first:.4f}",
            f"{found.second:.4f}",
            f"{found.difference:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
        )
        chance = "" if found.p is None else f"{found.p:.3g}"
        cells.append((name, metric, str(found.items), *means, str(found.better), str(found.worse), chance))
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _changed(pairs: dict[Key, tuple[dict[str, Any], dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for (task, chosen, item), (a, b) in sorted(pairs.items()):
        for metric, before, after in _numbers(a, b):
            if before != after:
                yield {
                    "task": task, "filter": chosen, "item": item, "metric": metric, "A": before, "B": after,
                    "prompt": a["prompt"], "target": a["target"], "answers of A": a["answers"],
                    "answers of B": b["answers"],
                }  # fmt: skip


def _end(prompt: str) -> str:
    """The end of a prompt on one line."""
    text = " ".join(prompt.split())
    return text if len(text) <= 50 else f"…{text[-50:]}"
