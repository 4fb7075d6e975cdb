"""Held-out loss at several numbers of loops, and the statistics of every loop."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args
from megatron.training.datasets.data_samplers import build_pretraining_data_loader

from cherry_megatron.config import Config
from cherry_megatron.model.stack import recurrent_stacks
from cherry_megatron.monitor.loops import NAMES, LoopTrace
from cherry_megatron.monitor.progress import OURS, Progress


class LoopEvaluation:
    """Megatron's `non_loss_data_func`: called with the model at each evaluation.

    Every call sees the same first `evaluation.batches` global batches of the validation split, so
    its losses compare between numbers of loops and between evaluations.

    Args:
        config, progress, run_micro_batch: as `pretrain` gives them.
        recorded: keep the losses in the run's evaluations.jsonl.

    Attributes:
        losses: loops -> loss of the last call, on the last pipeline stage.
        parts: loops -> the same by part, where some tokens are selected: `selected`, `unselected`.
        statistics: of each loop, from the last call.
        further: what else was reported with all loops, of a mixture.
    """

    def __init__(
        self, config: Config, progress: Progress, run_micro_batch: Callable[..., Any], recorded: bool = True
    ) -> None:
        self._config, self._progress, self._run, self._recorded = config, progress, run_micro_batch, recorded
        self.losses: dict[int, float] = {}
        self.parts: dict[int, dict[str, float]] = {}
        self.statistics: dict[str, list[float]] = {}
        self.further: dict[str, float] = {}
        self._evaluated: int | None = None

    def __call__(self, model: list[torch.nn.Module]) -> None:
        if self._evaluated == self._progress.iteration:
            return  # Megatron evaluates once more at the end of training
        self._evaluated = self._progress.iteration
        stacks = recurrent_stacks(model[0])
        full = self._config.recurrence.loops
        self.losses, self.parts, self.further = {}, {}, {}
        for loops in self._config.evaluation.loop_counts(full):
            trace = None
            if loops == full:
                # Of a mixture: over all experts.
                trace = LoopTrace(full, stacks[0].tp_group if stacks[0].config.sequence_parallel else None)
            for stack in stacks:
                stack.observe, stack.loops = trace.add if trace else None, loops
            try:
                means = mean_losses(model, self._progress.held_out, self._config.evaluation.batches, self._run)
            finally:
                for stack in stacks:
                    stack.observe, stack.loops = None, full
            self.further = {name: means.pop(name) for name in list(means) if name.startswith(OURS)}
            self.losses[loops] = means.pop("lm loss", float("nan"))
            self.parts[loops] = {name.removesuffix(" loss"): value for name, value in means.items()}
            if trace is not None:
                self.statistics = trace.reduce(ProcessGroupCollection.use_mpu_process_groups())
        self._report()

    def _report(self) -> None:
        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return
        iteration = self._progress.iteration
        if self._recorded:
            self._progress.record_evaluation(self.losses, self.parts)
        losses = "  ".join(f"{loops}: {loss:.4f}" for loops, loss in self.losses.items())
        self._progress.say(f"step {iteration:>7}  loss by loops  {losses}")
        for loops, loss in self.losses.items():
            self._progress.scalar(f"loss-by-loops/{loops}", loss, iteration)
        for part, loss in self.parts[max(self.parts)].items():
            self._progress.scalar(f"sgt/held-out-loss/{part}", loss, iteration)
        for name, value in self.further.items():
            self._progress.scalar(f"{name.removeprefix(OURS)}/held-out", value, iteration)
        for name in NAMES:
            for loop, value in enumerate(self.statistics[name], start=1):
                if value == value:  # a loop cut by a stage boundary has no relative change
                    self._progress.scalar(f"{name.replace('_', '-')}/loop-{loop}", value, iteration)


def mean_losses(
    model: list[torch.nn.Module], dataset: Any, batches: int, run_micro_batch: Callable[..., Any]
) -> dict[str, float]:
    """Mean losses over a data set's first evaluation batches.

    Returns:
        What `run_micro_batch` reports: `lm loss`, over all tokens, and the loss of selected and unselected ones if
        it knows them, and what a mixture adds; nothing before the last pipeline stage.
    """
    args = get_args()
    loader = build_pretraining_data_loader(dataset, 0)
    each = args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)
    reports = get_forward_backward_func()(
        forward_step_func=run_micro_batch,
        data_iterator=None if loader is None else iter(loader),
        model=model,
        num_microbatches=each * batches,
        seq_length=args.seq_length,
        micro_batch_size=args.eval_micro_batch_size,
        forward_only=True,
    )
    if not mpu.is_pipeline_last_stage():
        return {}
    means = {}
    for name in reports[0]:
        total = torch.stack([report[name] for report in reports]).sum(0)
        torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
        means[name] = float(total[0] / total[1])
    return means
