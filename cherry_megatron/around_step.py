"""What is done around each training step: see platform/steps.py for the order. The start is watched too."""

from collections.abc import Callable
from typing import Any

import torch

from cherry_megatron.before_step import BeforeStep
from cherry_megatron.config import Config
from cherry_megatron.monitor.alarms import record_alarm
from cherry_megatron.monitor.experts import report_of_step
from cherry_megatron.monitor.guards import Guard
from cherry_megatron.monitor.progress import Progress
from cherry_megatron.monitor.stragglers import RankTimes
from cherry_megatron.objective import Objective
from cherry_megatron.platform.steps import Hooks
from cherry_megatron.platform.watchdog import Watchdog
from cherry_megatron.storage.tracker import step_saved

# Of each minute of distributed-timeout-minutes, that a part of the start may take: before the ranks that wait for
# one that hangs give up, so that each has told where it was.
_SECONDS = 54.0


class AroundStep(Hooks):
    """Prepares, watches and judges each step, and reports experts inside layers after it.

    Args:
        config: of the run.
        objective: what is trained for.
        progress: where it is told.
        evaluate: as `BeforeStep` takes it.
        args: Megatron's arguments.
    """

    def __init__(
        self, config: Config, objective: Objective, progress: Progress, evaluate: Callable[..., Any], args: Any
    ) -> None:
        self._before_step = BeforeStep(config, objective, progress, evaluate)
        self._first = True
        self._config, self._progress = config, progress
        self._guard = Guard(config, progress)
        self._times = RankTimes(progress, config.guards.straggler)
        log = config.run / "logs" / f"rank{args.rank}.log"
        self._watchdog = Watchdog(config.guards.hang_seconds, log, self._hangs)
        self._watched_step = step_saved(config.run)
        self._start_seconds = int(args.distributed_timeout_minutes * _SECONDS)

    def starts(self, what: str) -> None:
        """A part of the start begins."""
        self._watchdog.begin(what, self._start_seconds, "nine tenths of distributed-timeout-minutes")

    def started(self) -> None:
        """The last of them has ended."""
        self._watchdog.end()

    def prepare(self, data_iterator: Any, model: list[torch.nn.Module], config: Any) -> Any:
        if not self._first:  # an evaluation may come before the first
            self._watch()
        self._first = False
        return self._before_step(data_iterator, model, config)

    def begin(self, model: list[torch.nn.Module]) -> None:
        self._guard.begin(model)
        self._times.begin()
        self._watch()

    def summing(self) -> None:
        self._times.summing()

    def allows(self, losses: dict[str, float], norm: float) -> bool:
        return self._guard.allows(losses, norm)

    def finish(self, model: list[torch.nn.Module]) -> None:
        self._watchdog.end()
        config, progress = self._config, self._progress
        self._times.finish(progress.iteration)
        if config.has_experts:
            experts, each_walk = config.shape.experts, progress.ends_interval(progress.iteration)
            progress.experts(*report_of_step(model, config.recurrence, experts, config.balance, each_walk))

    def close(self) -> None:
        """No step is going on any more."""
        self._watchdog.end()

    def _watch(self) -> None:
        self._watched_step = self._progress.iteration
        self._watchdog.begin(f"step {self._watched_step}")

    def _hangs(self, text: str) -> None:
        if self._progress.records:
            self._progress.alarm("hang", text, self._watched_step)
        else:  # the rank that keeps the records may be the one that is frozen
            record_alarm(self._config.run, "hang", text, self._watched_step)
