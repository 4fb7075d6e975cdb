"""Saving: be told when Megatron has written a checkpoint, before it counts; no process that is not needed.

megatron.training has no callback for the first. Its integrity manifest is made at the right moment: on rank 0, when
every rank's files are on the disk and before the tracker file moves. What is written then is covered by it.
"""

import queue
from collections.abc import Callable
from pathlib import Path

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async

_save_integrity_manifest = serialization.save_integrity_manifest


def before_checkpoint_counts(written: Callable[[Path], None]) -> None:
    """Call `written(folder)` on rank 0 for each checkpoint from now on; a later call replaces the earlier."""

    def save(checkpoint_dir: str) -> None:
        written(Path(checkpoint_dir))
        _save_integrity_manifest(checkpoint_dir)

    serialization.save_integrity_manifest = save


def save_in_this_process() -> None:
    """Collect what the writing threads of a synchronous save report in a queue of this process.

    Megatron's own queue lives in a manager process on every rank, which first imports torch: seconds and memory
    that only an asynchronous save, whose writers are processes, has a use for.
    """
    filesystem_async._results_queue = queue.Queue()
