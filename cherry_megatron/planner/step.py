"""Seconds of a training step: micro-batches over pipeline stages, exchange of gradients and weights, optimizer.

The way of counting, operation by operation with measured efficiencies, is that of Calculon (Isaev et al. 2023,
"Calculon: a methodology and tool for high-level co-design of systems and large language models"); the pipeline's
that of Narayanan et al. 2021 (arXiv 2104.04473).
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import log, log2

from cherry_megatron.model.plan import Plan
from cherry_megatron.monitor.accounting import held_parameters
from cherry_megatron.planner.job import Job, Setting
from cherry_megatron.planner.rates import Rates
from cherry_megatron.planner.walk import Both, Pass, Walk

PARTS = (
    "matrix products", "attention", "element-wise", "exchange within layers", "waiting for Python",
    "pipeline bubble", "gradients and weights", "optimizer", "once a step", "waiting for other ranks",
)  # fmt: skip
# Bytes of the optimizer's step: for each weight of the rank's share gradient, both moments and master read, the
# last three written, the gradient's norm and its clipping; for each weight here its gradient set to zero.
_OF_SHARE, _OF_ALL = 40, 4
_GRADIENT = 4  # bytes, float32
_UNEVEN = 4  # the larger it is, the sharper the line between waiting for the GPU and waiting for Python


@dataclass(frozen=True)
class Step:
    """A predicted step.

    Attributes:
        parts: seconds by `PARTS`, of the slowest pipeline stage.
        tokens: of it.
    """

    parts: dict[str, float]
    tokens: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def speed(self) -> float:
        """Tokens a second of all ranks."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Stage:
    """One pipeline stage's micro-batch: its phases, each about as long as the slower of GPU and Python takes.

    A little longer where both are alike: now the one is ahead, now the other, as kernels are of all lengths.

    Attributes:
        phases: forward, recomputation, backward; those that are there.
        graph: nothing waits for Python.
    """

    phases: tuple[Pass, ...]
    graph: bool

    @cached_property
    def busy(self) -> Pass:
        return sum(self.phases, Pass())

    @cached_property
    def seconds(self) -> float:
        if self.graph:
            return self.busy.gpu
        return sum((phase.gpu**_UNEVEN + phase.host**_UNEVEN) ** (1 / _UNEVEN) for phase in self.phases)


def predict(job: Job, setting: Setting, rates: Rates) -> Step:
    """A step of a job under a setting."""
    plan = job.plan(setting.pipeline)
    stages = [_stage(job, setting, rates, plan, number) for number in range(setting.pipeline)]
    count = job.micro_batches(setting)
    slowest = max(stages, key=lambda stage: stage.seconds)
    whole = (count - 1) * slowest.seconds + sum(stage.seconds for stage in stages)
    parts = dict.fromkeys(PARTS, 0.0)
    _add(parts, slowest.busy, count)
    parts["waiting for Python"] = count * (slowest.seconds - slowest.busy.gpu)
    parts["pipeline bubble"] = whole - count * slowest.seconds
    several = count > 1 or setting.pipeline > 1
    if job.first_pass or (job.config.has_experts and job.config.balance and several):
        again = Stage(slowest.phases[:1], slowest.graph)
        _add(parts, again.busy, count)
        parts["waiting for Python"] += count * (again.seconds - again.busy.gpu)
        parts["pipeline bubble"] += (setting.pipeline - 1) * again.seconds
    parts["gradients and weights"] = max(
        _exchanged(job, setting, rates, plan, number, stage) for number, stage in enumerate(stages)
    )
    parts["optimizer"] = max(_optimizer(job, setting, rates, plan, number) for number in range(setting.pipeline))
    parts["once a step"] = rates.measured.host_step
    # The slowest of n ranks is late by about the square root of the logarithm of n.
    if setting.gpus > 1:
        parts["waiting for other ranks"] = sum(parts.values()) * rates.measured.skew * log2(setting.gpus) ** 0.5
    return Step(parts, job.tokens)


def _add(parts: dict[str, float], busy: Pass, times: int) -> None:
    names = ("matrix products", "attention", "element-wise", "exchange within layers")
    for name, seconds in zip(names, (busy.products, busy.attention, busy.elementwise, busy.exchange), strict=True):
        parts[name] += times * seconds


def _stage(job: Job, setting: Setting, rates: Rates, plan: Plan, number: int) -> Stage:
    """A micro-batch of one stage; of a mixture, of all experts of the busiest rank."""
    walk = Walk(job, setting, rates, rows_of(job, setting))
    here = job.mixture.experts // setting.expert if job.mixture else 1
    forward, backward, again = Pass(), Pass(), Pass()
    for (symbols, looped, learns), times in _walked(job, plan, number).items():
        for symbol in symbols:
            there, back = walk.sublayer(symbol, looped)
            forward += there * times
            backward += back * (times * learns)
            again += there * (times * learns * setting.recompute)
    ends: list[Both] = [walk.embedding()] * (number == 0)
    if number == setting.pipeline - 1:
        ends += [walk.head()] + [walk.ahead()] * job.depths
    for there, back in ends:
        forward, backward = forward + there, backward + back
    forward, backward, again = forward * here, backward * here, again * here
    sent = _sent(job, setting, rates, number)
    each = Pass(host=rates.measured.host_micro_batch / 2)
    gathered = Pass(elementwise=rates.stream(_held(job, setting, plan, number) * (job.width + 2 * _GRADIENT)))
    phases = (forward + sent + each, again, backward + sent + each + gathered)
    return Stage(tuple(phase for phase in phases if phase.gpu), setting.graph)


def _walked(job: Job, plan: Plan, number: int) -> Counter[tuple[str, bool, bool]]:
    """How often a stage walks layers of the same kind: sublayers, whether of the core, whether with a gradient."""
    found: Counter[tuple[str, bool, bool]] = Counter()
    loops = _loops(job)
    for visit in plan.stages[number]:
        looped = plan.is_core_symbol(plan.pattern.first_symbol(visit.layer)) and plan.pattern.loops > 1
        if visit.loop is None or visit.loop < loops:
            found[plan.pattern.layers[visit.layer], looped, not job.recurrence.is_cut(visit)] += 1
    return found


def _loops(job: Job) -> int:
    """Of a step, on average."""
    drawn = job.recurrence.random_loops
    return round(sum(drawn) / 2) if drawn else job.recurrence.loops


def rows_of(job: Job, setting: Setting) -> float:
    """Sequences that an expert of the busiest rank walks in a micro-batch; of a single model, the micro-batch.

    Where sequences choose, the busiest of n ranks has about sqrt(2 ln n) standard deviations more than its share,
    and the others wait for it; not if all are forced to be alike.
    """
    mixture = job.mixture
    if mixture is None:
        return setting.micro_batch
    sequences = setting.micro_batch * setting.expert
    here = mixture.experts // setting.expert
    share = mixture.top_k / mixture.experts
    mean, spread = here * sequences * share, (here * sequences * share * (1 - share)) ** 0.5
    busiest = mean if job.balanced else mean + spread * (2 * log(setting.expert)) ** 0.5
    # An expert without a sequence walks one that does not count.
    return max(min(busiest, here * sequences) / here, 1.0)


def _sent(job: Job, setting: Setting, rates: Rates, number: int) -> Pass:
    """States that a stage hands on in one direction, and what the experts' ranks tell one another."""
    seconds = calls = 0.0
    if setting.pipeline > 1:
        size = setting.micro_batch * job.sequence * job.shape.hidden * job.width / setting.tensor
        size *= 2 if job.recurrence.injection == "add" else 1
        ends = number in (0, setting.pipeline - 1)
        calls = 1.0 if ends else 2.0
        seconds = calls * rates.send(size, setting.gpus <= rates.gpu.host)
    if job.mixture and setting.expert > 1:
        calls += 3
        seconds += 3 * rates.measured.latency * log2(setting.expert)
    return Pass(exchange=seconds, host=calls * rates.measured.host_exchange)


def _held(job: Job, setting: Setting, plan: Plan, number: int) -> float:
    layout = job.layout(setting)
    return sum(held_parameters(plan, job.shape, layout, job.recurrence, job.mixture, number))


def _exchanged(job: Job, setting: Setting, rates: Rates, plan: Plan, number: int, stage: Stage) -> float:
    """Seconds by which the exchange of gradients and weights makes a step longer.

    A weight's gradient is whole when the backward pass has left its last walk. That of the core, of what lies
    before it and of the embedding is whole at the end alone, so only the others' exchange can lie beside the pass;
    likewise of the weights, which the first loop needs all.
    """
    layout = job.layout(setting)
    held = held_parameters(plan, job.shape, layout, job.recurrence, job.mixture, number)
    late = _late(job, plan, number)
    exposed = 0.0
    for ranks, parameters in zip(layout.copies(job.mixture is not None), held, strict=False):
        if not parameters:
            continue
        shards = max(ranks // layout.instances, 1)
        here = max(rates.gpu.host * ranks // (setting.data * setting.tensor), 1)
        # Gradients are summed over an instance of the optimizer, then a rank's share of them over the instances.
        summed = rates.exchange("reduce-scatter", parameters * _GRADIENT, shards, min(shards, here))
        others = ranks // shards
        summed += rates.exchange(
            "all-reduce", parameters * _GRADIENT / shards, others, min(others, max(here // shards, 1))
        )
        gathered = rates.exchange("all-gather", parameters * job.width, shards, min(shards, here))
        for seconds, beside in ((summed, stage.phases[-1]), (gathered, stage.phases[0])):
            exposed += seconds - (min(seconds * (1 - late), beside.gpu) if job.overlap else 0.0)
    return exposed + _tied(job, setting, rates, plan, number)


def _late(job: Job, plan: Plan, number: int) -> float:
    """Share of a stage's weights whose gradient is whole at the end of the backward pass alone."""
    shape, pattern = job.shape, plan.pattern
    first = len(pattern.prelude) + len(pattern.core)
    weights = {layer: shape.matmul_weights(pattern.layers[layer]) for layer in plan.held[number]}
    late = sum(size for layer, size in weights.items() if layer < first and pattern.loops > 1)
    late += shape.vocabulary_weights * (number == 0)
    whole = sum(weights.values()) + shape.vocabulary_weights * ((number == 0) + (number == len(plan.stages) - 1))
    return late / whole


def _tied(job: Job, setting: Setting, rates: Rates, plan: Plan, number: int) -> float:
    """Seconds to sum the gradients of copies over stages, after all else (docs/parallelism.md)."""
    copies = [layer for layer in plan.held[number] if len(plan.holders(layer)) > 1]
    size = _GRADIENT * sum(job.shape.matmul_weights(plan.pattern.layers[layer]) for layer in copies)
    ranks = max((len(plan.holders(layer)) for layer in copies), default=1)
    here = max(rates.gpu.host // (setting.data * setting.tensor), 1)
    return rates.exchange("all-reduce", size / setting.tensor, ranks, min(here, ranks))


def _optimizer(job: Job, setting: Setting, rates: Rates, plan: Plan, number: int) -> float:
    layout = job.layout(setting)
    held = held_parameters(plan, job.shape, layout, job.recurrence, job.mixture, number)
    share = sum(each / ranks for each, ranks in zip(held, layout.shards(job.mixture is not None), strict=False))
    return rates.stream(_OF_SHARE * share + _OF_ALL * sum(held))
