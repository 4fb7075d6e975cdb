"""report."""

import argparse
from pathlib import Path

from cherry_megatron.verbs.common import add_verb


def add_report(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.errors import CherryError
        from cherry_megatron.monitor.document import markdown_page
        from cherry_megatron.report.page import report, selective_report, write

        if arguments.sgt and arguments.plot:
            raise CherryError("--plot picks the curves of a whole report, and --sgt has none; take one out")
        title, found = selective_report(arguments.runs) if arguments.sgt else report(arguments.runs, arguments.plot)
        if arguments.out is None:
            print(markdown_page(title, found), end="")
            return
        for path in write(arguments.out, title, found):
            print(path)

    parser = add_verb(verbs, "report", "what runs and experiments have found, as one page", run)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, or an experiment's records.jsonl"
    )
    parser.add_argument(
        "--sgt", action="store_true", help="only what selective runs recover of the full ones that they pair with"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for report.html, report.md and the plots (default: print the Markdown)",
    )  # fmt: skip
    parser.add_argument(
        "--plot", nargs="+", metavar="NAME",
        help="these trainings alone in the plots of curves (default: all; of over ten those with most seeds)",
    )  # fmt: skip
