"""calibrate, compress-depth, assemble-moee, lineage."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cherry_megatron.errors import CherryError
from cherry_megatron.verbs.common import WORKERS, add_config, add_verb, load_config

if TYPE_CHECKING:
    from cherry_megatron.surgery.compress import Surgery


def add_calibrate(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.platform.machine import prepare

        machine = prepare()
        config = load_config(arguments)
        from cherry_megatron.calibration import calibrate

        calibrate(config, machine, arguments.output, arguments.tokens, show_all=arguments.verbose)

    parser = add_verb(verbs, "calibrate", "record activations on training text, for compress-depth", run)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokens", type=int, default=4096, help="how many to record (default 4096)")
    parser.add_argument("--verbose", action="store_true", help="show Megatron's own output too")
    add_config(parser)


def add_compress_depth(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.surgery import compress

        found = None
        check_common(arguments.workers, arguments.save, [arguments.load])
        if arguments.expand:
            _refuse_beside_expand(arguments)
        if arguments.plan is None and arguments.budget is not None:
            raise CherryError("--budget is that of --plan search; add it")
        if arguments.plan is None and arguments.method != "random" and arguments.seed is not None:
            raise CherryError("--seed is that of --plan search or of --method random; add one of them")
        if arguments.plan is not None:
            found = _search(arguments)
            if os.environ["RANK"] != "0":
                return
        if arguments.expand:
            surgery = compress.plan_expansion(arguments.load, arguments.config, arguments.set)
        else:
            groups = found.groups if found else "adjacent" if arguments.groups is None else arguments.groups
            options = compress.Options(
                groups=groups, method=arguments.method, weights=tuple(arguments.weights), keep=arguments.keep,
                align=arguments.align, calibration=arguments.calibration, optimizer=arguments.optimizer,
                seed=arguments.seed or 0,
            )  # fmt: skip
            surgery = compress.plan_compression(arguments.load, arguments.config, arguments.set, options, found)
        carry_out(surgery, arguments)

    parser = add_verb(verbs, "compress-depth", "average the layers of a checkpoint into few, without a GPU", run)
    parser.add_argument("--load", type=Path, required=True, help="a run's folder, or one of checkpoints")
    parser.add_argument(
        "--save", type=new_folder_name, required=True, help="folder to write, of the form that training loads"
    )
    parser.add_argument("--groups", help="adjacent (default), slots, or e.g. 0-7,8-36/4,...")
    parser.add_argument("--plan", choices=("search",), help="search: find the groups with the lowest loss on text")
    parser.add_argument("--budget", type=int, help="groupings that the search scores at most (default 64)")
    parser.add_argument("--method", default="average", help="average (default), weighted, select or random")
    parser.add_argument("--seed", type=int, help="of --plan search or --method random (default 0)")
    parser.add_argument("--weights", type=_numbers, default=(), help="of a group's layers, for weighted: 1,2,1")
    parser.add_argument("--keep", type=int, help="which layer of a group, for select (default the middle one)")
    parser.add_argument(
        "--align", choices=("none", "weights", "activations"), default="none", help="match heads and neurons"
    )
    parser.add_argument("--calibration", type=Path, help="made by `cherry calibrate`, for --align activations")
    parser.add_argument("--optimizer", choices=("drop", "average"), default="drop", help="its state (default drop)")
    parser.add_argument("--expand", action="store_true", help="the reverse: write the unrolled, dense equivalent")
    parser.add_argument("--workers", type=int, default=0, help=WORKERS)
    parser.add_argument("--dry-run", action="store_true", help="print the plan, sizes and memory, and stop")
    add_config(parser, flags=False)


def add_assemble_moee(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.config import outline
        from cherry_megatron.model.pattern import MOE
        from cherry_megatron.surgery import assemble, assemble_layers

        seed = arguments.seed or 0
        check_common(arguments.workers, arguments.save, arguments.load)
        if seed < 0:
            raise CherryError(f"--seed {seed} is negative; use 0 or more")
        inside = MOE in outline(arguments.config, arguments.set).recurrence.parsed.symbols
        if arguments.extract is None:
            plan = assemble_layers.plan_layers if inside else assemble.plan_assembly
            surgery = plan(arguments.load, arguments.config, arguments.set, seed)
        elif inside:
            raise CherryError(
                f"{arguments.config}: experts inside layers share all else, so that none can be taken out as a "
                "model; --extract is for mixtures of whole models (moee)"
            )
        elif len(arguments.load) > 1 or arguments.seed is not None:
            raise CherryError("--extract takes one mixture as --load, and no --seed")
        else:
            surgery = assemble.plan_extraction(
                arguments.load[0], arguments.config, arguments.set, arguments.extract
            )
        carry_out(surgery, arguments)

    parser = add_verb(verbs, "assemble-moee", "models become the experts of one, without a GPU", run)
    parser.add_argument(
        "--load", type=Path, nargs="+", required=True, help="runs' folders, or of checkpoints: the experts in order"
    )
    parser.add_argument(
        "--save", type=new_folder_name, required=True, help="folder to write, of the form that training loads"
    )
    parser.add_argument("--seed", type=int, help="of the router's first weights (default 0)")
    parser.add_argument("--extract", type=int, metavar="E", help="the reverse: write expert E as a single model")
    parser.add_argument("--workers", type=int, default=0, help=WORKERS)
    parser.add_argument("--dry-run", action="store_true", help="print the plan, sizes and memory, and stop")
    add_config(parser, flags=False)


def check_common(workers: int, save: Path, loads: list[Path]) -> None:
    """What verbs of surgery refuse before they look at a checkpoint, `--dry-run` or not."""
    from cherry_megatron.files import why_not_writable

    if workers < 0:
        raise CherryError(f"--workers {workers} is negative; 0 takes all cores")
    for load in loads:
        if save.resolve().is_relative_to(load.resolve()):
            where = "" if save.resolve() == load.resolve() else "inside "
            raise CherryError(f"--save {save} is {where}{load}, which is only read; choose a folder beside it")
    if why := why_not_writable(save.absolute().parent, tried=True):
        raise CherryError(f"cannot write --save {save}: {why}; choose another place")


def carry_out(surgery: "Surgery", arguments: argparse.Namespace) -> None:
    """Print the plan and write the checkpoint; with `--dry-run` say behind the plan whether its place is taken."""
    from cherry_megatron.files import refuse_taken
    from cherry_megatron.surgery.compress import summary

    if not arguments.dry_run:
        refuse_taken(arguments.save)
    print(summary(surgery, arguments.workers))
    if arguments.dry_run:
        refuse_taken(arguments.save)
    else:
        print(f"written     {surgery.run(arguments.save, arguments.workers)}")


def _refuse_beside_expand(arguments: argparse.Namespace) -> None:
    """Flags that say how to compress."""
    defaults = {
        "groups": None, "plan": None, "budget": None, "method": "average", "seed": None, "weights": (),
        "keep": None, "align": "none", "calibration": None, "optimizer": "drop",
    }  # fmt: skip
    for name, default in defaults.items():
        if getattr(arguments, name) != default:
            raise CherryError(f"--{name} says how to compress, which --expand does not; take one of them out")


def _search(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    """What `--plan search` finds; refused before Megatron is imported if anything else does not go with it."""
    from cherry_megatron.files import refuse_taken
    from cherry_megatron.surgery import compress

    if arguments.groups is not None:
        raise CherryError(
            f"--groups {arguments.groups} does not go with --plan search, which finds the groups; take one out"
        )
    from cherry_megatron.config import outline

    if outline(arguments.config, arguments.set).recurrence.loop_rank:
        raise CherryError(
            "--plan search scores plain means, without the corrections of recurrence.loop_rank; search with rank 0 "
            "and give what it finds as --groups"
        )
    if arguments.method != "average" or arguments.align != "none":
        raise CherryError("--plan search scores plain means; use it with --method average and --align none")
    options = compress.Options(
        align=arguments.align, calibration=arguments.calibration, optimizer=arguments.optimizer,
        seed=arguments.seed or 0,
    )  # fmt: skip
    compress.plan_compression(arguments.load, arguments.config, arguments.set, options)
    from cherry_megatron.platform.machine import prepare

    machine = prepare()
    config = load_config(arguments)
    if not arguments.dry_run:
        refuse_taken(arguments.save)  # before the hours of a search
    from cherry_megatron.plan_search import find_groups

    budget = 64 if arguments.budget is None else arguments.budget
    return find_groups(arguments.load, config, machine, budget, arguments.seed or 0)


def new_folder_name(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name the folder to write")
    return Path(text)


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 1,2,1") from None


def add_lineage(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.storage.ancestry import describe

        print("\n".join(describe(arguments.checkpoint, not arguments.no_verify)))

    parser = add_verb(verbs, "lineage", "what a checkpoint was made from; verifies its hashes", run)
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="a run's folder, or one of checkpoints")
    parser.add_argument("--no-verify", action="store_true", help="do not read the tensors")
