"""A mixture's training goes on over other numbers of GPUs of a host, and after a rank was killed while it saved.

    python benchmarks/host_resume.py --tokenizer DIR --data PREFIX --output RESULT.md [--gpus N] [--folder DIR]

CHERRY-1.8B's eight experts, optimizer state and all: twelve steps on all N GPUs without a save; the same in three
parts, on N, N / 2 and N again; and the same with a rank killed by SIGKILL in the middle of the first save, and
started again.
Losses and gradient norms are held against the undisturbed steps. --tiny trains a small model on a CPU, by gloo.
"""

import argparse
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from pretraining import NO_SAVES, SEQUENCES, command_of, end, train_in

from cherry_megatron.runs import read_steps
from cherry_megatron.storage.tracker import newest
from cherry_megatron.versions import git_state

STEPS, PART = 12, 4
SAVES = f"--save-interval {PART}"
# As configured, eight experts with their optimizer state, on any number of GPUs that divides it.
EXPERTS = "moee.experts=8"


class Host:
    """Trains on some of the GPUs of this host.

    Args:
        folder: for runs.
        options: of the command line.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        options.steps = STEPS
        self.configuration = "tiny_moee" if options.tiny else "cherry_1p8b"

    def given(self, ranks: int) -> tuple[str, list[str]]:
        """The configuration, and what it says otherwise on so many ranks."""
        ours = ["evaluation.batches=1", "checkpoints.keep=1"]  # each has 25 GB
        return self.configuration, [EXPERTS, f"megatron.expert-model-parallel-size={ranks}", *ours]

    @property
    def batch(self) -> str:
        """The same number of sequences a step, whatever the ranks."""
        return f"--global-batch-size {SEQUENCES * self.options.gpus} --micro-batch-size 1 --eval-micro-batch-size 1"

    def train(self, name: str, ranks: int, flags: str = "", saves: str = SAVES) -> list[dict[str, float]]:
        """The run's steps so far, once it has ended."""
        return train_in(
            self.folder / name, *self.given(ranks), f"{self.batch} {flags}".split(), self.options, ranks, saves
        )

    def train_and_kill(self, name: str) -> str:
        """Train until the first save has begun to write, and kill a rank; which, and when."""
        run, ranks = self.folder / name, self.options.gpus
        command, environment = command_of(run, *self.given(ranks), self.batch.split(), self.options, ranks, SAVES)
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as launcher:
            until = time.monotonic() + self.options.limit
            while not (written := list((run / "checkpoints").glob(".iter_*.partial/*.distcp"))):
                if launcher.poll() is not None or time.monotonic() > until:
                    end(launcher)
                    raise RuntimeError("no save was seen to begin")
                time.sleep(0.005)
            found = [one for one in psutil.Process(launcher.pid).children() if "pretrain" in one.cmdline()]
            found[-1].kill()
            launcher.wait()
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        return f"one of {len(found)} ranks, when {written[0].name} was there; left: {', '.join(left)}"


def compared(name: str, found: list[dict[str, float]], whole: list[dict[str, float]]) -> str:
    """A row of Markdown: the largest relative differences from the undisturbed steps.

    Raises:
        RuntimeError: if a step is missing.
    """
    if [step["iteration"] for step in found] != list(range(1, STEPS + 1)):
        raise RuntimeError(f"{name}: steps {[step['iteration'] for step in found]}")
    worst = [
        max(abs(a[value] - b[value]) / abs(b[value]) for a, b in zip(found, whole, strict=True))
        for value in ("loss", "grad_norm")
    ]
    return f"| {name} | {found[-1]['loss']:.6f} | {worst[0]:.1e} | {worst[1]:.1e} |"


def measure(host: Host) -> Iterator[str]:
    """Lines of Markdown."""
    gpus = host.options.gpus
    whole = host.train("whole", gpus, saves=NO_SAVES)
    yield "| | last loss | losses differ by | gradient norms by |"
    yield "|---|---|---|---|"
    yield f"| {gpus} GPUs, undisturbed | {whole[-1]['loss']:.6f} | | |"
    yield compared("the same again", host.train("again", gpus, saves=NO_SAVES), whole)
    for ranks in (gpus, gpus // 2, gpus):
        parts = host.train("parts", ranks, f"--exit-interval {PART}")
    yield compared(f"{gpus}, {gpus // 2} and {gpus} GPUs, {PART} steps each", parts, whole)
    said = host.train_and_kill("killed")
    begun = [step["iteration"] for step in read_steps(host.folder / "killed")]
    yield compared("a rank killed while it saved, started again", host.train("killed", gpus), whole)
    saved = newest(host.folder / "killed" / "checkpoints")
    size = sum(path.stat().st_size for path in saved.iterdir())
    yield ""
    yield f"Differences are relative, the largest of {STEPS} steps. A checkpoint has {size / 1e9:.2f} GB."
    yield f"The kill: {said}. {len(begun)} steps were recorded until then."
    log = (host.folder / "killed" / "logs" / "rank0.log").read_text(errors="replace")
    yield f"Newest at the end: {saved.name}. The second start began at step {_began(log)}."


def _began(log: str) -> str:
    found = re.findall(r"at iteration (\d+)", log)
    return found[-1] if found else "1, as there was no checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="how many (default: all)")
    parser.add_argument("--folder", type=Path, help="for the checkpoints (default: of temporary files)")
    parser.add_argument("--limit", type=int, default=240, help="seconds that a training may take")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to see that it runs")
    options = parser.parse_args()
    if options.gpus not in (2, 4, 8):
        parser.error(f"--gpus {options.gpus}: eight experts need 2, 4 or 8")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU ranks"
    lines = [
        "# A mixture's training over all GPUs of a host, half of them, and after a kill",
        "",
        f"`python benchmarks/host_resume.py{' --tiny' * options.tiny}` on {options.gpus} {device}, torch "
        f"{torch.__version__}, commit {git_state().get('commit', 'unknown')}. 8 experts, as many "
        f"expert-parallel ranks as GPUs, {SEQUENCES * options.gpus} sequences a step in all rows.",
        "",
    ]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for line in measure(Host(Path(folder), options)):
            print(line, flush=True)
            lines.append(line)
            options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
