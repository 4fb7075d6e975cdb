"""What a configuration's `guards` section says."""

from dataclasses import dataclass
from typing import Literal, get_args

from cherry_megatron.errors import CherryError

Policy = Literal["stop", "skip", "rewind"]


@dataclass(frozen=True)
class Guards:
    """What is done when a step goes wrong, see monitor/guards.py.

    Attributes:
        not_finite: when the loss or the gradient norm is NaN or infinite: `stop`, `skip` the update, or `rewind`,
            go back to the last checkpoint and leave the batch out.
        spike: the same when the loss jumps; by default nothing.
        spike_sigmas: what a jump is: so many standard deviations above the mean of earlier steps.
        spike_window: of so many earlier steps.
        rewind_batches: the batch of the step and those before it, so many in all, are left out after a rewind.
        most: skipped steps in a row, or rewinds to one checkpoint; after them the run stops.
        leave_out: steps, counted from 1, whose batches are not learned from.
        hang_seconds: a step that takes longer ends the run, with the stack of every rank in its log; 0 is never.
        straggler: a rank that computes so many times as long as the median rank is told; 0 is none.
    """

    not_finite: Policy = "stop"
    spike: Policy | None = None
    spike_sigmas: float = 6.0
    spike_window: int = 128
    rewind_batches: int = 1
    most: int = 5
    leave_out: tuple[int, ...] = ()
    hang_seconds: int = 540
    straggler: float = 1.5

    def __post_init__(self) -> None:
        for name in ("not_finite", "spike"):
            policy = getattr(self, name)
            if policy not in (choices := get_args(Policy)) and (name, policy) != ("spike", None):
                raise CherryError(f"guards.{name} {policy!r} is not one of {', '.join(choices)}")
        for name in ("spike_window", "rewind_batches", "most"):
            if getattr(self, name) < 1:
                raise CherryError(f"guards.{name} {getattr(self, name)} must be at least 1")
        if not 2 <= self.spike_window <= 1000:
            raise CherryError(f"guards.spike_window {self.spike_window} is not from 2 to 1000")
        if not 0 < self.spike_sigmas < float("inf"):
            raise CherryError(f"guards.spike_sigmas {self.spike_sigmas} must be positive")
        if any(step < 1 for step in self.leave_out):
            raise CherryError(f"guards.leave_out {list(self.leave_out)}: steps are counted from 1")
        if self.hang_seconds < 0:
            raise CherryError(f"guards.hang_seconds {self.hang_seconds} is negative; 0 is never")
        if self.straggler != 0 and not 1 < self.straggler < float("inf"):
            raise CherryError(f"guards.straggler {self.straggler} must be more than 1, or 0 for none")

    @property
    def skips(self) -> bool:
        """Whether a step may have to be undone."""
        return "skip" in (self.not_finite, self.spike)
