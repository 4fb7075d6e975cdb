"""Held-out loss at several numbers of loops, the statistics of every loop, and free generation."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args
from megatron.training.datasets import data_samplers

from cherry_megatron.config import Config
from cherry_megatron.inference.generate import generate
from cherry_megatron.inference.prompts import configured_prompts
from cherry_megatron.model.mixture import mixture_of
from cherry_megatron.model.stack import recurrent_stacks
from cherry_megatron.monitor.generation import health, table
from cherry_megatron.monitor.loops import NAMES, LoopTrace, alarms
from cherry_megatron.monitor.mixture import RouterDrift
from cherry_megatron.monitor.pictures import expert_shares, loss_by_loops
from cherry_megatron.monitor.progress import Progress
from cherry_megatron.monitor.tags import HELD_OUT, MOEE, MTP, OURS, of_section

# The same draws at every evaluation of every run, so that differences are the models'.
GENERATION_SEED = 0
# What is printed of what else is reported.
_SHOWN = {
    f"{MOEE}loss/": "loss by expert, of the sequences that it sees",
    f"{MTP}loss/": "loss of multi-token prediction by depth",
    f"{MTP}acceptance/": "of it, share that the model accepts",
}


class LoopEvaluation:
    """Megatron's `non_loss_data_func`: called with the model at each evaluation.

    Every call sees the same first `evaluation.batches` global batches of the validation split, so
    its losses compare between numbers of loops and between evaluations.

    Args:
        config, progress, run_micro_batch: as `pretrain` gives them.
        recorded: keep the losses in the run's evaluations.jsonl, and what is generated in generations.jsonl.

    Attributes:
        losses: loops -> loss of the last call, on the last pipeline stage.
        parts: loops -> the same by part, where some tokens are selected: `selected`, `unselected`.
        statistics: of each loop, from the last call.
        further: what else was reported with all loops, of a mixture or multi-token prediction.
    """

    def __init__(
        self, config: Config, progress: Progress, run_micro_batch: Callable[..., Any], recorded: bool = True
    ) -> None:
        self._config, self._progress, self._run, self._recorded = config, progress, run_micro_batch, recorded
        self.losses: dict[int, float] = {}
        self.parts: dict[int, dict[str, float]] = {}
        self.statistics: dict[str, list[float]] = {}
        self.further: dict[str, float] = {}
        self._known: dict[int, dict[int, float]] = {}  # losses of all evaluations of this process
        self._drift = RouterDrift()
        self._evaluated: int | None = None
        self._generation = GenerationHealth(config, progress, recorded) if config.generation else None

    def __call__(self, model: list[torch.nn.Module]) -> None:
        if self._evaluated == self._progress.iteration:
            return  # Megatron evaluates once more at the end of training
        self._evaluated = self._progress.iteration
        stacks = recurrent_stacks(model[0])
        full, mixture = self._config.recurrence.loops, mixture_of(model[0])
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
            if mixture is not None and loops == full:
                self.further |= self._drift.since_last(mixture)
            self.losses[loops] = means.pop("lm loss", float("nan"))
            self.parts[loops] = {name.removesuffix(" loss"): value for name, value in means.items()}
            if trace is not None:
                self.statistics = trace.reduce(ProcessGroupCollection.use_mpu_process_groups())
        self._report()
        if self._generation is not None:
            self._generation(model)

    def _report(self) -> None:
        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return
        iteration = self._progress.iteration
        if self._recorded:
            self._progress.record_evaluation(self.losses, self.parts, self.further)
        losses = "  ".join(f"{loops}: {loss:.4f}" for loops, loss in self.losses.items())
        self._progress.say(f"step {iteration:>7}  loss by loops  {losses}")
        for start, what in _SHOWN.items():
            if shown := of_section(start, self.further):
                values = "  ".join(f"{number}: {value:.4f}" for number, value in shown.items())
                self._progress.say(f"step {iteration:>7}  {what}  {values}")
        for loops, loss in self.losses.items():
            self._progress.scalar(f"loss-by-loops/{loops}", loss, iteration)
        self._progress.scalar(HELD_OUT.removeprefix(OURS), self.losses[self._config.recurrence.loops], iteration)
        for part, loss in self.parts[max(self.parts)].items():
            self._progress.scalar(f"sgt/held-out-loss/{part}", loss, iteration)
        for name, value in self.further.items():
            self._progress.scalar(f"{name.removeprefix(OURS)}/held-out", value, iteration)
        for name in NAMES:
            for loop, value in enumerate(self.statistics[name], start=1):
                if value == value:  # a loop cut by a stage boundary has no relative change
                    self._progress.scalar(f"{name.replace('_', '-')}/loop-{loop}", value, iteration)
        self._known[iteration] = dict(self.losses)
        self._progress.picture("pictures/loss-by-loops", lambda: loss_by_loops(self._known), iteration)
        of_layers = self._progress.experts_reported
        self._progress.picture("pictures/experts", lambda: expert_shares(self.further, of_layers), iteration)
        if self._progress.under_way:
            for line in alarms(self.statistics, self.losses):
                self._progress.alarm("loops", line, iteration)


class GenerationHealth:
    """Continues the configured prompts at each evaluation, and records texts and measures.

    Args:
        config: with a `generation` section.
        progress: where scalars and texts go.
        recorded: keep them in the run's generations.jsonl.
    """

    def __init__(self, config: Config, progress: Progress, recorded: bool) -> None:
        assert config.generation is not None
        self._loops, self._options = config.recurrence.loops, config.generation
        self._prompts, self._progress, self._recorded = configured_prompts(config), progress, recorded

    def __call__(self, model: list[torch.nn.Module]) -> None:
        """Every rank calls it."""
        prompts = self._prompts
        found = generate(model, prompts.ids, self._options, self._loops, GENERATION_SEED, prompts.end).texts
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            self._report(found)

    def _report(self, continuations: list[list[int]]) -> None:
        progress, prompts = self._progress, self._prompts
        overall = health(continuations, prompts.end)
        texts = [prompts.text_of(tokens) for tokens in continuations]
        if self._recorded:
            record = {
                "loops": self._loops,
                "temperature": self._options.temperature,
                "top_k": self._options.top_k,
                "top_p": self._options.top_p,
                "tokens": self._options.tokens,
                "health": overall,
                "texts": [
                    {"prompt": prompt, "continuation": text, "health": health([tokens], prompts.end)}
                    for prompt, text, tokens in zip(prompts.texts, texts, continuations, strict=True)
                ],
            }
            progress.record_generation(record)
        iteration = progress.iteration
        measures = "  ".join(f"{name} {value:.3g}" for name, value in overall.items())
        progress.say(f"step {iteration:>7}  generation  {measures}")
        for name, value in overall.items():
            progress.scalar(f"generation/{name}", value, iteration)
        progress.text("generation/text", table(prompts.texts, texts), iteration)


def mean_losses(
    model: list[torch.nn.Module], dataset: Any, batches: int, run_micro_batch: Callable[..., Any]
) -> dict[str, float]:
    """Mean losses over a data set's first evaluation batches.

    Returns:
        What `run_micro_batch` reports: `lm loss`, over all tokens, and the loss of selected and unselected ones if
        it knows them, and what a mixture or multi-token prediction adds; nothing before the last pipeline stage.
    """
    args = get_args()
    loader = data_samplers.build_pretraining_data_loader(dataset, 0)
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
        if total[1] >= 1:  # else it is a mean over no token
            means[name] = float(total[0] / total[1])
    return means
