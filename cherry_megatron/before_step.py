"""Before a training step: the first evaluation; choice of experts; alpha, online selection and probe of SGT."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.training import get_args

from cherry_megatron.choosing import choose_experts
from cherry_megatron.config import Config
from cherry_megatron.model.mixture import mixture_of
from cherry_megatron.monitor.progress import Progress
from cherry_megatron.objective import Objective
from cherry_megatron.platform.undisturbed import undisturbed
from cherry_megatron.sgt.online import Ahead, replay, select
from cherry_megatron.sgt.probe import Probe


class BeforeStep:
    """Called before each step, see platform/steps.py.

    Args:
        config: of the run.
        objective: what is trained for; its supervision is set when the first step begins.
        progress: where the probe's scalars go.
        evaluate: called with the model before the first step of all if `evaluation.at_start`.
    """

    def __init__(
        self, config: Config, objective: Objective, progress: Progress, evaluate: Callable[..., Any]
    ) -> None:
        self._at_start = config.evaluation.at_start
        self._objective, self._progress, self._evaluate = objective, progress, evaluate
        self._probe = Probe(objective, progress, config.run)

    def __call__(self, data_iterator: Any, model: list[torch.nn.Module], config: Any) -> Any:
        iteration = get_args().curr_iteration
        if self._at_start and iteration == 0:
            self._at_start = False
            with undisturbed(model, config):
                self._evaluate_as_it_is(model)
        supervision, probing = self._objective.supervision, False
        if supervision is not None:
            options = supervision.options
            supervision.alpha.fill_(options.alpha_at(iteration))
            probing = bool(options.probe_interval) and (iteration + 1) % options.probe_interval == 0
        selecting = supervision is not None and supervision.options.top_loss is not None
        mixture = mixture_of(model[0])
        choosing = mixture is not None and mixture.options.routes
        if not (selecting or probing or choosing):
            return data_iterator
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        count = get_num_microbatches()
        ahead: Ahead = [None if it is None else [next(it) for _ in range(count)] for it in iterators]
        if mixture is not None and choosing:
            choose_experts(mixture, ahead[0])
        if supervision is not None and (selecting or probing):
            with undisturbed(model, config):
                if selecting:
                    select(self._objective, supervision, ahead, model)
                if probing:
                    self._probe(lambda: replay(ahead), model, iteration + 1)
        again = [None if rows is None else RerunDataIterator(iter(rows)) for rows in ahead]
        return again if isinstance(data_iterator, list) else again[0]

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
