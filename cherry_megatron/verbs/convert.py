"""convert-hf."""

import argparse
import math
from pathlib import Path

from cherry_megatron.errors import CherryError
from cherry_megatron.verbs.common import WORKERS, add_config, add_verb
from cherry_megatron.verbs.surgery import carry_out, check_common, new_folder_name

GIGABYTE = 1_000_000_000


def add_convert_hf(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.storage.tracker import why_none
        from cherry_megatron.storage.weights import is_weights

        check_common(arguments.workers, arguments.save, [arguments.load])
        if is_weights(arguments.load):
            from cherry_megatron.surgery.hf_import import plan_import

            for name in ("shard_size", "no_tokenizer"):
                if getattr(arguments, name):
                    raise CherryError(f"--{name.replace('_', '-')} is of the way out, to Hugging Face; take it out")
            if arguments.config is None and arguments.set:
                raise CherryError("--set overrides keys of --config; add that, or take --set out")
            surgery = plan_import(arguments.load, arguments.config, arguments.set, arguments.save)
        else:
            from cherry_megatron.surgery.hf_export import SHARD, plan_export

            if not arguments.load.exists():
                raise CherryError(why_none(arguments.load))
            if arguments.config is None:
                raise CherryError(f"{arguments.load} has no config.json; to convert a run name its --config")
            size = SHARD / GIGABYTE if arguments.shard_size is None else arguments.shard_size
            if not 1 <= size * GIGABYTE < math.inf:
                raise CherryError(f"--shard-size {size} must be a positive number of gigabytes")
            surgery = plan_export(
                arguments.load, arguments.config, arguments.set, arguments.save.name, int(size * GIGABYTE),
                not arguments.no_tokenizer,
            )  # fmt: skip
        carry_out(surgery, arguments)

    parser = add_verb(verbs, "convert-hf", "to the form of Hugging Face, and from it, without a GPU", run)
    parser.add_argument(
        "--load",
        type=Path,
        required=True,
        help="a run's folder, or one of checkpoints; or a folder with config.json",
    )
    parser.add_argument("--save", type=new_folder_name, required=True, help="folder to write, of the other form")
    parser.add_argument("--shard-size", type=float, metavar="GB", help="of a file of weights (default 5)")
    parser.add_argument("--no-tokenizer", action="store_true", help="write the weights without one")
    parser.add_argument("--workers", type=int, default=0, help=WORKERS)
    parser.add_argument("--dry-run", action="store_true", help="print the plan, sizes and memory, and stop")
    add_config(parser, required=False, flags=False)
