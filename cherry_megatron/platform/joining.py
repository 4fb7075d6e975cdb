"""Ranks that do not find one another, in one sentence."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cherry_megatron.errors import CherryError


@contextmanager
def joining(source: Path) -> Iterator[None]:
    """Turn what is raised while the process group is made into one sentence.

    Args:
        source: the configuration's file.

    Raises:
        CherryError: naming the address.
    """
    try:
        yield
    except (torch.distributed.DistStoreError, torch.distributed.DistNetworkError) as error:
        if torch.distributed.is_initialized():
            raise
        traceback.print_exception(error, file=sys.stdout)  # into the log
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        if os.environ["RANK"] == "0":
            why = f"rank 0 cannot open {place}, or not all {os.environ['WORLD_SIZE']} ranks came there"
        else:
            why = f"rank {os.environ['RANK']} does not find rank 0 at {place}"
        raise CherryError(
            f"{source}: {why}; see that MASTER_ADDR and MASTER_PORT are right on all ranks and the port is free, "
            "and start all ranks again"
        ) from None
