"""The fastest setting that fits, those behind it, and why they are behind."""

from dataclasses import dataclass
from functools import cached_property

from cherry_megatron.errors import CherryError
from cherry_megatron.planner.candidates import allowed, candidates
from cherry_megatron.planner.hardware import GPUS
from cherry_megatron.planner.job import Job, Setting
from cherry_megatron.planner.memory import needed, peak, room
from cherry_megatron.planner.rates import Rates
from cherry_megatron.planner.step import Step, predict

# Of settings this close the plainest is proposed: the model does not tell them apart.
_ALIKE = 0.01
_SHOWN = 6
_MOST_GPUS = 4096  # that are tried where none fits


@dataclass(frozen=True)
class Candidate:
    """A setting with what it would take.

    Attributes:
        setting: it.
        memory: bytes of a rank of each pipeline stage, by part.
        step: the predicted step.
    """

    setting: Setting
    memory: list[dict[str, float]]
    step: Step

    @cached_property
    def peak(self) -> float:
        """Bytes of the fullest rank."""
        return peak(self.memory)

    @property
    def kind(self) -> tuple[int, int, int, int, bool, bool]:
        """All but the micro-batch."""
        s = self.setting
        return s.tensor, s.pipeline, s.expert, s.expert_tensor, s.recompute, s.graph


@dataclass(frozen=True)
class Choice:
    """What `choose` found.

    Attributes:
        job: of what.
        rates: the GPU.
        best: the proposal.
        others: the best of each other kind, fastest first, with why it is not proposed.
        tried: how many settings there are, and how many of them fit.
    """

    job: Job
    rates: Rates
    best: Candidate
    others: list[tuple[Candidate, str]]
    tried: tuple[int, int]


def weigh(job: Job, setting: Setting, rates: Rates) -> Candidate:
    """What a setting would take."""
    return Candidate(setting, needed(job, setting, rates.measured), predict(job, setting, rates))


def choose(job: Job, gpus: int, rates: Rates) -> Choice:
    """Propose a setting.

    Raises:
        CherryError: if no setting is allowed, or none fits, with what would.
    """
    found = [weigh(job, setting, rates) for setting in candidates(job, gpus, rates.gpu.host)]
    if not found:
        several = job.instances > 1
        raise CherryError(
            f"{job.config.source}: no layout shares out {job.batch} sequences a step over {gpus} GPUs"
            + f" with {job.instances} num-distributed-optimizer-instances" * several
            + "; use a number of GPUs that divides them"
            + " and that the instances divide" * several
            + f", or set megatron.global-batch-size to a multiple of {gpus}"
        )
    most = room(rates.gpu, rates.measured)
    fitting = sorted((one for one in found if one.peak <= most), key=lambda one: one.step.seconds)
    best = _plainest(job, fitting)
    if best is None and fitting:
        raise CherryError(allowed(job, fitting[0].setting))  # what `candidates` does not know of
    if best is None:
        raise CherryError(_what_would_fit(job, gpus, rates, min(found, key=lambda one: one.peak)))
    return Choice(job, rates, best, _others(job, found, best, most), (len(found), len(fitting)))


def _plainest(job: Job, fitting: list[Candidate]) -> Candidate | None:
    """Of the fastest, and those no slower than a hundredth, the one with the fewest parts and the least memory."""
    legal = (one for one in fitting if allowed(job, one.setting) is None)
    fastest = next(legal, None)
    if fastest is None:
        return None
    alike = [fastest]
    for one in legal:
        if one.step.seconds > fastest.step.seconds * (1 + _ALIKE):
            break
        alike.append(one)
    return min(alike, key=lambda one: (one.setting.pipeline, one.setting.tensor, one.setting.recompute, one.peak))


def _others(job: Job, found: list[Candidate], best: Candidate, most: float) -> list[tuple[Candidate, str]]:
    """The best of each kind: of those that fit the fastest, else the smallest."""
    kinds: dict[tuple, Candidate] = {}
    for one in sorted(found, key=lambda one: (one.peak > most, one.step.seconds if one.peak <= most else one.peak)):
        if one.kind != best.kind or one.setting.micro_batch != best.setting.micro_batch:
            kinds.setdefault(one.kind, one)
    ranked = sorted(kinds.values(), key=lambda one: one.step.seconds)
    legal = (one for one in ranked if allowed(job, one.setting) is None)
    return [(one, why_not(one, best, most)) for one, _ in zip(legal, range(_SHOWN), strict=False)]


def why_not(one: Candidate, best: Candidate, most: float) -> str:
    """Why a setting is not the proposal, in a few words."""
    if one.peak > most:
        return f"does not fit: {one.peak / 2**30:.1f} GiB of {most / 2**30:.1f}"
    slower = one.step.seconds / best.step.seconds - 1
    more = {part: seconds - best.step.parts[part] for part, seconds in one.step.parts.items()}
    part = max(more, key=lambda name: more[name])
    if slower <= _ALIKE:
        more_bytes = one.peak - best.peak
        return f"as fast, with {more_bytes / 2**30:.1f} GiB more" if more_bytes > 0 else "as fast, but less plain"
    return f"{slower:.0%} slower: {part} {more[part] * 1e3:+,.0f} ms"


def _what_would_fit(job: Job, gpus: int, rates: Rates, least: Candidate) -> str:
    """The sentence for a model that is too large."""
    most = room(rates.gpu, rates.measured) / 2**30
    more = gpus * 2
    while more <= _MOST_GPUS:
        settings = candidates(job, more, rates.gpu.host)
        if any(peak(needed(job, one, rates.measured)) <= most * 2**30 for one in settings):
            would = f"{more} GPUs would do"
            break
        more *= 2
    else:
        larger = [name for name, gpu in GPUS.items() if room(gpu, rates.measured) >= least.peak]
        would = f"{gpus} {larger[0].upper()}s would do" if larger else "use shorter sequences or a smaller model"
    return (
        f"{job.config.source}: no layout fits {gpus} {rates.gpu.name}s: the smallest ({least.setting}) needs "
        f"{least.peak / 2**30:.1f} GiB of a GPU and there are {most:.1f}; {would}"
    )
