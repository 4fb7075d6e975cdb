"""status."""

import argparse
from pathlib import Path

from cherry_megatron.verbs.common import add_verb


def add_status(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from cherry_megatron.monitor.status import status

        lines, undamaged = status(arguments.run_folder, arguments.verify)
        print("\n".join(lines))
        return 0 if undamaged or not arguments.verify else 2

    parser = add_verb(verbs, "status", "how far a run is, what it last saved, and what went wrong", run)
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the hashes of its newest checkpoint; status 2 if it is damaged",
    )
