"""init."""

import argparse
from pathlib import Path

from cherry_megatron.verbs.common import add_verb


def add_init(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.beginning import begin

        for folder in begin(arguments.folder):
            print(f"wrote {folder}")

    parser = add_verb(verbs, "init", "copy the project's configs/ and slurm/ into a folder, to work in it", run)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), metavar="DIR", help="(default: this one)")
