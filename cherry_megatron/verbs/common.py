"""What the verbs share."""

import argparse
from collections.abc import Callable
from pathlib import Path

from cherry_megatron.errors import CherryError

WORKERS = "processes (default 0, all cores)"  # of --workers, where it says so many


def add_verb(verbs: argparse._SubParsersAction, name: str, text: str, run: Callable) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def add_config(
    parser: argparse.ArgumentParser, required: bool = True, positional: bool = False, flags: bool = True
) -> None:
    if positional:
        parser.add_argument("config_file", nargs="?", type=Path, metavar="CONFIG", help="a YAML file of configs/")
    parser.add_argument("--config", type=Path, required=required and not positional, help="a YAML file of configs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key, e.g. recurrence.loops=4",
    )
    if flags:
        parser.set_defaults(flags=[])
        parser.epilog = "Megatron's own flags may follow after --"


def load_config(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    from cherry_megatron.config import load

    path = getattr(arguments, "config_file", None) or arguments.config
    if path is None:
        raise CherryError("name a configuration, e.g. configs/cherry_227m.yaml")
    return load(path, arguments.set, arguments.flags)
