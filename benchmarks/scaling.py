"""Tokens a second of several GPUs of one host against one, layout by layout, in one run.

    python benchmarks/scaling.py --tokenizer DIR --data PREFIX --output RESULT.md [--steps 20]

Weak scaling: 8 sequences of 4096 a step and GPU. Beside the recurrent model its untied twin of the same 34 layers.
"""

import argparse
from pathlib import Path

import torch
from pretraining import SEQUENCES, median_seconds, train

from cherry_megatron.versions import git_state

TWIN = ["recurrence.pattern=(*-)x34"]
OVERLAP = "--overlap-grad-reduce --overlap-param-gather"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
LAYOUTS = {
    "DP={n}": OVERLAP,
    "DP={n}, no overlap": "",
    "TP=2 x DP={half}": f"{TP2} {OVERLAP}",
    "PP=2 x DP={half}": "--pipeline-model-parallel-size 2 --micro-batch-size 1",
    "PP=4 x DP={quarter}": "--pipeline-model-parallel-size 4 --micro-batch-size 1",
    "TP=2 x PP=2 x DP={quarter}": f"{TP2} --pipeline-model-parallel-size 2 --micro-batch-size 1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=int, default=120, help="seconds a layout may take")
    options = parser.parse_args()
    count = torch.cuda.device_count()
    lines = [
        f"# One to {count} GPUs",
        "",
        f"`python benchmarks/scaling.py --steps {options.steps}` on {count} {torch.cuda.get_device_name(0)} of one "
        f"host, torch {torch.__version__}, BF16, commit {git_state().get('commit', 'unknown')}. "
        f"{SEQUENCES} sequences of 4096 a step and GPU, Adam step included. Efficiency: tokens a second and GPU "
        "against the first row.",
        "",
        "| model | layout | tokens/s | a GPU | efficiency | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    layouts = {
        name.format(n=count, half=count // 2, quarter=count // 4): flags
        for name, flags in LAYOUTS.items()
        if count >= 4 or "quarter" not in name
    }
    for model, overrides in {"cherry_227m": [], "its untied twin, 34 layers": TWIN}.items():
        alone = None
        for layout, flags in {"one GPU": "", **layouts}.items():
            ranks = 1 if layout == "one GPU" else count
            try:
                steps = train("cherry_227m", overrides, flags.split(), options, ranks)
            except RuntimeError as error:
                lines.append(f"| {model} | {layout} | {error} | | | |")
            else:
                each = SEQUENCES * 4096 / median_seconds(steps)
                alone = alone or each
                peak = max(step["peak_gib"] for step in steps)
                lines.append(
                    f"| {model} | {layout} | {each * ranks:,.0f} | {each:,.0f} | {each / alone:.1%} | {peak:.1f} |"
                )
            print(lines[-1], flush=True)
            options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
