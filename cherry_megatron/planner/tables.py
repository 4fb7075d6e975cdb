"""What `cherry plan` prints."""

import yaml

from cherry_megatron.monitor.accounting import PEAK_BF16, training_flops
from cherry_megatron.planner.choice import Candidate, Choice
from cherry_megatron.planner.coefficients import Coefficients
from cherry_megatron.planner.job import Job, settled
from cherry_megatron.planner.memory import room

_MEMORY = ("weights", "gradients", "optimizer", "activations", "workspace", "libraries")


def plan_table(choice: Choice) -> str:
    """The proposal, what to set for it, its memory and time by part, and what is behind it."""
    job, best, rates = choice.job, choice.best, choice.rates
    changes = settled(job, best.setting)
    return "\n".join(
        [
            f"{job.config.source} on {best.setting.gpus} {rates.gpu.name}, {job.batch} sequences of {job.sequence} "
            "a step",
            *about(rates.measured),
            *(f"Not counted: {part}." for part in job.not_counted),
            "",
            f"proposal: {best.setting}",
            f"  {best.step.seconds:.3f} s a step, {best.step.speed:,.0f} tokens/s, MFU {_mfu(job, best):.1%}, "
            f"{best.peak / 2**30:.1f} of {room(rates.gpu, rates.measured) / 2**30:.1f} GiB of a GPU",
            "  set: " + (" ".join(f"--set {key}={_value(value)}" for key, value in changes.items()) or "nothing"),
            "",
            *_memory_lines(best),
            "",
            *_time_lines(best),
            "",
            f"behind it, of {choice.tried[0]} settings of which {choice.tried[1]} fit (the best of each kind):",
            *_other_lines(choice),
        ]
    )


def about(measured: Coefficients) -> list[str]:
    """Where the numbers are from."""
    lines = [f"Coefficients: {measured.source}."]
    if not measured.calibrated:
        lines.append(
            "They are not calibrated on this kind of machine yet: see docs/planner.md for what that means."
        )
    return lines


def _mfu(job: Job, one: Candidate) -> float:
    flops = training_flops(job.recurrence, job.shape, job.sequence, job.mixture, job.depths)
    return one.step.speed * flops / one.setting.gpus / PEAK_BF16


def _value(value: object) -> str:
    """As `--set` takes it."""
    return "null" if value is None else yaml.safe_dump(value).removesuffix("...\n").strip()


def _memory_lines(best: Candidate) -> list[str]:
    lines = [f"{'GiB of a rank':<15}" + "".join(f"{name:>13}" for name in (*_MEMORY, "together"))]
    for number, stage in enumerate(best.memory):
        cells = [stage[name] for name in _MEMORY]
        label = f"stage {number}" if len(best.memory) > 1 else ""
        lines.append(f"{label:<15}" + "".join(f"{size / 2**30:>13.2f}" for size in (*cells, sum(cells))))
    return lines


def _time_lines(best: Candidate) -> list[str]:
    lines = [f"{'ms of a step':<24}{'':>10}{'share':>8}"]
    for name, seconds in best.step.parts.items():
        if seconds > 0.5e-6:
            lines.append(f"{name:<24}{seconds * 1e3:>10,.1f}{seconds / best.step.seconds:>8.1%}")
    return [*lines, f"{'together':<24}{best.step.seconds * 1e3:>10,.1f}"]


def _other_lines(choice: Choice) -> list[str]:
    lines = [f"{'setting':<66}{'s a step':>9}{'GiB':>7}  why not"]
    for one, why in choice.others:
        lines.append(f"{one.setting!s:<66}{one.step.seconds:>9.3f}{one.peak / 2**30:>7.1f}  {why}")
    return lines if choice.others else ["none"]
