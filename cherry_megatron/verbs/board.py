"""board."""

import argparse
from pathlib import Path

from cherry_megatron.verbs.common import add_verb


def add_board(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.monitor.serving import serve

        serve(arguments.runs, arguments.host, arguments.port)

    parser = add_verb(verbs, "board", "open TensorBoard on runs", run)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, or folders with runs in them"
    )
    parser.add_argument("--host", default="localhost", help="name or address to listen on (default localhost)")
    parser.add_argument("--port", type=int, default=6006, help="to listen on; 0 takes a free one (default 6006)")
