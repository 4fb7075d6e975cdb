"""report."""

import argparse
from pathlib import Path

from cherry_megatron.verbs.common import add_verb


def add_report(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.files import cannot_write, make_folder, write_atomically
        from cherry_megatron.sgt.report import report

        text = report(arguments.sgt)
        if arguments.out is None:
            print(text, end="")
            return
        make_folder(arguments.out.parent)
        try:
            write_atomically(arguments.out, text)
        except OSError as error:
            raise cannot_write(arguments.out, error) from None
        print(arguments.out)

    parser = add_verb(verbs, "report", "compare selective runs with the full ones that they pair with", run)
    parser.add_argument(
        "--sgt", type=Path, nargs="+", required=True, metavar="RUN", help="folders of runs, selective and full"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the Markdown there (default: print it)")
