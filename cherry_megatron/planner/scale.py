"""How the cost of a training grows with the number of GPUs."""

from collections.abc import Sequence

from cherry_megatron.config import Config
from cherry_megatron.errors import CherryError
from cherry_megatron.planner.choice import Choice, choose
from cherry_megatron.planner.job import job_of
from cherry_megatron.planner.rates import Rates
from cherry_megatron.planner.tables import about

ASSUMPTIONS = """\
What this assumes:
- Hosts of {host} GPUs; no layer is cut over hosts. Within one {link:.0f} GB/s a GPU and direction, of which
  {linked:.0%} are reached; between them {network:.0f} GB/s a GPU (400 Gbit/s), of which {networked:.0%} are
  reached: a guess until it is measured.
- Ring collectives. A host's GPUs carry the exchange between hosts side by side. The network is nobody else's.
- Ranks wait for the slowest: {skew:.1%} of a step at two, times the square root of the logarithm of more.
- Each number of GPUs has the best layout of its own. Reading data, saving, evaluation and failures cost nothing.
- Whether so many sequences a step train as well is another question: tokens are counted, not what is learned from
  them."""


def scale_table(config: Config, counts: Sequence[int], rates: Rates) -> str:
    """Step time, speed and GPU hours of several numbers of GPUs, with the batch as it is and growing with them.

    Raises:
        CherryError: if a number is not positive.
    """
    for count in counts:
        if count < 1:
            raise CherryError(f"--scale {count}: it takes positive numbers of GPUs, e.g. 8,64,512")
    counts = sorted(set(counts))
    batch = config.positive("global-batch-size")
    gpu = rates.gpu
    grown = {count: batch * count // counts[0] for count in counts}
    return "\n".join(
        [
            f"{config.source}, sequences of {config.value('seq-length')}, on {gpu.name}s",
            *about(rates.measured),
            "",
            f"{batch} sequences a step, as configured:",
            *_rows(config, dict.fromkeys(counts, batch), rates),
            "",
            f"{batch} sequences a step for every {counts[0]} GPUs:",
            *_rows(config, grown, rates),
            "",
            "Efficiency: tokens a second and GPU against the first row. GPU hours: for a thousand million tokens.",
            ASSUMPTIONS.format(
                host=gpu.host, link=gpu.link / 1e9, linked=rates.measured.link, network=gpu.network / 1e9,
                networked=rates.measured.network, skew=rates.measured.skew,
            ),
        ]
    )  # fmt: skip


def _rows(config: Config, batches: dict[int, int], rates: Rates) -> list[str]:
    lines = [
        f"{'GPUs':>6}{'sequences':>11}  {'layout':<72}{'s a step':>9}{'tokens/s':>14}{'efficiency':>11}"
        f"{'GPU hours':>11}{'exchanged':>11}{'GiB':>7}"
    ]
    first = None
    for gpus, batch in batches.items():
        try:
            found = choose(job_of(config, batch), gpus, rates)
        except CherryError as error:
            lines.append(f"{gpus:>6}{batch:>11}  {str(error).removeprefix(f'{config.source}: ')}")
            continue
        each = found.best.step.speed / gpus
        first = first or each
        lines.append(_row(found, each / first, 1e9 / each / 3600))
    return lines


def _row(found: Choice, efficiency: float, hours: float) -> str:
    best = found.best
    parts = best.step.parts
    told = parts["exchange within layers"] + parts["gradients and weights"] + parts["waiting for other ranks"]
    return (
        f"{best.setting.gpus:>6}{found.job.batch:>11}  {best.setting!s:<72}{best.step.seconds:>9.3f}"
        f"{best.step.speed:>14,.0f}{efficiency:>11.1%}{hours:>11.2f}{told / best.step.seconds:>11.1%}"
        f"{best.peak / 2**30:>7.1f}"
    )
