"""Before a training step: a router's centre and choices; the first evaluation; what SGT needs."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.training import get_args

from cherry_megatron.balancing import balance_over_global_batch
from cherry_megatron.config import Config
from cherry_megatron.expert_choice import centre_router, choose_experts
from cherry_megatron.model.mixture import mixture_of
from cherry_megatron.monitor.progress import Progress
from cherry_megatron.objective import Objective
from cherry_megatron.platform.undisturbed import clock_stopped, undisturbed
from cherry_megatron.runs import own_checkpoints
from cherry_megatron.sgt.online import scores_of, select
from cherry_megatron.sgt.probe import Probe


class BeforeStep:
    """Called before each step, see platform/steps.py.

    Args:
        config: of the run.
        objective: what is trained for; its supervision is set when the first step begins.
        progress: where the probe's scalars go.
        evaluate: called with the model before the run's first step if `evaluation.at_start`.
    """

    def __init__(
        self, config: Config, objective: Objective, progress: Progress, evaluate: Callable[..., Any]
    ) -> None:
        self._first = own_checkpoints(config) is None  # of the run's steps
        self._at_start = config.evaluation.at_start
        self._has_experts = config.has_experts
        self._objective, self._progress, self._evaluate = objective, progress, evaluate
        self._probe = Probe(objective, progress, config.run)

    def __call__(self, data_iterator: Any, model: list[torch.nn.Module], config: Any) -> Any:
        iteration = get_args().curr_iteration
        first, self._first = self._first, False
        at_start = first and self._at_start
        supervision, probing = self._objective.supervision, False
        if supervision is not None:
            options = supervision.options
            supervision.alpha.fill_(options.alpha_at(iteration))
            probing = bool(options.probe_interval) and (iteration + 1) % options.probe_interval == 0
        selecting = supervision is not None and supervision.options.top_loss is not None
        mixture = mixture_of(model[0])
        choosing = mixture is not None and mixture.options.routes
        centring = mixture is not None and first
        reading = selecting or probing or choosing or centring or self._has_experts
        if not (reading or at_start):
            return data_iterator
        with undisturbed(model, config):
            rows = scores = None
            if reading and data_iterator is not None:
                rows = [next(data_iterator) for _ in range(get_num_microbatches())]
            if mixture is not None and centring:
                centre_router(mixture, rows)
            if self._has_experts:
                scores = balance_over_global_batch(self._objective, rows, model)
            if mixture is not None and choosing:
                choose_experts(mixture, rows)
            if at_start:  # with a router that has been centred
                with clock_stopped():
                    self._evaluate_as_it_is(model)
            if supervision is not None and selecting:
                select(supervision, rows, scores_of(self._objective, rows, model) if scores is None else scores)
            if probing:
                with clock_stopped():
                    self._probe(rows, model, iteration + 1)
        return RerunDataIterator(iter(rows)) if rows is not None else data_iterator

    def _evaluate_as_it_is(self, model: list[torch.nn.Module]) -> None:
        for chunk in model:
            chunk.eval()
        self._progress.before_first_step = True
        try:
            with torch.no_grad():
                self._evaluate(model)
        finally:
            self._progress.before_first_step = False
            for chunk in model:
                chunk.train()
