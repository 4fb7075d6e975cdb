"""Bytes that a rank needs: the accounting of `cherry params`, with what a mixture needs at worst and libraries."""

from cherry_megatron.monitor.accounting import memory, most_walked
from cherry_megatron.planner.coefficients import Coefficients
from cherry_megatron.planner.hardware import Gpu
from cherry_megatron.planner.job import Job, Setting


def needed(job: Job, setting: Setting, measured: Coefficients) -> list[dict[str, float]]:
    """Bytes of a rank of each pipeline stage at their highest, by part, as torch counts what is allocated.

    A CUDA graph adds nothing: its pool takes the place of what the steps before it had.
    """
    layout = job.layout(setting)
    walked = None if job.mixture is None else most_walked(job.mixture, layout, job.batch)
    stages = memory(job.plan(setting.pipeline), job.shape, layout, job.recurrence, job.mixture, walked)
    for stage in stages:
        stage["libraries"] = measured.overhead
    return stages


def peak(stages: list[dict[str, float]]) -> float:
    """Bytes of the fullest rank."""
    return max(sum(stage.values()) for stage in stages)


def room(gpu: Gpu, measured: Coefficients) -> float:
    """Bytes that a training may have of a GPU."""
    return gpu.memory - measured.reserved
