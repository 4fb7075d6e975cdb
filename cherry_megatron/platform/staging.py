"""Copies of a rank's tensors in memory of the host, from which they are written.

The memory is taken at the first save, pinned if the copies are of a GPU's tensors, and used again by the next:
new memory costs more than the copy does, and torch's own pinned memory is rounded up to powers of two, tensor by
tensor.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from cherry_megatron.storage.integrity import THREADS

_ALIGNED = 64  # bytes


class Staging:
    """Memory for the tensors of one save at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._is_pinned = False

    def staged(self, buckets: list[Any], alive: bool) -> list[Any]:
        """Megatron's buckets, with tensors on the host.

        Args:
            buckets: path, name, and objects and tensors to write, for each file.
            alive: copy also tensors that are on the host already, because training goes on and changes them.
        """
        tensors = [one for *_, (_, pairs) in buckets for _, one in pairs if alive or one.device.type != "cpu"]
        copies = {id(one): copy for one, copy in zip(tensors, self._copies(tensors), strict=True)}
        return [
            (path, name, (objects, [(item, copies.get(id(one), one)) for item, one in pairs]))
            for path, name, (objects, pairs) in buckets
        ]

    def _copies(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        places, end = [], 0
        for one in tensors:
            places.append(end)
            end += -(-one.nbytes // _ALIGNED) * _ALIGNED
        from_gpu = any(one.is_cuda for one in tensors)
        self._take(end, from_gpu)
        memory, copies = self._memory.numpy(), []
        for one, at in zip(tensors, places, strict=True):
            # By NumPy each gets a storage of its own: torch.save writes storages whole.
            copy = torch.from_numpy(memory[at : at + one.nbytes]).view(one.dtype).view(one.shape)
            copies.append(copy.copy_(one, non_blocking=True))
        if from_gpu:
            torch.cuda.synchronize()
        return copies

    def _take(self, size: int, pinned: bool) -> None:
        """Have at least so many bytes."""
        if self._memory.nbytes >= size and self._is_pinned >= pinned:
            return
        if self._is_pinned:
            _check(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()))
            self._is_pinned = False
        self._memory = torch.empty(0, dtype=torch.uint8)  # freed before there is more
        self._memory = torch.empty(size, dtype=torch.uint8)
        with ThreadPoolExecutor(THREADS) as threads:  # the system gives pages to several threads faster than to one
            list(threads.map(torch.Tensor.zero_, self._memory.chunk(THREADS)))
        if pinned:
            _check(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0))
            self._is_pinned = True  # not before: a save that failed here is no reason for the next to unregister


def _check(answer: Any) -> None:
    """What CUDA answers is no error; torch.cuda.check_error compares enumerations, which no number equals."""
    if code := int(answer):
        raise torch.cuda.CudaError(code)
