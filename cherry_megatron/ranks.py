"""What all ranks must know alike."""

from collections.abc import Callable
from typing import Any, cast

import torch

from cherry_megatron.errors import CherryError


def as_first_rank[T](find: Callable[[], T]) -> T:
    """What rank 0 finds, on all ranks: on a shared file system another may see it otherwise, or later.

    Args:
        find: called on rank 0 alone.

    Raises:
        CherryError: on all ranks, what `find` raises: one, or an OSError as one.
    """
    answer: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            answer[0] = find()
        except CherryError as error:
            answer[1] = str(error)
        except OSError as error:
            answer[1] = f"{error.filename}: {error.strerror or error}"
    torch.distributed.broadcast_object_list(answer)
    found, why = answer
    if why is not None:
        raise CherryError(why)
    return cast(T, found)
