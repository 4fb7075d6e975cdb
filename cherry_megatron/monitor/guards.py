"""Steps that go wrong: a loss or gradient that is not finite, and jumps of the loss.

It is decided on a step's loss and gradient norm, over all ranks, after the backward pass and before the update.
Nothing else is looked at, so it works with CUDA graphs, and every rank and layout decides alike. A skipped step
leaves weights, optimizer, schedule, generators and scales of FP8 as they were; its batch is not read again.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any

import torch

from cherry_megatron.config import Config
from cherry_megatron.errors import CherryError
from cherry_megatron.monitor.alarms import read_alarms
from cherry_megatron.monitor.progress import Progress
from cherry_megatron.platform.leaving import AGAIN
from cherry_megatron.platform.undisturbed import Remembered
from cherry_megatron.runs import recent_steps
from cherry_megatron.storage.tracker import step_saved

_FLOOR = 0.01  # of the mean: what a standard deviation counts as at least


class Action(IntEnum):
    """What becomes of a step."""

    UPDATE = 0
    LEAVE_OUT = 1
    SKIP = 2
    REWIND = 3
    STOP = 4


class History:
    """The losses of the last steps that were learned from, and how many were skipped since.

    Args:
        window: losses to keep.
        records: lines of steps.jsonl, in order.
    """

    def __init__(self, window: int, records: Iterable[dict[str, Any]] = ()) -> None:
        self._losses: deque[float] = deque(maxlen=window)
        self._skipped: list[int] = []
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        """Take a step's line of steps.jsonl."""
        if "skipped" in record:
            self._skipped.append(record["iteration"])
            return
        self._skipped.clear()
        loss = record["loss"] if record["loss"] is not None else record.get("selected_loss")
        if loss is not None:
            self._losses.append(loss)

    def skipped(self, besides: Iterable[int]) -> int:
        """How many steps in a row were skipped up to now, without those of `besides`."""
        return len({*self._skipped} - {*besides})

    def sigmas(self, loss: float) -> float:
        """By how many standard deviations a loss is above the mean; 0 while less than half the window is known."""
        known = len(self._losses)
        if known < max(2, (self._losses.maxlen or 0) // 2):
            return 0.0
        mean = statistics.fmean(self._losses)
        return (loss - mean) / max(statistics.pstdev(self._losses, mean), _FLOOR * abs(mean), 1e-12)


class Guard:
    """Decides on each step whether it updates the weights.

    Args:
        config: of the run.
        progress: knows the step; what is decided is told, on the last rank.
    """

    def __init__(self, config: Config, progress: Progress) -> None:
        self._options, self._progress, self._run = config.guards, progress, config.run
        self._before: Remembered | None = None
        self._history: History | None = None
        self._left_out: set[int] = set()

    def begin(self, model: list[torch.nn.Module]) -> None:
        """Before the passes of a step."""
        if self._history is None:
            self._recall()
        if self._options.skips or self._progress.iteration in self._left_out:
            self._before = Remembered(model)

    def allows(self, losses: dict[str, float], norm: float) -> bool:
        """Whether the weights are updated; see platform/steps.py.

        Raises:
            CherryError: if the run is to stop.
            SystemExit: with status AGAIN, if it is to go on from its last checkpoint.
        """
        loss, norm = _over_all_ranks(losses, norm)
        step = self._progress.iteration
        action, sigmas, too_many = self._agree(step, loss, norm)
        if action == Action.UPDATE:
            return True
        found = _found(step, loss, norm, sigmas)
        if action == Action.STOP:
            self._stop(found, sigmas, too_many)
        if action == Action.REWIND:
            raise SystemExit(AGAIN)
        assert self._before is not None
        self._before.restore()
        return False

    def _recall(self) -> None:
        """What the run knows of the steps before, on the last rank; which batches are left out, on all."""
        left_out: list[list[int]] = [[]]
        self._history = History(self._options.spike_window)
        if self._progress.records:
            done = self._progress.iteration - 1
            steps = [step for step in recent_steps(self._run) if step["iteration"] <= done]
            self._history = History(self._options.spike_window, steps)
            self._progress.listeners.append(self._history.add)
            rewinds = [alarm for alarm in read_alarms(self._run) if alarm["kind"] == "rewind"]
            left_out = [sorted({*self._options.leave_out, *(s for alarm in rewinds for s in alarm["leaves_out"])})]
        torch.distributed.broadcast_object_list(left_out, torch.distributed.get_world_size() - 1)
        self._left_out = {*left_out[0]}

    def _agree(self, step: int, loss: float | None, norm: float) -> tuple[Action, float, bool]:
        """The last rank decides, because it has the history."""
        judged: Sequence[float] = (Action.UPDATE, 0.0, False)
        if self._progress.records:
            judged = self._judge(step, loss, norm)
        if torch.distributed.get_world_size() > 1:
            verdict = torch.tensor(judged, dtype=torch.float64, device=torch.cuda.current_device())
            torch.distributed.broadcast(verdict, torch.distributed.get_world_size() - 1)
            judged = verdict.tolist()
        action, sigmas, too_many = judged
        return Action(int(action)), sigmas, bool(too_many)

    def _judge(self, step: int, loss: float | None, norm: float) -> tuple[float, float, float]:
        """The action, by how many deviations the loss has jumped, and whether too much was tried before.

        What is decided is written down before the other ranks know it.
        """
        assert self._history is not None
        options, sigmas = self._options, 0.0
        if step in self._left_out:
            self._progress.skip(step, "left out")
            return Action.LEAVE_OUT, sigmas, False
        if not math.isfinite(norm) or not math.isfinite(loss or 0.0):
            policy: str | None = options.not_finite
        else:
            sigmas = self._history.sigmas(loss) if options.spike and loss is not None else 0.0
            policy = options.spike if sigmas > options.spike_sigmas else None
        if policy is None:
            return Action.UPDATE, sigmas, False
        found = _found(step, loss, norm, sigmas)
        if policy == "skip" and self._history.skipped(self._left_out) < options.most:
            self._progress.skip(step, found)
            self._progress.alarm("skip", f"{found}: skipped", step)
            return Action.SKIP, sigmas, False
        if policy == "rewind" and self._rewind(step, found):
            return Action.REWIND, sigmas, False
        too_many = policy != "stop"
        self._progress.alarm("stop", f"{found}: stopped", step)
        return Action.STOP, sigmas, too_many

    def _rewind(self, step: int, found: str) -> bool:
        """Note what is left out from now on; False if there were too many rewinds to this checkpoint."""
        saved = step_saved(self._run)
        before = [a for a in read_alarms(self._run) if a["kind"] == "rewind" and a["checkpoint"] == saved]
        if len(before) >= self._options.most:
            return False
        leaves_out = [s for s in range(step - self._options.rewind_batches + 1, step + 1) if s > saved]
        steps = ", ".join(map(str, leaves_out))
        text = f"{found}: ends, to go on from step {saved} without the batches of steps {steps} when started again"
        self._progress.alarm("rewind", text, step, checkpoint=saved, leaves_out=leaves_out)
        return True

    def _stop(self, found: str, sigmas: float, too_many: bool) -> None:
        key = "spike" if sigmas else "not_finite"
        policy, most = getattr(self._options, key), self._options.most
        if not too_many:
            why = f"guards.{key} is stop; set it to skip or rewind, or name the step in guards.leave_out"
        elif policy == "skip":
            why = f"guards.most {most} steps in a row were skipped; look at the data and the learning rate"
        else:
            why = (
                f"there were guards.most {most} rewinds to step {step_saved(self._run)}; look at the data and the "
                "learning rate, or go back to an older checkpoint"
            )
        raise CherryError(f"{self._run}: {found}, and {why}")


def _found(step: int, loss: float | None, norm: float, sigmas: float) -> str:
    if sigmas:
        return f"the loss of step {step} is {loss:.4f}, {sigmas:.1f} standard deviations above the mean"
    what = "the gradient norm" if math.isfinite(loss or 0.0) else "the loss"
    return f"{what} of step {step} is {norm if what != 'the loss' else loss}"


def _over_all_ranks(losses: dict[str, float], norm: float) -> tuple[float | None, float]:
    """A step's mean loss, None without a token that has one, and a norm that is not finite if any rank's is not.

    The ranks that have a loss have the same.
    """
    loss = losses.get("lm loss", losses.get("selected loss"))
    if torch.distributed.get_world_size() == 1:
        return loss, norm
    bad = 0.0 if math.isfinite(norm) else float("nan")
    mine = [loss or 0.0, float(loss is not None), bad]
    sums = torch.tensor(mine, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(sums)
    total, count, bad = sums.tolist()
    return (total / count if count else None), (norm if bad == 0 or not math.isfinite(norm) else float("nan"))
