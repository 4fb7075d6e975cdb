"""Be called before Megatron loads a checkpoint; megatron.training has no callback there.

Megatron-core 0.19.2 compares hashes on rank 0 alone, one file after the other, and only when it has read what
describes the checkpoint. What is called here compares them before, so that it need not.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.training import training

_load_checkpoint = training.load_checkpoint


def before_each_load(verify: Callable[[], None]) -> None:
    """Call `verify()` on all ranks before each load from now on; a later call replaces the earlier."""

    def load(*args: Any, **kwargs: Any) -> Any:
        verify()
        return _load_checkpoint(*args, **kwargs)

    training.load_checkpoint = load
    serialization.verify_integrity_manifest = lambda _: None
