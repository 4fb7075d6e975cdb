"""Hear what Megatron reports while it trains.

megatron.training has no callback for a finished step; what it hands to its TensorBoard writer on the
last rank is the only complete record (loss, gradient norm, learning rate).
"""

from collections.abc import Callable
from typing import Any


def listen(writer: Any, heard: Callable[[str, float, int], None]) -> None:
    """Call `heard(tag, value, iteration)` after each scalar that this writer object is given."""
    add_scalar = writer.add_scalar

    def add_and_tell(tag: str, value: Any, global_step: int | None = None, *args: Any, **kwargs: Any) -> None:
        add_scalar(tag, value, global_step, *args, **kwargs)
        heard(tag, float(value), int(global_step or 0))

    writer.add_scalar = add_and_tell
