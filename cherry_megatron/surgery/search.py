"""Looks for the grouping whose compressed model has the lowest loss, by local moves from `adjacent` and `slots`.

What holds of every grouping that is looked at: it has no empty group, members ascend, and each source layer is in
a group; in one alone, unless the source has so few layers that `slots` itself has some in several.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from cherry_megatron.errors import CherryError
from cherry_megatron.model.options import Recurrence
from cherry_megatron.surgery.grouping import groups_text, make_groups, slot_groups, slot_window

Groups = tuple[tuple[int, ...], ...]
REACH = (1, 2)  # layers by which a boundary is shifted


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        groups: as --groups has them.
        loss: theirs.
        adjacent, slots: the losses of these.
        scored: how many groupings were looked at.
        budget, seed: of the search.
    """

    groups: str
    loss: float
    adjacent: float
    slots: float
    scored: int
    budget: int
    seed: int


@dataclass(frozen=True)
class _Candidate:
    """A grouping and, while the core's slots divide a window of the source in loop order, that window."""

    groups: Groups
    window: tuple[int, int] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Search:
    """A search, which is the same each time it is run with the same scores.

    Attributes:
        layers: of the source.
        recurrence: the compressed model.
        budget: how many groupings are scored at most; none is scored twice.
        seed: of the order in which moves are tried.

    Raises:
        CherryError: if the budget does not reach for `adjacent` and `slots`.
    """

    layers: int
    recurrence: Recurrence
    budget: int
    seed: int

    def __post_init__(self) -> None:
        if self.budget < 2:
            raise CherryError(f"--budget {self.budget}: use 2 or more, for adjacent and slots are scored first")

    def run(self, score: Callable[[Groups], float]) -> Found:
        """Score `adjacent` and `slots`, then each time a neighbour of the best that has neighbours left.

        Args:
            score: the loss of a grouping. Of equal ones the earlier is better; what is no number is worst.
        """
        adjacent = _Candidate(tuple(make_groups("adjacent", self.layers, self.recurrence)))
        window = slot_window(self.layers, self.recurrence)
        slots = _Candidate(tuple(slot_groups(self.layers, self.recurrence, *window)), window)
        # In sequence order they may be equal; slots have more moves.
        starts = iter([adjacent, slots] if adjacent != slots else [slots])
        draw = random.Random(self.seed)
        losses: dict[_Candidate, float] = {}
        while len(losses) < self.budget:
            candidate = next(starts, None) or self._neighbour(losses, draw)
            if candidate is None:
                break
            loss = score(candidate.groups)
            losses[candidate] = math.inf if math.isnan(loss) else loss
        best = min(losses, key=losses.__getitem__)
        return Found(
            groups_text(best.groups),
            losses[best],
            losses[adjacent],
            losses[slots],
            len(losses),
            self.budget,
            self.seed,
        )

    def _neighbour(self, losses: dict[_Candidate, float], draw: random.Random) -> _Candidate | None:
        """A move from the best grouping that has moves left; None if all that can be reached was scored."""
        for candidate in sorted(losses, key=losses.__getitem__):
            kinds = [
                [moved for moved in moves if moved not in losses]
                for moves in (_shifts(candidate.groups), _handovers(candidate.groups), self._windows(candidate))
            ]
            # The kind is drawn first: there are many more single layers than boundaries.
            left = [moves for moves in kinds if moves]
            if left:
                return draw.choice(draw.choice(left))
        return None

    def _windows(self, candidate: _Candidate) -> Iterator[_Candidate]:
        """The core's window begins or ends elsewhere, or moves: prelude and coda take the layers outside it."""
        if candidate.window is None:
            return
        pattern, (begin, end) = self.recurrence.parsed, candidate.window
        before, after = len(pattern.prelude), len(pattern.coda)
        for by in (sign * count for count in REACH for sign in (1, -1)):
            for first, last in ((begin + by, end), (begin, end + by), (begin + by, end + by)):
                fits = before <= first < last <= self.layers - after
                if not fits or (not before and first) or (not after and last < self.layers):
                    continue
                groups = tuple(slot_groups(self.layers, self.recurrence, first, last, share=False))
                if all(groups):
                    yield _Candidate(groups, (first, last))


def _shifts(groups: Groups) -> Iterator[_Candidate]:
    """The boundary between two groups moves: the last layers of one go to the next, or the first the other way."""
    for left, right in pairwise(range(len(groups))):
        for count in REACH:
            if count < len(groups[left]):
                yield _moved(groups, left, right, groups[left][-count:])
            if count < len(groups[right]):
                yield _moved(groups, right, left, groups[right][:count])


def _handovers(groups: Groups) -> Iterator[_Candidate]:
    """Any one layer goes to a neighbouring group."""
    for giver, group in enumerate(groups):
        for taker in (giver - 1, giver + 1):
            if len(group) > 1 and 0 <= taker < len(groups):
                yield from (_moved(groups, giver, taker, (layer,)) for layer in group)


def _moved(groups: Groups, giver: int, taker: int, layers: tuple[int, ...]) -> _Candidate:
    changed = list(groups)
    changed[giver] = tuple(layer for layer in groups[giver] if layer not in layers)
    changed[taker] = tuple(sorted({*groups[taker], *layers}))
    return _Candidate(tuple(changed))
