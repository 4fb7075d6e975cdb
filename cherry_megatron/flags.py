"""Megatron's flags: their names as its own parser has them, and values from and to its command line.

megatron_flags.txt names all of them with what each takes, for checkpoint surgery: the import of Megatron's parser
takes longer than the work. It is made from that parser, and made anew for another release of Megatron, by
`python -m cherry_megatron.flags`; a test holds the two together.
"""

import argparse
import ast
import difflib
import re
import typing
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from cherry_megatron.errors import CherryError


def nearest(name: object, known: Iterable[str]) -> str:
    """The end of an error message: the most similar of the known names."""
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else f"; known are {', '.join(sorted(known)[:12])}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        found = re.fullmatch(r"argument --([\w-]+)[^:]*: (.*)", message, re.DOTALL)
        if found is None:
            raise CherryError(f"Megatron's flags: {message}")
        flag, why = found.groups()
        if number := re.fullmatch(r"invalid (int|float) value: '(.*)'", why, re.DOTALL):
            raise CherryError(f"megatron.{flag} is {number[2]!r}{_instead(*number.groups())}")
        raise CherryError(f"megatron.{flag}: {why}")


def _instead(kind: str, text: str) -> str:
    """What to write for a value that is no number of a kind, as the end of a message."""
    if kind == "float":
        return "; it takes a number"
    try:
        whole = f": write {int(float(text))}" if float(text).is_integer() and abs(float(text)) < 2**53 else ""
    except ValueError:
        whole = ""
    return f"; it takes a whole number{whole}"


def _several(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them, such as those of window-size."""
    try:
        return tuple(int(number) for number in text.strip("()").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers such as 128,0") from None


def _layers(text: str) -> int | list[int]:
    """Which layers: every n-th, or a list of zeros and ones that is written as a sum of products of lists."""
    try:
        return _listed(ast.parse(text.strip(), mode="eval").body) if "[" in text else int(text)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a list such as ([0]*3+[1])*2") from None


def _listed(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int(number)):
            return number
        case ast.List(elts=parts):
            return [_listed(part) for part in parts]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _listed(left) + _listed(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _listed(left) * _listed(right)
    raise ValueError


TABLE = Path(__file__).with_name("megatron_flags.txt")
_TYPES: dict[str, Any] = {"int": int, "float": float, "several": _several, "layers": _layers}
# Megatron's own types -> ours.
_KINDS = {
    "int": "int", "float": "float", "tuple_type": "several", "no_rope_freq_type": "layers",
    "moe_freq_type": "layers", "la_freq_type": "layers",
}  # fmt: skip
# What the table says of a flag -> how argparse declares it.
_DECLARED: dict[str, dict[str, Any]] = {
    "switch": {"action": "store_true"}, "value": {}, "values": {"nargs": "*"},
    **{name: {"type": kind} for name, kind in _TYPES.items()},
}  # fmt: skip


@cache
def _parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(_Parser(allow_abbrev=False, add_help=False))


@cache
def _outline() -> argparse.ArgumentParser:
    """A parser of the same names that knows switches, types and the rest, without Megatron."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        flag, kind = line.split()
        parser.add_argument(f"--{flag}", dest=flag, **_DECLARED[kind])
    return parser


def table_of_flags() -> str:
    """The content of megatron_flags.txt, from Megatron's parser."""
    options = sorted(_parser()._option_string_actions.items())
    return "".join(f"{option.removeprefix('--')} {_kind(action)}\n" for option, action in options)


def _kind(action: argparse.Action) -> str:
    if action.nargs is not None:
        return "values" if action.nargs else "switch"
    return _KINDS.get(getattr(action.type, "__name__", ""), "value")


def action_of(flag: str) -> argparse.Action:
    """Megatron's definition of a flag."""
    check_name(flag)
    return _parser()._option_string_actions[f"--{flag}"]


def check_name(flag: str, path: Path | None = None) -> None:
    """See that Megatron has a flag.

    Args:
        flag: its name.
        path: the file that has it as a key of `megatron`; None if it is from a command line.

    Raises:
        CherryError: with the nearest name.
    """
    options = _outline()._option_string_actions
    if f"--{flag}" not in options:
        known = [option.removeprefix("--") for option in options]
        where = f"{path}: unknown key megatron.{flag}" if path else f"unknown Megatron flag --{flag}"
        raise CherryError(f"{where}{nearest(flag, known)}")


def names_of(flags: Iterable[str]) -> set[str]:
    """The names of flags as they follow after `--`."""
    return {flag.removeprefix("--").partition("=")[0] for flag in flags if flag.startswith("--")}


def outline_values(values: dict[str, Any], flags: Iterable[str] = ()) -> dict[str, Any]:
    """What a `megatron` section and the flags after it set, as Megatron reads it, without its import.

    Raises:
        CherryError: naming a flag that is unknown, or a value that is not of the flag's type.
    """
    given = names_of(flags)
    for flag in given:
        check_name(flag)
    found = vars(_outline().parse_args([*megatron_arguments(values), *flags]))
    read = given | {action.dest for action in _outline()._actions if action.type is not None}
    return {flag: found[flag] if flag in read else values[flag] for flag in (*values, *sorted(given))}


def flags_starting(words: str) -> list[str]:
    """Megatron's flags whose names begin so."""
    return [o.removeprefix("--") for o in _parser()._option_string_actions if o.startswith(f"--{words}")]


def megatron_arguments(values: dict[str, Any]) -> list[str]:
    """Flags and values as Megatron's command line has them."""
    arguments: list[str] = []
    for key, value in values.items():
        check_name(key)
        action = _outline()._option_string_actions[f"--{key}"]
        nargs, takes_value = action.nargs, action.nargs != 0
        if isinstance(value, bool) and not takes_value:
            arguments += [f"--{key}"] if value else []
        elif value is None:
            continue
        elif not takes_value:
            raise CherryError(f"megatron.{key} is {value!r}; it is a switch: use true or false")
        elif nargs is None:
            if isinstance(value, list | dict):
                raise CherryError(f"megatron.{key} is {value!r}; it takes one value{_as_text(action, value)}")
            arguments.append(f"--{key}={value}")  # in one piece, or a negative number would be taken for a flag
        else:
            arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def _as_text(action: argparse.Action, value: Any) -> str:
    """How a list is written for a flag that takes it as one text, as the end of a message."""
    if action.type is _layers:
        return f', in quotes and without spaces: "{str(value).replace(" ", "")}"'
    several = action.type is _several and isinstance(value, list)
    return f", without brackets: {','.join(map(str, value))}" if several else ", without brackets"


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Megatron's own parser, with errors as one sentence."""
    _outline().parse_known_args(arguments)  # some of Megatron's types fail with a traceback
    known, unknown = _parser().parse_known_args(arguments)
    if unknown:
        flag = unknown[0].lstrip("-").split("=")[0]
        action_of(flag)
        raise CherryError(f"Megatron's flags: do not know what to do with {unknown[0]!r}")
    return known


if __name__ == "__main__":
    TABLE.write_text(table_of_flags(), encoding="utf-8")
