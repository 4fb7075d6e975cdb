"""Be told when Megatron has written a checkpoint, before it counts.

megatron.training has no callback there. Its integrity manifest is made at the right moment: on rank 0, when
every rank's files are on the disk and before the tracker file moves. What is written then is covered by it.
"""

from collections.abc import Callable
from pathlib import Path

from megatron.core.dist_checkpointing import serialization

_save_integrity_manifest = serialization.save_integrity_manifest


def before_checkpoint_counts(written: Callable[[Path], None]) -> None:
    """Call `written(folder)` on rank 0 for each checkpoint from now on; a later call replaces the earlier."""

    def save(checkpoint_dir: str) -> None:
        written(Path(checkpoint_dir))
        _save_integrity_manifest(checkpoint_dir)

    serialization.save_integrity_manifest = save
