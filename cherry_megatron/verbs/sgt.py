"""select."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cherry_megatron.errors import CherryError
from cherry_megatron.verbs.common import add_config, add_verb

if TYPE_CHECKING:
    from cherry_megatron.sgt.selection.selectors import Selector

ASKING = ("top-loss", "excess-loss", "entropy")
# Which selectors an option is for.
OPTIONS = {
    "seed": ("random",),
    "triggers": ("semantic",),
    "workers": ("semantic", "random"),
    "config": ASKING,
    "set": ASKING,
    "flags": ASKING,
    "reference_config": ("excess-loss",),
}


def add_select(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.sgt.selection.select import check, select
        from cherry_megatron.sgt.selection.show import show, summary

        prefix, name = arguments.data, arguments.name or arguments.selector
        _check(arguments)
        if arguments.selector is not None:
            check(prefix, name, arguments.rho)
            workers = 1 if arguments.config else arguments.workers or len(os.sched_getaffinity(0))
            selection = select(prefix, _selector(arguments), arguments.rho, name, workers)
            print(summary(selection, prefix, arguments.tokenizer))
        if arguments.show:
            print(show(prefix, name, arguments.tokenizer, arguments.show))

    parser = add_verb(verbs, "select", "mark the tokens of a data set that are supervised (SGT)", run)
    parser.add_argument("--data", type=Path, required=True, metavar="PREFIX", help="written by `cherry data`")
    parser.add_argument("--selector", help="semantic, random, top-loss, excess-loss or entropy")
    parser.add_argument("--rho", type=float, default=0.15, help="share of the tokens to mark (default 0.15)")
    parser.add_argument("--name", help="of the marks, PREFIX.NAME.* (default the selector)")
    parser.add_argument("--tokenizer", type=Path, help="folder made by `cherry tokenizer`; for semantic and --show")
    parser.add_argument("--workers", type=int, help="processes of semantic and random (default 0, all cores)")
    parser.add_argument("--seed", type=int, help="of random (default 0)")
    parser.add_argument("--triggers", type=Path, help="of semantic: expressions, one a line, instead of ours")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print N documents with [marks], also of an earlier run"
    )
    parser.add_argument("--reference-config", type=Path, help="of excess-loss: the model whose loss is taken off")
    add_config(parser, required=False)


def _check(arguments: argparse.Namespace) -> None:
    """What does not go together is refused before anything is imported."""
    from cherry_megatron.sgt.selection.selectors import NAMES

    selector = arguments.selector
    if selector is not None and selector not in NAMES:
        raise CherryError(f"--selector {selector} is unknown; there are {', '.join(NAMES)}")
    if selector is None and not (arguments.show and arguments.name):
        raise CherryError("give --selector, or --show N with the --name of marks that are there")
    if arguments.workers is not None and arguments.workers < 0:
        raise CherryError(f"--workers {arguments.workers} is negative; 0 takes all cores")
    if arguments.show < 0:
        raise CherryError(f"--show {arguments.show} is negative; give a number of documents")
    if arguments.tokenizer is None and (selector == "semantic" or arguments.show):
        wants = "--selector semantic" if selector == "semantic" else "--show"
        raise CherryError(f"{wants} reads text; name the --tokenizer of the data")
    for option, of in OPTIONS.items():
        if getattr(arguments, option) not in (None, []) and selector not in of:
            raise CherryError(f"--{option.replace('_', '-')} is that of --selector {' or '.join(of)}; take it out")
    for option in ("config", "reference_config"):
        if getattr(arguments, option) is None and selector in OPTIONS[option]:
            raise CherryError(f"--selector {selector} asks a checkpoint; name its --{option.replace('_', '-')}")
    if arguments.seed is not None and arguments.seed < 0:
        raise CherryError(f"--seed {arguments.seed} is negative; give 0 or more")


def _selector(arguments: argparse.Namespace) -> "Selector":
    from cherry_megatron.sgt.selection.selectors import Random

    if arguments.selector == "random":
        return Random(arguments.seed or 0)
    if arguments.selector == "semantic":
        from cherry_megatron.sgt.selection.semantic import Semantic

        return Semantic(arguments.data, arguments.tokenizer, arguments.triggers)
    from cherry_megatron.sgt.selection.models import ModelScores, Source

    source = Source(arguments.config, tuple(arguments.set), tuple(arguments.flags))
    reference = arguments.reference_config and Source(arguments.reference_config)
    return ModelScores(arguments.selector, arguments.data, source, reference)
