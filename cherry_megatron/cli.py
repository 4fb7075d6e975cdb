"""The one command: `cherry VERB`."""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from cherry_megatron import __version__
from cherry_megatron.errors import CherryError
from cherry_megatron.monitor.console import hide_warnings
from cherry_megatron.platform.leaving import INTERRUPTED, leave
from cherry_megatron.verbs.board import add_board
from cherry_megatron.verbs.convert import add_convert_hf
from cherry_megatron.verbs.data import add_data, add_tokenizer
from cherry_megatron.verbs.evaluate import add_evaluate
from cherry_megatron.verbs.experiment import add_experiment
from cherry_megatron.verbs.init import add_init
from cherry_megatron.verbs.job import add_job
from cherry_megatron.verbs.plan import add_plan
from cherry_megatron.verbs.report import add_report
from cherry_megatron.verbs.sgt import add_select
from cherry_megatron.verbs.status import add_status
from cherry_megatron.verbs.surgery import add_assemble_moee, add_calibrate, add_compress_depth, add_lineage
from cherry_megatron.verbs.training import add_doctor, add_generate, add_params, add_pretrain


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """`main` as a process of its own: ends it, with status 1 after an unforeseen error."""
    try:
        status = main(argv)
    except SystemExit as stop:  # argparse's and Megatron's
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        leave(INTERRUPTED)  # here, where what the verb had is not yet taken apart: a second one would end in that
    except BaseException:  # a failed checkpoint is no Exception
        sys.excepthook(*sys.exc_info())  # torch's names the rank
        status = 1
    leave(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Bad input is one sentence on stderr and status 2, Ctrl-C a line and raised again."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, flags = _split_flags(argv)
    arguments = _parser().parse_args(argv)
    if flags and not hasattr(arguments, "flags"):
        _parser().error(f"{arguments.verb} takes no Megatron flags after --")
    arguments.flags = flags
    hide_warnings()
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except CherryError as error:
        print(f"cherry {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cherry {arguments.verb}: interrupted", file=sys.stderr)
        raise
    except BrokenPipeError:
        # Who read the output has seen enough (`| head -1`); at its end Python would write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def options_of(verb: str) -> list[str]:
    """The names of a verb's options, without dashes.

    Raises:
        CherryError: if there is no such verb.
    """
    verbs = _verbs()
    if verb not in verbs:
        raise CherryError(f"there is no verb {verb}")
    return [option.removeprefix("--") for option in verbs[verb]._option_string_actions]


def check_arguments(verb: str, arguments: Sequence[str]) -> None:
    """See whether a verb takes these arguments.

    Raises:
        CherryError: what is wrong with them.
    """
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            _verbs()[verb].parse_args(arguments)
        except SystemExit:
            raise CherryError(said.getvalue().strip().splitlines()[-1]) from None


def _verbs() -> dict[str, argparse.ArgumentParser]:
    """The parsers of all verbs by name."""
    (verbs,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return verbs.choices


def _split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    cut = argv.index("--")
    return argv[:cut], argv[cut + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cherry", description="Train CHERRY models on Megatron-core.")
    parser.add_argument("--version", action="version", version=f"cherry-megatron {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_doctor(verbs)
    add_init(verbs)
    add_tokenizer(verbs)
    add_data(verbs)
    add_select(verbs)
    add_pretrain(verbs)
    add_evaluate(verbs)
    add_generate(verbs)
    add_params(verbs)
    add_plan(verbs)
    add_calibrate(verbs)
    add_compress_depth(verbs)
    add_assemble_moee(verbs)
    add_convert_hf(verbs)
    add_lineage(verbs)
    add_status(verbs)
    add_board(verbs)
    add_experiment(verbs)
    add_report(verbs)
    add_job(verbs)
    return parser


if __name__ == "__main__":
    program()
