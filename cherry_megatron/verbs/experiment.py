"""experiment run, experiment report."""

import argparse
from pathlib import Path

from cherry_megatron.verbs.common import add_verb


def add_experiment(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from cherry_megatron.experiments.run import run

        return run(
            arguments.experiment, arguments.out, arguments.gpus, arguments.jobs_per_gpu, arguments.only,
            arguments.limit,
        )  # fmt: skip

    def report(arguments: argparse.Namespace) -> None:
        from cherry_megatron.experiments.report import report

        for path in report(arguments.experiment, arguments.records, arguments.out, arguments.plot):
            print(path)

    text = "run the stages of an experiment, or report what they found"
    actions = verbs.add_parser("experiment", help=text, description=text).add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    parser = add_verb(actions, "run", "run what is not done yet; goes on where it was stopped", run)
    parser.add_argument("experiment", metavar="NAME", help="of configs/experiments/NAME.yaml, or a file")
    parser.add_argument("--out", type=Path, required=True, help="folder of its runs, logs and records")
    parser.add_argument("--gpus", type=int, help="how many to use (default all; without any, the CPU)")
    parser.add_argument(
        "--jobs-per-gpu", type=int, default=1, help="tasks at once on each, or on the CPU (default 1)"
    )
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages, with what they need")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="stop then, so that a later start goes on")
    parser = add_verb(actions, "report", "the table and the plots of an experiment's records", report)
    parser.add_argument("experiment", metavar="NAME", help="of configs/experiments/NAME.yaml, or a file")
    parser.add_argument("--records", type=Path, required=True, help="records.jsonl of an experiment's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write table.md and the plots to")
    parser.add_argument(
        "--plot", nargs="+", metavar="STAGE",
        help="these alone in the plots over tokens, loops, parameters, FLOPs and probes (default all)",
    )  # fmt: skip
