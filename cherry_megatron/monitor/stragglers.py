"""How long each rank computes in a step, and ranks that take longer than the others.

The time of a whole step says nothing: all ranks end it together. What is taken is the time from the first pass to
where this rank has its gradients and the sum over data-parallel replicas begins. Ranks of one replica wait for each
other before that too, so a slow one slows its replica. Nothing is taken of a CUDA graph that is replayed.
"""

import socket
import statistics
import time
from typing import Any

import torch

from cherry_megatron.monitor.progress import Progress

_LEAST = 5  # steps of an interval that say something


class RankTimes:
    """Collects the times of this rank, and compares them over ranks at the end of an interval.

    Args:
        progress: where it is told.
        ratio: tell of ranks that compute so many times as long as the median rank; 0 is none.
    """

    def __init__(self, progress: Progress, ratio: float) -> None:
        self._progress, self._ratio = progress, ratio
        self._seconds: list[float] = []
        self._begin: Any = None
        self._end: Any = None
        self._hosts: list[Any] = []

    def begin(self) -> None:
        """Before the passes of a step."""
        self._begin, self._end = _now(), None

    def summing(self) -> None:
        """This rank has its gradients."""
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self._end = _now()

    def finish(self, iteration: int) -> None:
        """After a step, on all ranks."""
        if self._end is not None:
            self._seconds.append(_between(self._begin, self._end))
        world = torch.distributed.get_world_size()
        if world == 1 or not self._ratio or not self._progress.ends_interval(iteration):
            return
        if not self._hosts:
            self._hosts = [None] * world
            torch.distributed.all_gather_object(self._hosts, socket.gethostname())
        enough = len(self._seconds) >= _LEAST
        mine = torch.zeros(world, dtype=torch.float64, device=torch.cuda.current_device())
        mine[torch.distributed.get_rank()] = statistics.median(self._seconds) if enough else 0.0
        self._seconds.clear()
        torch.distributed.all_reduce(mine)
        self._compare(mine.tolist(), iteration)

    def _compare(self, seconds: list[float], iteration: int) -> None:
        median, slowest = statistics.median_low(seconds), max(seconds)
        if not min(seconds) or not self._progress.records:
            return
        self._progress.ranks = {"median": median, "slowest": slowest, "rank": seconds.index(slowest)}
        self._progress.scalar("ranks/median-seconds", median, iteration)
        self._progress.scalar("ranks/slowest-seconds", slowest, iteration)
        for rank in slow_ranks(seconds, self._ratio):
            text = (
                f"rank {rank} on {self._hosts[rank]} is slow: it computes {seconds[rank]:.3f} s of a step, "
                f"{seconds[rank] / median:.1f} times the median rank's {median:.3f} s"
            )
            self._progress.alarm("straggler", text, iteration)


def slow_ranks(seconds: list[float], ratio: float) -> list[int]:
    """The ranks that take so many times as long as the median; of an even number the lower median counts."""
    limit = ratio * statistics.median_low(seconds)
    return [rank for rank, taken in enumerate(seconds) if taken >= limit]


def _now() -> Any:
    """On a GPU an event of the stream: what the host has only started is not computed."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Any, end: Any) -> float:
    """Seconds; the gradient's norm, which has been waited for since, comes behind both events."""
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000
