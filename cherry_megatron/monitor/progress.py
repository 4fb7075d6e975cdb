"""What a running training shows and records: a line an interval, TensorBoard, and files of lines."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from megatron.training import get_tensorboard_writer
from tqdm import tqdm

from cherry_megatron.files import append_lines
from cherry_megatron.monitor.accounting import PEAK_BF16
from cherry_megatron.monitor.alarms import read_alarms, record_alarm
from cherry_megatron.monitor.mixture import MixtureWatch
from cherry_megatron.monitor.tags import MOEE, MTP, OURS, of_section, of_step
from cherry_megatron.platform.listen import keep_texts, listen
from cherry_megatron.platform.undisturbed import seconds_in_steps


class Progress:
    """Listens to Megatron's reports on the last rank, and prints and records from them.

    Throughput counts the time inside training steps only, not evaluation and saving.

    Args:
        run: the run's folder.
        args: Megatron's arguments.
        flops_per_token: of a training step, see accounting.
        terminal: where lines are printed.

    Attributes:
        records: whether this rank keeps the run's files of lines, as the last one does while it trains.
        listeners: are called with each line of steps.jsonl.
        ranks: what is said of single ranks in the next line, see monitor/stragglers.py.
        experts_reported: what the last step said of experts inside layers.
    """

    def __init__(self, run: Path, args: Any, flops_per_token: float, terminal: TextIO) -> None:
        self.train_dataset: Any = None
        self.held_out: Any = None
        self.before_first_step = False
        self._run, self._args, self._flops = run, args, flops_per_token
        self._heard: dict[str, float] = {}
        self._held_out_at: int | None = None  # the step of Megatron's last evaluation
        self._timed = 0.0  # seconds of training steps so far
        self._interval: list[tuple[float | None, float]] = []  # of each step; a skipped one has no loss
        self._skipped: dict[int, str] = {}
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self.ranks: dict[str, float] = {}
        self.experts_reported: dict[str, float] = {}
        self._mixture = MixtureWatch()
        self._terminal = terminal
        self._writer = get_tensorboard_writer()
        self.records = self._writer is not None and not args.skip_train
        self._alarms = len(read_alarms(run)) if self.records else 0
        self._bar: Any = None
        self._steps: TextIO | None = None
        if self._writer is not None:
            listen(self._writer, self._hear)
            keep_texts(self._writer, OURS)

    @property
    def iteration(self) -> int:
        """The number of steps done, counted from the beginning of the run; known on every rank."""
        args = self._args
        if args.skip_train or self.before_first_step:
            return int(args.iteration)
        # A training that has nothing left to do begins no step.
        return max(int(args.iteration), int(args.curr_iteration) + 1)

    @property
    def under_way(self) -> bool:
        """Whether enough was learned to tell what the model does: a tenth of the training, and 100 steps.

        Of an evaluation by itself too, of the steps of the checkpoint that it has loaded.
        """
        args = self._args
        last = args.train_iters or args.train_samples // args.global_batch_size  # not yet known where none trains
        return self.iteration >= max(last / 10, 100)

    def ends_interval(self, iteration: int) -> bool:
        """Whether a line is printed after a step."""
        return iteration % self._args.log_interval == 0 or iteration == self._args.train_iters

    def __enter__(self) -> "Progress":
        if self.records:
            self._steps = append_lines(self._run / "steps.jsonl")
            if sys.stderr.isatty():
                self._bar = tqdm(total=self._args.train_iters, unit="step")
        return self

    def __exit__(self, *_exc: object) -> None:
        for opened in (self._steps, self._bar):
            if opened is not None:
                opened.close()

    def say(self, line: str, end: str = "\n") -> None:
        """Print a line, or a part of one, above the progress bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._terminal, end=end)
        else:
            print(line, file=self._terminal, end=end, flush=True)

    def alarm(self, kind: str, text: str, iteration: int, **details: Any) -> None:
        """Tell of something that went wrong: print it, and in training keep it in alarms.jsonl and TensorBoard.

        Args:
            kind: see monitor/alarms.py.
            text: what it is, without the step.
            iteration: the step.
            details: further keys of its line.
        """
        self.say(f"step {iteration:>7}  {text}")
        self.keep_alarm(kind, text, iteration, **details)

    def keep_alarm(self, kind: str, text: str, iteration: int, **details: Any) -> None:
        """The same of what another rank prints; called on all, of which one keeps it."""
        if self.records:
            self._alarms += 1
            record_alarm(self._run, kind, text, iteration, **details)
            self.scalar(f"alarms/{kind}", 1.0, iteration)
            self.text(f"alarms/{kind}", text, iteration)

    def skip(self, iteration: int, why: str) -> None:
        """The step that is going on does not update the weights."""
        self._skipped[iteration] = why

    def scalar(self, tag: str, value: float, iteration: int) -> None:
        """Write one of our own scalars."""
        if self._writer is not None:
            self._writer.add_scalar(f"{OURS}{tag}", value, iteration)

    def experts(self, report: dict[str, float], balance: float) -> None:
        """Take what a step says of experts inside layers, see monitor/experts.py; called after it on all ranks."""
        self.experts_reported = report
        for name, value in report.items():
            self.scalar(f"moee/{name}", value, self.iteration)
        if self._writer is not None:
            self._writer.add_scalar("balance loss", balance, self.iteration)

    def picture(self, tag: str, draw: Callable[[], Any], iteration: int) -> None:
        """Write one of our own pictures; `draw` makes a matplotlib figure, or None, where there is a writer."""
        if self._writer is not None and (drawn := draw()) is not None:
            from cherry_megatron.monitor.look import pixels  # a second that a training without pictures saves

            self._writer.add_image(f"{OURS}{tag}", pixels(drawn), iteration, dataformats="HWC")

    def text(self, tag: str, markdown: str, iteration: int) -> None:
        """Write one of our own texts."""
        if self._writer is not None:
            self._writer.add_text(f"{OURS}{tag}", markdown, iteration)

    def record_evaluation(
        self, losses: dict[int, float], parts: dict[int, dict[str, float]], further: dict[str, float]
    ) -> None:
        """Add a line to evaluations.jsonl; called on the last rank.

        Args:
            losses: held-out loss by number of loops.
            parts: the same by part, if there are parts.
            further: what a mixture or multi-token prediction reports, by tag, with the most loops.
        """
        record: dict[str, Any] = {"iteration": self.iteration}
        record["losses"] = {str(loops): loss for loops, loss in losses.items()}
        if any(parts.values()):
            record["parts"] = {str(loops): by_part for loops, by_part in parts.items()}
        for name, start in (("moee", MOEE), ("mtp", MTP)):
            if found := of_section(start, further):
                record[name] = {str(max(losses)): found}
        with append_lines(self._run / "evaluations.jsonl") as file:
            file.write(json.dumps(record) + "\n")

    def record_generation(self, generated: dict[str, Any]) -> None:
        """Add a line to generations.jsonl; called on the last rank."""
        record = {"iteration": self.iteration, **generated}
        with append_lines(self._run / "generations.jsonl") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _hear(self, tag: str, value: float, iteration: int) -> None:
        self._heard[tag] = value
        if tag == "grad-norm":  # the last of a step's scalars
            self._step_ended(iteration)
        elif tag == "lm loss validation":
            # Megatron goes on in the validation split, so two evaluations at one step differ.
            again, self._held_out_at = iteration == self._held_out_at, iteration
            batches = self._args.eval_iters
            which = f"{batches} further batches, after training" if again else f"the next {batches} batches"
            self.say(f"step {iteration:>7}  held-out loss {value:.4f} on {which}")

    def _step_ended(self, iteration: int) -> None:
        # Where the output layer is left out for them, the loss of unselected tokens is not known.
        shown = "lm loss" if "lm loss" in self._heard else "selected loss"
        before, self._timed = self._timed, seconds_in_steps()
        seconds = self._timed - before
        record = self._record(iteration, seconds)
        loss = self._heard.get(shown, float("nan"))
        self._interval.append((None if "skipped" in record else loss, seconds))
        if self._steps is not None:
            self._steps.write(json.dumps(record) + "\n")
        for listener in self.listeners:
            listener(record)
        if self._bar is not None:
            self._bar.n = iteration
            self._bar.refresh()
        if self.ends_interval(iteration):
            self._report(iteration)
        self._heard.clear()  # a step of fewer loops says nothing of the others

    def _record(self, iteration: int, seconds: float) -> dict[str, Any]:
        """A step's line of steps.jsonl."""
        skipped = self._skipped.pop(iteration, None)
        record: dict[str, Any] = {
            "iteration": iteration,
            "loss": self._heard.get("lm loss"),
            "grad_norm": self._heard["grad-norm"],
            "learning_rate": self._heard.get("learning-rate"),
            "seconds": round(seconds, 6),
            **({"skipped": skipped} if skipped else {}),
            **({"ranks": self.ranks} if self.ranks else {}),
        }
        self.ranks = {}
        record |= self._mixture.step_ended(self._heard)
        if ahead := of_step(MTP, self._heard):
            record["mtp"] = ahead
        for part in ("selected", "unselected", "weighted", "balance"):
            if f"{part} loss" in self._heard:
                record[f"{part}_loss"] = self._heard[f"{part} loss"]
        if (apart := "divergence from teacher") in self._heard:
            record[apart.replace(" ", "_")] = self._heard[apart]
        if torch.cuda.is_available():
            record["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        # JSON has no NaN.
        lost = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        return record | dict.fromkeys(lost)

    def _report(self, iteration: int) -> None:
        args = self._args
        losses = [loss for loss, _ in self._interval if loss is not None]
        loss = sum(losses) / len(losses) if losses else float("nan")
        seconds = sum(seconds for _, seconds in self._interval) / len(self._interval)
        self._interval.clear()
        tokens = args.global_batch_size * args.seq_length / seconds
        flops = tokens * self._flops / args.world_size
        self.scalar("throughput/tokens-per-second", tokens, iteration)
        self.scalar("throughput/seconds-per-step", seconds, iteration)
        self.scalar("throughput/tflops-per-device", flops / 1e12, iteration)
        self.scalar("alarms/so-far", self._alarms, iteration)
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            self.scalar("throughput/mfu", flops / PEAK_BF16, iteration)
        name = "loss" if "lm loss" in self._heard else "selected loss"
        mfu = f"MFU {flops / PEAK_BF16:6.1%}" if on_gpu else "MFU      -"
        self.say(
            f"step {iteration:>7}/{args.train_iters}  {name} {loss:7.4f}  "
            f"grad norm {self._heard['grad-norm']:7.3f}  lr {self._heard.get('learning-rate', 0.0):.2e}  "
            f"{tokens:9,.0f} tokens/s  {flops / 1e12:7.3f} TFLOP/s  {mfu}  "
            f"left {_clock(seconds * (args.train_iters - iteration))}"
        )
        for line in self._mixture.alarms():
            self.alarm("expert", line, iteration)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
