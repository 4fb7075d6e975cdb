"""Gradient coupling: does a step on the selected tokens improve the others?

With g_S and g_U the gradients of the mean loss (a teacher's part of it included) over the selected and the
unselected tokens of a global batch::

    cos   = <g_S, g_U> / (|g_S| |g_U|)
    ratio = <g_S, g_U> / |g_S|^2

A step of size eta along -g_S changes the unselected loss by -eta <g_S, g_U> to first order. The paper's own formula
is not public, so both are given, over all parameters and by part.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args
from torch import Tensor

from cherry_megatron.data.batches import Rows
from cherry_megatron.files import append_lines
from cherry_megatron.model.pattern import ATTENTION
from cherry_megatron.model.stack import RecurrentStack
from cherry_megatron.monitor.progress import Progress
from cherry_megatron.objective import Objective
from cherry_megatron.sgt.loss import Mode, Supervision

PARTS = ("embedding", "attention", "ffn", "head", "mtp")
ALL = "all"


class Probe:
    """Measures the coupling on the micro-batches of a step, and records it in TensorBoard and probes.jsonl.

    Args:
        objective: has a supervision when the probe is called.
        progress: where scalars go.
        run: the run's folder.
    """

    def __init__(self, objective: Objective, progress: Progress, run: Path) -> None:
        self._objective, self._progress, self._run = objective, progress, run

    @property
    def _supervision(self) -> Supervision:
        assert self._objective.supervision is not None
        return self._objective.supervision

    def __call__(self, rows: Rows, model: list[torch.nn.Module], step: int) -> None:
        """Two forward and backward passes, and two more for each loop with `sgt.probe_loops`; all ranks call it.

        Args:
            rows: the micro-batches of the step.
            model: chunks of this rank, whose gradients are overwritten.
            step: counted from 1.
        """
        stacks: list[RecurrentStack] = [get_attr_wrapped_model(chunk, "decoder") for chunk in model]
        found = self._couplings(rows, model, PARTS)
        if self._supervision.options.probe_loops:
            loops = stacks[0].loops
            for loop in range(loops):
                for stack in stacks:
                    stack.learning_loop = loop
                try:
                    found[f"loop-{loop + 1}"] = self._couplings(rows, model, (), core=True)[ALL]
                finally:
                    for stack in stacks:
                        stack.learning_loop = None
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            self._record(found, step)

    def _couplings(
        self, rows: Rows, model: list[torch.nn.Module], parts: tuple[str, ...], core: bool = False
    ) -> dict[str, dict[str, float]]:
        """cos and ratio over all parameters, or the core's alone, and by part."""
        chosen, number = self._gradients("selected", rows, model, core)
        chosen = [(part, gradient.clone()) for part, gradient in chosen]
        others, other_number = self._gradients("unselected", rows, model, core)
        sums = torch.zeros(len(parts) + 1, 3, dtype=torch.float64, device="cuda")
        for (part, ours), (_, theirs) in zip(chosen, others, strict=True):
            pairs = ((ours, theirs), (ours, ours), (theirs, theirs))
            row = torch.stack([(a.double() * b.double()).sum() for a, b in pairs])
            sums[0] += row
            if part in parts:
                sums[1 + parts.index(part)] += row
        torch.distributed.all_reduce(sums, group=mpu.get_model_parallel_group())
        counts = torch.stack((number, other_number)).double()
        torch.distributed.all_reduce(counts, group=mpu.get_data_parallel_group(with_context_parallel=True))
        scale = float(counts[0] / counts[1])  # sums over tokens to means
        return {
            part: {"cos": float(dot / (mine * other).sqrt()), "ratio": float(dot / mine) * scale}
            for part, (dot, mine, other) in zip((ALL, *parts), sums, strict=True)
        }

    def _gradients(
        self, mode: Mode, rows: Rows, model: list[torch.nn.Module], core: bool
    ) -> tuple[list[tuple[str, Tensor]], Tensor]:
        """The gradient of the loss over one kind of tokens, summed over data-parallel ranks.

        Returns:
            Part and gradient of every parameter that this rank answers for, and this rank's number of such tokens.
        """
        args = get_args()
        for chunk in model:
            chunk.zero_grad_buffer()  # type: ignore[operator]
            chunk.force_all_reduce = True  # type: ignore[assignment]
        self._supervision.mode = mode
        try:
            reports = get_forward_backward_func()(
                forward_step_func=self._objective.forward_step,
                data_iterator=rows and iter(rows),
                model=model,
                num_microbatches=get_num_microbatches(),
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                forward_only=False,
                force_all_reduce=True,
            )
        finally:
            self._supervision.mode = "weighted"
            for chunk in model:
                chunk.force_all_reduce = False  # type: ignore[assignment]
        gradients = [
            (part, parameter.main_grad)  # type: ignore[attr-defined]
            for chunk in model
            for part, parameter in answered_for(chunk, core)
        ]
        number = torch.zeros((), device="cuda")
        if mpu.is_pipeline_last_stage():
            number = torch.stack([report[f"{mode} loss"][1] for report in reports]).sum()
        return gradients, number

    def _record(self, found: dict[str, dict[str, float]], step: int) -> None:
        # A batch without selected tokens, or a part without a gradient, has no coupling.
        found = {part: values for part, values in found.items() if all(map(math.isfinite, values.values()))}
        for part, values in found.items():
            for name, value in values.items():
                self._progress.scalar(f"sgt/{name}/{part}", value, step)
        with append_lines(self._run / "probes.jsonl") as file:
            file.write(json.dumps({"iteration": step, "coupling": found}) + "\n")


def answered_for(chunk: torch.nn.Module, core: bool = False) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Every trained parameter that is this rank's to count, once over the ranks, with its part of the model.

    Args:
        chunk: of the model on this rank.
        core: only what is walked in loops.
    """
    stack: RecurrentStack = get_attr_wrapped_model(chunk, "decoder")
    parts = {
        parameter: "attention" if symbol == ATTENTION else "ffn"
        for _, sublayers in stack.stored_layers()
        for symbol, sublayer in sublayers
        for parameter in sublayer.parameters()
    }
    group = mpu.get_tensor_model_parallel_group()
    looped = stack.core_parameters()
    for name, parameter in chunk.named_parameters():
        counts = param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, group)
        if counts and parameter.requires_grad and (not core or parameter in looped):
            yield parts.get(parameter) or _outside(name), parameter


def _outside(name: str) -> str:
    """The part of the model that a parameter outside the stack belongs to."""
    return next((part for part in ("embedding", "mtp") if f"{part}." in name), "head")
