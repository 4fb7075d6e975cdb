"""The settings that a configuration's rules allow on so many GPUs."""

from collections.abc import Iterator
from itertools import product

from cherry_megatron.errors import CherryError
from cherry_megatron.model.pattern import MOE
from cherry_megatron.planner.job import PLANNED, Job, Setting, configured

_MOST_SEQUENCES = 32  # of a micro-batch
_DEEPEST = 32  # pipeline stages


def candidates(job: Job, gpus: int, host: int) -> Iterator[Setting]:
    """All that the rules allow, as far as they can be told from sizes; `allowed` asks the rules themselves.

    Args:
        job: of what.
        gpus: how many.
        host: GPUs of a host, over which no layer is cut.
    """
    for tensor, pipeline in product(_divisors(gpus, host), _divisors(gpus, _DEEPEST)):
        if gpus % (tensor * pipeline) or not _cuts(job, tensor) or not _stages(job, pipeline):
            continue
        data = gpus // (tensor * pipeline)
        if job.batch % data or data % job.instances:
            continue
        for (expert, within), recompute, graph in product(
            _experts(job, tensor, pipeline, data), (False, True), (False, True)
        ):
            if not _goes(job, pipeline, recompute, graph):
                continue
            for micro_batch in _divisors(job.batch // data, _MOST_SEQUENCES):
                setting = Setting(tensor, pipeline, expert, data, micro_batch, recompute, graph, within)
                if _given(job, setting):
                    yield setting


def allowed(job: Job, setting: Setting) -> str | None:
    """What the configuration's own rules say against a setting, or None."""
    try:
        configured(job, setting)
    except CherryError as error:
        return str(error)
    return None


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0]


def _cuts(job: Job, tensor: int) -> bool:
    shape = job.shape
    sizes = (shape.heads, shape.groups, shape.ffn, shape.vocabulary, job.sequence)
    return not any(size % tensor for size in sizes)


def _stages(job: Job, pipeline: int) -> bool:
    if pipeline == 1:
        return True
    if job.mixture is not None or (job.depths and job.shape.tied):
        return False
    if job.recurrence.random_loops and job.overlap:
        return False
    try:
        plan = job.plan(pipeline)
    except CherryError:  # more stages than layers
        return False
    layers = plan.pattern.layers
    return not job.config.has_experts or all(any(MOE in layers[layer] for layer in held) for held in plan.held)


def _experts(job: Job, tensor: int, pipeline: int, data: int) -> Iterator[tuple[int, int]]:
    """Expert-parallel size and tensor-parallel size of an expert."""
    if job.mixture is not None:
        yield from ((size, tensor) for size in _divisors(job.mixture.experts, data) if data % size == 0)
    elif not job.config.has_experts:
        yield 1, tensor
    else:
        for within in sorted({1, tensor}):
            if job.shape.expert_ffn % within:
                continue
            for size in _divisors(job.shape.experts, data * tensor // within):
                ranks = within * size
                if data * tensor % ranks == 0 and (ranks % tensor == 0 or tensor % ranks == 0):
                    yield size, within


def _goes(job: Job, pipeline: int, recompute: bool, graph: bool) -> bool:
    """Whether recomputation and a CUDA graph go with the rest (section_rules.py, expert_rules.py)."""
    recurrence, config = job.recurrence, job.config
    if recompute and recurrence.random_loops and job.overlap:
        return False
    if not graph:
        return True
    varies = (job.mixture is not None and job.mixture.routes) or config.has_experts or recurrence.random_loops
    batches = config.value("rampup-batch-size") or config.value("step-batch-size-schedule")
    skips = config.sgt is not None and config.sgt.skip_head
    short = job.sequence < 128 and config.value("attention-backend").name != "unfused"
    return not (varies or batches or skips or short or recompute or pipeline > 1)


def _given(job: Job, setting: Setting) -> bool:
    """Whether a setting has the values of the flags that are given after `--`."""
    has = dict(
        zip(
            PLANNED,
            (
                setting.tensor, setting.pipeline, setting.expert, setting.expert_tensor, setting.tensor > 1,
                setting.micro_batch, "full_iteration" if setting.graph else "none",
                "full" if setting.recompute else None,
            ),
            strict=False,
        )
    )  # fmt: skip
    return all(job.fixed(flag) in (None, value) for flag, value in has.items())
