"""What a configuration's `sgt` section says."""

from dataclasses import dataclass

from cherry_megatron.data.marks import ANSWERS
from cherry_megatron.errors import CherryError


@dataclass(frozen=True)
class Selective:
    """Which tokens are supervised, and how much the others count.

    Attributes:
        marks: NAME of the marks beside the tokens, made by `cherry select`.
        top_loss: instead of marks: the share of each global batch with the highest loss, selected as it comes.
        alpha: weight of the selected tokens' mean loss; the mean over all tokens has the rest.
        alpha_start: alpha of the first step; by default alpha itself.
        alpha_steps: steps over which alpha goes from alpha_start to its value, linearly.
        skip_head: leave the output layer out for tokens that do not count; needs alpha 1.
        probe_interval: every so many steps, measure the gradient coupling; 0 is never.
        probe_loops: at these steps, measure it loop by loop too.
    """

    marks: str | None = None
    top_loss: float | None = None
    alpha: float = 0.7
    alpha_start: float | None = None
    alpha_steps: int = 0
    skip_head: bool = False
    probe_interval: int = 0
    probe_loops: bool = False

    def __post_init__(self) -> None:
        if (self.marks is None) == (self.top_loss is None):
            raise CherryError(
                "sgt needs either marks, the name that `cherry select` gave them, or top_loss, a share"
            )
        if self.marks == ANSWERS:
            raise CherryError(f"sgt.marks {ANSWERS} are no selection: only they are output tokens anyway")
        if self.top_loss is not None and not 0 < self.top_loss <= 1:
            raise CherryError(f"sgt.top_loss {self.top_loss} is no share of the tokens; e.g. 0.15")
        for name, alpha in (("alpha", self.alpha), ("alpha_start", self.alpha_start)):
            if alpha is not None and not 0 <= alpha <= 1:
                raise CherryError(f"sgt.{name} {alpha} is not from 0 to 1")
        if (self.alpha_start is None) != (self.alpha_steps == 0) or self.alpha_steps < 0:
            raise CherryError("sgt.alpha_start and sgt.alpha_steps, a positive number, go together")
        if self.probe_interval < 0:
            raise CherryError(f"sgt.probe_interval {self.probe_interval} is negative; 0 is never")
        if self.probe_loops and not self.probe_interval:
            raise CherryError("sgt.probe_loops needs sgt.probe_interval")
        if self.skip_head and (self.alpha, self.alpha_start) != (1.0, None):
            raise CherryError("sgt.skip_head needs sgt.alpha 1 from the first step: below, every token counts")

    def alpha_at(self, iteration: int) -> float:
        """Alpha in a step, the first of which is 0."""
        if self.alpha_start is None or iteration >= self.alpha_steps:
            return self.alpha
        return self.alpha_start + (self.alpha - self.alpha_start) * iteration / self.alpha_steps
