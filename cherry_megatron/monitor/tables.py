"""What `cherry params` prints."""

import os

from cherry_megatron.config import Config
from cherry_megatron.monitor.accounting import account, layout_of, memory, most_walked, together

_MODEL_PARALLEL = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size")


def params_table(config: Config) -> str:
    """Parameters and FLOPs by part, and the memory of a rank of each pipeline stage."""
    shape, sequence = config.shape, config.value("seq-length")
    rows = account(config.recurrence, shape, sequence, config.moee, config.mtp.depths)
    lines = [
        f"{config.source}: {config.recurrence.pattern}, {len(config.recurrence.parsed.layers)} stored layers, "
        f"{len(config.plan().visits)} effective",
        *_mixture_lines(config),
        "",
        f"{'part':<14}{'stored':>12}{'active':>12}{'effective':>12}{'GFLOP/token':>14}",
    ]
    for row in [*rows, together(rows)]:
        lines.append(
            f"{row.name:<14}{_millions(row.stored):>12}{_millions(row.active):>12}"
            f"{_millions(row.effective):>12}{row.flops / 1e9:>14.4f}"
        )
    lines += [
        "",
        "stored: kept in a checkpoint. active: used for a token, each weight once. effective: the untied twin's.",
        f"GFLOP/token: training, sequences of {sequence}, recomputation not counted.",
        "",
        *_memory_lines(config),
    ]
    return "\n".join(lines)


def _mixture_lines(config: Config) -> list[str]:
    if config.has_experts:
        shape = config.shape
        rows = account(config.recurrence, shape, config.value("seq-length"), config.moee, config.mtp.depths)
        whole = together(rows)
        return [
            f"{shape.experts} experts of {shape.expert_ffn} in each layer 'E', top {shape.top_k}",
            f"total parameters:  {_millions(whole.stored)}",
            f"active parameters: {_millions(whole.active)}",
        ]
    if config.moee is None:
        return []
    depths = config.mtp.depths or 1
    without, ahead = (
        together(account(config.recurrence, config.shape, config.value("seq-length"), config.moee, of))
        for of in (0, depths)
    )
    return [
        f"mixture of {config.moee.experts} such models, top {config.moee.top_k}; the table is of all of them",
        f"total parameters:  {_millions(without.stored)}, without multi-token prediction",
        f"active parameters: {_millions(without.active)}, without multi-token prediction",
        f"with mtp.depths {depths}{'' if config.mtp.depths else ', which is not set'}: {_millions(ahead.stored)}, "
        f"{_millions(ahead.active)} active",
    ]


def _memory_lines(config: Config) -> list[str]:
    model_parallel = 1
    for flag in _MODEL_PARALLEL:
        model_parallel *= config.value(flag)
    expert = config.value("expert-model-parallel-size")
    world = max(int(os.environ.get("WORLD_SIZE", "1")), model_parallel * expert)
    layout = layout_of(config, world)
    stages = memory(config.plan(), config.shape, layout, config.recurrence, config.moee)
    lines = [
        f"Memory of a rank, GiB (TP={layout.tensor}, PP={len(stages)}, DP={layout.data}, EP={layout.expert}, "
        f"{layout.micro_batch} x {layout.sequence} tokens a micro-batch; WORLD_SIZE sets DP):",
        f"{'stage':<7}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'workspace':>11}"
        f"{'together':>10}",
    ]
    for number, stage in enumerate(stages):
        cells = [stage[name] / 2**30 for name in ("weights", "gradients", "optimizer", "activations", "workspace")]
        lines.append(
            f"{number:<7}{cells[0]:>10.2f}{cells[1]:>11.2f}{cells[2]:>11.2f}{cells[3]:>13.2f}{cells[4]:>11.2f}"
            f"{sum(cells):>10.2f}"
        )
    lines.append(
        "Activations and workspace (the logits, or a recomputed segment if that is more) are estimates, without "
        "those of libraries."
    )
    if config.moee is not None:
        walked = most_walked(config.moee, layout, config.value("global-batch-size"))
        usual = layout.micro_batch * config.moee.top_k
        (at_worst,) = memory(config.plan(), config.shape, layout, config.recurrence, config.moee, walked)
        worst = sum(at_worst.values())
        lines.append(
            f"They are of {usual} sequences that a rank's experts walk in a micro-batch on average; at worst it is "
            f"{walked[0]}, with {worst / 2**30:.2f} GiB together."
        )
    return lines


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f}M" if count else "-"
