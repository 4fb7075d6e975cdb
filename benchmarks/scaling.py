"""Several GPUs of one host against one, layout by layout, in one run, beside what `cherry plan` predicts.

    python benchmarks/scaling.py --tokenizer DIR --data PREFIX --work DIR --output RESULT.md [--seconds 540]
        [--only GROUP ...]
    python benchmarks/scaling.py --predict h200 --gpus 8 --output RESULT.md

Weak scaling: of each group (scaling_rows.py) every training against its first, on one GPU. Some are trained again
with their exchange counted and traced. What is measured is kept in --work: a start that finds it there goes on, and
one that runs out of --seconds says what is missing and ends with status 75. --predict measures nothing: it writes
down what the planner expects. --tiny trains small models on a CPU, by gloo, to see that everything runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import Any

import torch
from calibrate_planner import STARTING, Measuring
from planner_fit import Training
from pretraining import EVALUATIONS, end, environment_of, program
from profile_step import exposed, read
from scaling_rows import STOCK, exchanging, groups, tiny

from cherry_megatron.planner.coefficients import read as read_coefficients
from cherry_megatron.planner.hardware import GPUS
from cherry_megatron.platform.leaving import AGAIN
from cherry_megatron.platform.machine import prepare
from cherry_megatron.versions import git_state

TRACED = 3  # steps
_COLUMNS = (
    "s a step", "tokens/s", "of a GPU", "efficiency", "peak GiB",
    "predicted s", "predicted efficiency", "predicted GiB",
)  # fmt: skip


class Scaling:
    """Measures, and writes what there is after each part.

    Args:
        options: of the command line.
        count: GPUs.
    """

    def __init__(self, options: argparse.Namespace, count: int) -> None:
        self.options, self.count = options, count
        self.groups = groups(count)
        if options.tiny:
            self.groups = {
                group: {name: tiny(one) for name, one in rows.items()} for group, rows in self.groups.items()
            }
        self.measuring = Measuring(options, count)
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.cuda.get_device_name(0) if self.on_gpu else "CPU ranks"
        named = next((key for key, gpu in GPUS.items() if gpu.name in self.device), "h100")
        self.gpu = options.predict or named
        self.fitted = read_coefficients(self.gpu)

    def measure(self) -> None:
        """All that is asked for, and not yet there."""
        for group in self.options.only or self.groups:
            rows = {f"{group}: {name}": training for name, training in self.groups[group].items()}
            if group == STOCK:
                for key, training in rows.items():
                    self._stock(key, training)
            else:
                self.measuring.run(rows)
            self.write()
        for group, name in exchanging(self.count):
            if group in (self.options.only or self.groups):
                self._exchange(f"exchange of {group}, {name}", self.groups[group][name])
                self.write()

    def _stock(self, key: str, training: Training) -> None:
        given = [f"--sequences={training.sequences}", f"--steps={self.options.steps + 1}"]
        given += [f"--micro-batch={training.config.value('micro-batch-size')}"]
        if found := self._program(key, "stock_megatron.py", training, given):
            self.measuring.keep(key, found["seconds"], found["peak_gib"])

    def _exchange(self, key: str, training: Training) -> None:
        """Bytes that a rank sends in a step; on GPUs also the share of the step in which it does nothing else."""
        lengths: dict[str, Any] = {"train-iters": TRACED + 2, "lr-warmup-iters": 1, **EVALUATIONS}
        lengths |= {"global-batch-size": training.sequences, "save-interval": 1000, "no-save-optim": "true"}
        if self.on_gpu:
            lengths |= {"profile": "true", "use-pytorch-profiler": "true"}
            lengths |= {"profile-step-start": 2, "profile-step-end": 2 + TRACED}
        with tempfile.TemporaryDirectory() as folder:
            given = [
                f"--set=run={folder}/run",
                *(f"--set=megatron.{flag}={value}" for flag, value in lengths.items()),
                "--set=evaluation.batches=1",
            ]
            if found := self._program(key, "exchanged_bytes.py", training, given):
                self.measuring.store(key, {**found, **self._alone(key, Path(folder) / "run")})

    def _alone(self, key: str, run: Path) -> dict[str, float]:
        if not self.on_gpu:
            return {}
        try:
            return {"exposed": exposed(read(run))}
        except (OSError, ValueError) as error:  # the bytes are there all the same
            self.measuring.miss(f"{key}: no trace: {error}")
            return {}

    def _program(self, key: str, script: str, training: Training, given: list[str]) -> dict[str, Any] | None:
        """What a script beside this one writes into its --output; None if it is there already, or was not got."""
        left = self.measuring.left
        if key in self.measuring.found:
            return None
        if left < STARTING:
            self.measuring.stop(key)
            return None
        command = [*program(training.ranks), str(Path(__file__).with_name(script))]
        command += [f"--config=configs/{training.configuration}.yaml", *given]
        command += [f"--set={override}" for override in training.overrides]
        log = self.options.work / f"{key.replace(' ', '-')}.log"
        with tempfile.TemporaryDirectory() as folder, log.open("w") as out:
            output, environment = Path(folder) / "result.json", environment_of(self.options)
            with subprocess.Popen(
                [*command, f"--output={output}"], stdout=out, stderr=out, env=environment
            ) as process:
                try:
                    process.wait(min(left, self.options.limit))
                except subprocess.TimeoutExpired:
                    pass
                finally:
                    end(process)
            if process.returncode or not output.exists():
                self.measuring.fail(key, f"status {process.returncode}, see {log}")
                return None
            found: dict[str, Any] = json.loads(output.read_text())
            return found

    def write(self) -> None:
        """The tables, of what there is."""
        lines = [f"# One to {self.count} GPUs of one host", "", *self._head(), ""]
        for group, rows in self.groups.items():
            lines += [f"## {group}", "", *self._table(group, rows), ""]
        if not self.options.predict:
            lines += ["## Bytes that a rank sends in a step", "", *self._exchanged(), "", *self.measuring.missed]
        self.options.output.write_text("\n".join(lines).rstrip() + "\n")

    def _head(self) -> Iterator[str]:
        commit = git_state().get("commit", "unknown")
        if self.options.predict:
            yield f"`python benchmarks/scaling.py --predict {self.gpu} --gpus {self.count}`, commit {commit}."
            yield "**Nothing was measured.**"
        else:
            yield (
                f"`python benchmarks/scaling.py --steps {self.options.steps}{' --tiny' * self.options.tiny}` on "
                f"{self.count} {self.device} of one host, torch {torch.__version__}, commit {commit}. Of the steps "
                "the later half counts, Adam's part included."
            )
        yield f"Predicted by `cherry plan`'s model of an {self.gpu.upper()}: {self.fitted.source}"

    def _table(self, group: str, rows: dict[str, Training]) -> Iterator[str]:
        yield f"| | {' | '.join(_COLUMNS)} |"
        yield "|---" * (1 + len(_COLUMNS)) + "|"
        first: tuple[float, float] | None = None
        for name, training in rows.items():
            each = (
                training.sequences * training.config.value("seq-length") / training.ranks
            )  # tokens a step and GPU
            found = self.measuring.found.get(f"{group}: {name}", {"seconds": nan, "gib": nan})
            seconds, predicted = found["seconds"], training.seconds(GPUS[self.gpu], self.fitted)
            first = first or (each / seconds, each / predicted)
            cells = [
                f"{seconds:.3f}", f"{each * training.ranks / seconds:,.0f}", f"{each / seconds:,.0f}",
                f"{each / seconds / first[0]:.1%}", f"{found['gib'] or nan:.1f}", f"{predicted:.3f}",
                f"{each / predicted / first[1]:.1%}", f"{training.gib(GPUS[self.gpu], self.fitted):.1f}",
            ]  # fmt: skip
            yield f"| {name} | {' | '.join('-' if cell.startswith('nan') else cell for cell in cells)} |"

    def _exchanged(self) -> Iterator[str]:
        yield "| | group | collective | bytes a step | share of the step in which a rank does nothing else |"
        yield "|---|---|---|---|---|"
        for key, found in self.measuring.found.items():
            if key.startswith("exchange of "):
                alone = f"{found['exposed']:.1%}" if "exposed" in found else "-"
                for name, sent in found.items():
                    if name != "exposed":
                        label = f"{key.removeprefix('exchange of ')} | {name.replace(', ', ' | ')}"
                        yield f"| {label} | {sent:,.0f} | {alone} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="needed to measure, as --data")
    parser.add_argument("--data")
    parser.add_argument("--work", type=Path, help="folder for what is measured, and logs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gpus", type=int, help="how many (default: all there are)")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="of the groups' names")
    parser.add_argument("--steps", type=int, default=16, help="of a training")
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument("--limit", type=float, default=150, help="seconds that a training may take")
    parser.add_argument("--predict", choices=GPUS, help="measure nothing, and say what is expected of this kind")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to see that it runs")
    options = parser.parse_args()
    count = options.gpus or torch.cuda.device_count()
    if count < 2:
        parser.error("--gpus must be at least 2: there is nothing to hold against one GPU")
    if unknown := sorted(set(options.only or []) - set(groups(count))):
        parser.error(f"--only {unknown[0]!r} is none of {', '.join(groups(count))}")
    if options.predict is None and None in (options.tokenizer, options.data, options.work):
        parser.error("--tokenizer, --data and --work are needed to measure")
    prepare()
    with tempfile.TemporaryDirectory() as nothing:
        options.work = options.work or Path(nothing)
        options.work.mkdir(parents=True, exist_ok=True)
        scaling = Scaling(options, count)
        if options.predict is None:
            scaling.measure()
        scaling.write()
    print(options.output.read_text())
    return AGAIN if scaling.measuring.late else 0


if __name__ == "__main__":
    sys.exit(main())
