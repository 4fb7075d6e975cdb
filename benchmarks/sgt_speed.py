"""What selective supervision costs a step of training, variant by variant, in one run on one GPU.

    python benchmarks/sgt_speed.py --tokenizer DIR --data PREFIX --output RESULT.md [--steps 24]

PREFIX needs marks `random` of 15%. `cherry pretrain` runs once a variant on cherry_227m, all sequences of a step in
one micro-batch, so that the GPU and not Python sets the pace. A step's seconds leave probes out; a probe's are the
wall time that steps with one take more. Plain training runs twice: the difference between the two is what this
machine cannot tell apart. So the loss function is timed alone, too, as a replayed graph.
"""

import argparse
import tempfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from pretraining import SEQUENCES, median_seconds, train_in

from cherry_megatron.sgt.loss import Supervision, loss_function
from cherry_megatron.versions import git_state

MARKS = "sgt.marks=random"
PROBE = [MARKS, "sgt.alpha=0.7", "sgt.probe_interval=1"]
NO_OVERLAP = ["megatron.overlap-grad-reduce=false", "megatron.overlap-param-gather=false"]
WHOLE = [f"megatron.micro-batch-size={SEQUENCES}"]
GRAPH = ["megatron.cuda-graph-impl=full_iteration"]
# name: overrides
VARIANTS = {
    "plain, one graph": GRAPH,
    "marks, alpha 0.7, one graph": [MARKS, "sgt.alpha=0.7", *GRAPH],
    "plain": [],
    "marks, alpha 0.7": [MARKS, "sgt.alpha=0.7"],
    "marks, alpha 1": [MARKS, "sgt.alpha=1.0"],
    "marks, alpha 1, skip_head": [MARKS, "sgt.alpha=1.0", "sgt.skip_head=true"],
    "top loss online, alpha 0.7": ["sgt.top_loss=0.15", "sgt.alpha=0.7"],
    "a probe each step": PROBE,
    "a probe each step, loop by loop": [*PROBE, "sgt.probe_loops=true", *NO_OVERLAP],
    "plain again": [],
    "plain again, one graph": GRAPH,
    "marks, alpha 0.7, again, one graph": [MARKS, "sgt.alpha=0.7", *GRAPH],
}


def wall_seconds(folder: Path) -> list[float]:
    """Between one step's gradient norm and the next one's, from TensorBoard's own clock."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    times = [event.wall_time for event in events.Scalars("grad-norm")]
    return [after - before for before, after in pairwise(times)]


def loss_milliseconds(marked: bool, replays: int = 1000) -> float:
    """From the tokens' cross-entropies of a step to their gradients, and what is reported."""
    losses = torch.rand(SEQUENCES, 4096, device="cuda", requires_grad=True)
    mask = torch.ones(SEQUENCES, 4096, device="cuda")
    selected = (torch.rand_like(mask) < 0.15).float() if marked else None
    settings = SimpleNamespace(mode="weighted", alpha=mask.new_tensor(0.7), rho=mask.new_tensor(0.15))

    def step() -> None:
        weights = None if selected is None else Supervision.weights(settings, selected)  # type: ignore[arg-type]
        total, _, _ = loss_function(mask, losses, selected, weights)
        torch.autograd.grad(total, losses)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(replays):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / replays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--limit", type=int, default=200, help="seconds a variant may take")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    options = parser.parse_args()
    lines = [
        "# What selective supervision costs",
        "",
        f"`python benchmarks/sgt_speed.py --steps {options.steps}` on one {torch.cuda.get_device_name(0)}, torch "
        f"{torch.__version__}, commit {git_state().get('commit', 'unknown')}. cherry_227m, BF16, {SEQUENCES} "
        "sequences of 4096 a step in one micro-batch, Adam step included; median without the "
        "first third of the steps. 15% of the tokens are selected.",
        "",
        "| variant | s a step | against plain | tokens/s | peak GiB | wall s a step, probe included |",
        "|---|---|---|---|---|---|",
    ]
    plain: dict[bool, float] = {}  # with a graph and without
    for name in options.only:
        overrides = VARIANTS[name]
        try:
            with tempfile.TemporaryDirectory() as folder:
                steps = train_in(Path(folder), "cherry_227m", [*WHOLE, *overrides], [], options)
                whole = median_seconds([{"seconds": seconds} for seconds in wall_seconds(Path(folder))])
        except RuntimeError as error:
            lines.append(f"| {name} | {error} | | | | |")
        else:
            seconds = median_seconds(steps)
            against = plain.setdefault("graph" in name, seconds)
            lines.append(
                f"| {name} | {seconds:.4f} | {seconds / against - 1:+.2%} | {SEQUENCES * 4096 / seconds:,.0f} | "
                f"{steps[-1]['peak_gib']:.1f} | {whole:.3f} |"
            )
        print(lines[-1], flush=True)
        options.output.write_text("\n".join(lines) + "\n")
    alone = [loss_milliseconds(marked) for marked in (False, True)]
    lines += ["", f"The loss function alone: plain {alone[0]:.3f} ms, with marks and alpha 0.7 {alone[1]:.3f} ms."]
    print(lines[-1], flush=True)
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
