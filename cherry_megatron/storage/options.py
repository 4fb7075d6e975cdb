"""What the section `checkpoints` of a configuration says."""

from dataclasses import dataclass

from cherry_megatron.errors import CherryError


@dataclass(frozen=True)
class Checkpoints:
    """Which checkpoints of a run stay, and what happens when its newest one is damaged.

    Attributes:
        keep: so many of the newest stay; 0 for all.
        keep_every: those of the multiples of so many steps stay besides; 0 for none.
        fall_back: a training goes on from the newest older checkpoint that is whole; otherwise it stops.
    """

    keep: int = 0
    keep_every: int = 0
    fall_back: bool = True

    def __post_init__(self) -> None:
        if self.keep < 0 or self.keep_every < 0:
            raise CherryError("checkpoints.keep and checkpoints.keep_every must not be negative; 0 sets no limit")
        if self.keep_every and not self.keep:
            raise CherryError("checkpoints.keep_every does nothing without checkpoints.keep, with which all stay")
