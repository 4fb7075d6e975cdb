"""plan."""

import argparse
from pathlib import Path

from cherry_megatron.errors import CherryError
from cherry_megatron.verbs.common import add_config, add_verb, load_config


def add_plan(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.planner.coefficients import FILE, read
        from cherry_megatron.planner.hardware import GPUS
        from cherry_megatron.planner.rates import Rates
        from cherry_megatron.platform.machine import prepare

        if arguments.gpus is not None and arguments.gpus < 1:
            raise CherryError(f"--gpus {arguments.gpus}: it takes a positive number")
        if arguments.gpus is None and arguments.scale is None:
            raise CherryError("give --gpus, a number, or --scale, several; e.g. --gpus 8")
        if arguments.gpu not in GPUS:
            raise CherryError(f"--gpu {arguments.gpu} is not one of {', '.join(GPUS)}")
        rates = Rates(GPUS[arguments.gpu], read(arguments.gpu, arguments.coefficients or FILE))
        prepare()
        config = load_config(arguments)
        if arguments.gpus is not None:
            from cherry_megatron.planner.choice import choose
            from cherry_megatron.planner.job import job_of
            from cherry_megatron.planner.tables import plan_table

            print(plan_table(choose(job_of(config), arguments.gpus, rates)))
        if arguments.scale is not None:
            from cherry_megatron.planner.scale import scale_table

            print(scale_table(config, _counts(arguments.scale), rates))

    parser = add_verb(verbs, "plan", "propose a layout; predict its memory and the time of a step", run)
    parser.add_argument("--gpus", type=int, metavar="N", help="how many there are")
    parser.add_argument("--gpu", default="h100", help="their kind: h100 or h200 (default h100)")
    parser.add_argument("--scale", metavar="N,N,...", help="how cost grows over these numbers of GPUs")
    parser.add_argument(
        "--coefficients", type=Path, metavar="F", help="another file of benchmarks/calibrate_planner.py"
    )
    add_config(parser, positional=True)


def _counts(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise CherryError(f"--scale {text}: it takes numbers with commas between them, e.g. 8,64,512") from None
