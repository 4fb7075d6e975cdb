"""Megatron's flags: their names as its own parser has them, and values from and to its command line."""

import argparse
import difflib
import typing
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from cherry_megatron.errors import CherryError


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the most similar of the known names."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else f"; known are {', '.join(sorted(known)[:12])}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise CherryError(f"Megatron's flags: {message}")


@cache
def _parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(_Parser(allow_abbrev=False, add_help=False))


def action_of(flag: str, path: Path | None = None) -> argparse.Action:
    """Megatron's definition of a flag."""
    options = _parser()._option_string_actions
    if f"--{flag}" not in options:
        known = [option.removeprefix("--") for option in options]
        where = f"{path}: unknown key megatron.{flag}" if path else f"unknown Megatron flag --{flag}"
        raise CherryError(f"{where}{nearest(flag, known)}")
    return options[f"--{flag}"]


def known_flags() -> list[str]:
    """The names of Megatron's flags, one of each."""
    return [action.option_strings[0].removeprefix("--") for action in _parser()._actions]


def megatron_arguments(values: dict[str, Any]) -> list[str]:
    """Flags and values as Megatron's command line has them."""
    arguments: list[str] = []
    for key, value in values.items():
        nargs = action_of(key).nargs
        takes_value = nargs != 0
        if isinstance(value, bool) and not takes_value:
            arguments += [f"--{key}"] if value else []
        elif value is None:
            continue
        elif not takes_value:
            raise CherryError(f"megatron.{key} is {value!r}; it is a switch: use true or false")
        elif nargs is None:
            if isinstance(value, list | dict):
                raise CherryError(f"megatron.{key} is {value!r}; it takes one value, without brackets")
            arguments.append(f"--{key}={value}")  # in one piece, or a negative number would be taken for a flag
        else:
            arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Megatron's own parser, with errors as one sentence."""
    known, unknown = _parser().parse_known_args(arguments)
    if unknown:
        flag = unknown[0].lstrip("-").split("=")[0]
        action_of(flag)
        raise CherryError(f"Megatron's flags: do not know what to do with {unknown[0]!r}")
    return known
