"""Hear what Megatron reports while it trains, and leave out what would hide the rest.

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


def keep_texts(writer: Any, start: str) -> None:
    """Let texts whose tag begins otherwise go: Megatron writes each of its 900 arguments as one."""
    add_text = writer.add_text

    def add_ours(tag: str, *args: Any, **kwargs: Any) -> None:
        if tag.startswith(start):
            add_text(tag, *args, **kwargs)

    writer.add_text = add_ours
