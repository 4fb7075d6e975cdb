"""One micro-batch through this stage of the model: Megatron's forward step."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_args
from torch import Tensor

from cherry_megatron.data.batches import EXPERTS, next_batch
from cherry_megatron.distillation import Teacher
from cherry_megatron.model.head import ahead_of
from cherry_megatron.model.mixture import MixtureModel, mixture_of
from cherry_megatron.model.stack import RecurrentStack, recurrent_stacks
from cherry_megatron.monitor.tags import MOEE, MTP
from cherry_megatron.sgt.loss import Supervision, loss_function

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]


class Objective:
    """What the model is trained for: the text, a teacher, and how much each token counts.

    Attributes:
        teacher: to be set once Megatron has made its process groups.
        supervision: of selective supervision, or None: every token counts the same.
        scores: while a list, the token losses of each micro-batch, [b, s], are put there on the last stage.
    """

    def __init__(self, supervision: Supervision | None = None) -> None:
        self.teacher: Teacher | None = None
        self.supervision = supervision
        self.scores: list[Tensor] | None = None

    def forward_step(
        self, iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Loss]]:
        """Megatron's forward step, in training with the number of loops of this step."""
        for stack in recurrent_stacks(model):
            if model.training:
                stack.loops = draw_loops(stack, get_args().seed, get_args().curr_iteration)
            else:
                stack.loops = stack.recurrence.loops
        return self.run_micro_batch(iterator, model)

    def run_micro_batch(
        self, iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Loss]]:
        """One micro-batch with as many loops as the stack is set to; in evaluation mode without a teacher."""
        args = get_args()
        size = args.micro_batch_size if model.training else args.eval_micro_batch_size
        supervision = self.supervision
        learns = model.training and self.scores is None
        teacher = self.teacher if learns else None
        has_selection = supervision is not None and supervision.has_selection(model.training)
        mixture = mixture_of(model)
        # At evaluation each sequence takes its own choice.
        choosing = mixture is not None and mixture.options.routes and model.training
        experts = mixture.options.experts if mixture is not None and choosing else 0
        last_reads_tokens = teacher is not None or bool(args.mtp_num_layers)
        batch = next_batch(iterator, size, last_reads_tokens, has_selection, experts)
        if teacher is not None:
            teacher.see(model, batch["tokens"], batch["position_ids"])
        selected = batch["selected"]
        arguments: dict[str, Any] = {"selected": selected}
        rows = None
        if learns and supervision is not None and selected is not None:
            arguments["weights"] = supervision.weights(selected)
            if supervision.skips_head:
                assert batch["loss_mask"] is not None
                rows, arguments["partly"] = selected * batch["loss_mask"], True
        if mixture is None:
            wanted = {"rows": rows, "agreement": not model.training}
            output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], **wanted)
        else:
            inputs = batch["tokens"], batch["position_ids"]
            output = model(*inputs, None, labels=batch["labels"], chosen=batch[EXPERTS])
            arguments.update(_of_mixture(mixture, batch["loss_mask"], choosing))
        if (ahead := ahead_of(model)) is not None:
            assert batch["loss_mask"] is not None
            report = _tagged(MTP, ahead.report(batch["loss_mask"]))
            arguments.update(ahead=ahead, further=report | arguments.get("further", {}))
        if teacher is not None and mixture is not None:
            arguments.update(divergence=mixture.divergence, share=teacher.weight)
            mixture.teacher = None  # evaluations have none
        elif teacher is not None and teacher.divergence is not None:
            arguments.update(divergence=teacher.take(), share=teacher.weight)
        if self.scores is not None and mpu.is_pipeline_last_stage():
            self.scores.append(output.detach())
        return output, partial(loss_function, batch["loss_mask"], **arguments)


def _of_mixture(mixture: MixtureModel, loss_mask: Tensor | None, choosing: bool) -> dict[str, Any]:
    """What the loss function is told of the mixture's last pass."""
    assert loss_mask is not None
    assert mixture.seen is not None
    report = _tagged(MOEE, mixture.seen.report(loss_mask))
    return {"further": report, **({"balance": mixture.balance} if choosing else {})}


def _tagged(section: str, report: dict[str, Tensor]) -> dict[str, Tensor]:
    return {section + name: value for name, value in report.items()}


def draw_loops(stack: RecurrentStack, seed: int, iteration: int) -> int:
    """The number of loops of a step: the same on every rank, and again after a resume."""
    options = stack.recurrence
    if options.random_loops is None:
        return options.loops
    return random.Random(f"{seed}/loops/{iteration}").randint(*options.random_loops)
