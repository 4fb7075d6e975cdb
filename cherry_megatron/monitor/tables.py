"""What `cherry params` prints."""

import os

from cherry_megatron.config import Config
from cherry_megatron.monitor.accounting import Layout, account, memory, together

_MODEL_PARALLEL = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size")


def params_table(config: Config) -> str:
    """Parameters and FLOPs by part, and the memory of a rank of each pipeline stage."""
    shape, sequence = config.shape, config.value("seq-length")
    rows = account(config.recurrence, shape, sequence)
    lines = [
        f"{config.source}: {config.recurrence.pattern}, {len(config.recurrence.parsed.layers)} stored layers, "
        f"{len(config.plan().visits)} effective",
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


def _memory_lines(config: Config) -> list[str]:
    model_parallel = 1
    for flag in _MODEL_PARALLEL:
        model_parallel *= config.value(flag)
    world = max(int(os.environ.get("WORLD_SIZE", "1")), model_parallel)
    layout = Layout(
        tensor=config.value("tensor-model-parallel-size"),
        data=world // model_parallel,
        micro_batch=config.value("micro-batch-size"),
        sequence=config.value("seq-length"),
        bf16=bool(config.value("bf16")),
        distributed_optimizer=bool(config.value("use-distributed-optimizer")),
        sequence_parallel=bool(config.value("sequence-parallel")),
        recompute=config.value("recompute-granularity") == "full",
    )
    stages = memory(config.plan(), config.shape, layout, config.recurrence)
    lines = [
        f"Memory of a rank, GiB (TP={layout.tensor}, PP={len(stages)}, DP={layout.data}, "
        f"{layout.micro_batch} x {layout.sequence} tokens a micro-batch; WORLD_SIZE sets DP):",
        f"{'stage':<7}{'weights':>10}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'together':>10}",
    ]
    for number, stage in enumerate(stages):
        cells = [stage[name] / 2**30 for name in ("weights", "gradients", "optimizer", "activations")]
        lines.append(
            f"{number:<7}{cells[0]:>10.2f}{cells[1]:>11.2f}{cells[2]:>11.2f}{cells[3]:>13.2f}{sum(cells):>10.2f}"
        )
    lines.append("Activations are an estimate, without the workspaces of libraries.")
    return lines


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f}M" if count else "-"
