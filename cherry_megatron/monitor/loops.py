"""Statistics of the hidden state, loop by loop: does the recurrence still do something?

Two ways a loop can collapse (Geiping et al. 2025, arXiv 2502.05171, section 4.3): the states of all
tokens grow alike (token correlation near 1), or the state stops changing (relative change near 0). Either leads to
a model that ignores its loops: as good with one as with all.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

NAMES = ("residual_norm", "relative_change", "token_correlation")
# Beyond these a loop has collapsed.
_MOST_CORRELATION, _LEAST_CHANGE = 0.99, 1e-3
_LEAST_GAIN = 1e-3  # of the loss with one loop, by all others


class LoopTrace:
    """Collects, for every loop that this rank walks, sums that ranks add up to the global statistics.

    Statistics of a loop:
        residual_norm: root mean square of the hidden state after the loop.
        relative_change: `|after - before| / |before|`, Frobenius norms over all tokens.
        token_correlation: mean cosine between the states of two different tokens of a sequence.
    """

    def __init__(self, loops: int, sequence_parallel_group: torch.distributed.ProcessGroup | None) -> None:
        self._group = sequence_parallel_group
        # Rows: |after|^2, elements, |after - before|^2, |before|^2, sum of cosines, pairs.
        self._sums = torch.zeros(loops, 6, dtype=torch.float64)

    @torch.no_grad()
    def add(self, loop: int, before: Tensor | None, after: Tensor) -> None:
        """Take one walk of the core (or, in order `sequence`, of one of its layers).

        Args:
            loop: which walk.
            before: [s, b, h], or None where an earlier pipeline stage began the walk; such a loop has
                no relative change.
            after: [s, b, h].
        """
        after = after.detach().float()
        before = None if before is None else before.detach().float()
        unit_sum = torch.nn.functional.normalize(after, dim=-1).sum(0)  # [b, h]
        tokens = after.shape[0]
        if self._group is not None and self._group.size() > 1:
            torch.distributed.all_reduce(unit_sum, group=self._group)
            tokens *= self._group.size()
        sequences = after.shape[1]
        # sum over pairs of distinct tokens of cos = |sum of unit vectors|^2 - tokens
        share = 1.0 if self._group is None else 1.0 / self._group.size()
        cosines = (unit_sum.square().sum() - tokens * sequences) * share
        pairs = tokens * (tokens - 1) * sequences * share
        row: list[Tensor | float] = [
            after.square().sum(), after.numel(),
            0.0 if before is None else (after - before).square().sum(),
            0.0 if before is None else before.square().sum(),
            cosines, pairs,
        ]  # fmt: skip
        self._sums[loop] += torch.tensor([float(value) for value in row], dtype=torch.float64)

    def reduce(self, groups: ProcessGroupCollection) -> dict[str, list[float]]:
        """The statistics of each loop over all ranks; every rank must call it.

        Loops that no rank walked are left out; NaN stands where a loop has no relative change.
        """
        sums = self._sums.float().to(torch.cuda.current_device())
        for group in (groups.dp_cp, groups.pp, self._group):
            if group is not None and group.size() > 1:
                torch.distributed.all_reduce(sums, group=group)
        sums = sums[sums[:, 1] > 0].double().cpu()
        columns = sums.T
        return {
            "residual_norm": (columns[0] / columns[1]).sqrt().tolist(),
            "relative_change": (columns[2] / columns[3]).sqrt().tolist(),
            "token_correlation": (columns[4] / columns[5].clamp(min=1)).tolist(),
        }


def alarms(statistics: dict[str, list[float]], losses: dict[int, float]) -> list[str]:
    """A line for each sign of collapse at an evaluation.

    Args:
        statistics: of each loop, as `LoopTrace.reduce` gives them.
        losses: held-out loss by number of loops.
    """
    found = []
    alike = [loop for loop, value in enumerate(statistics["token_correlation"], 1) if value > _MOST_CORRELATION]
    still = [loop for loop, value in enumerate(statistics["relative_change"], 1) if value < _LEAST_CHANGE]
    if alike:
        found.append(
            f"loops {alike} have made all tokens alike: their token correlation is above {_MOST_CORRELATION}"
        )
    if still:
        found.append(f"loops {still} do nothing: their relative change of the state is below {_LEAST_CHANGE}")
    fewest, most = min(losses), max(losses)
    if fewest < most and abs(losses[fewest] - losses[most]) < _LEAST_GAIN * losses[fewest]:
        found.append(
            f"the model ignores its loops: their number is {fewest} or {most}, its loss {losses[fewest]:.4f} or "
            f"{losses[most]:.4f}"
        )
    return found
