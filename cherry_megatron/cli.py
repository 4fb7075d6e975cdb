"""The one command: `cherry VERB`."""

import argparse
import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from cherry_megatron import __version__
from cherry_megatron.errors import CherryError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Bad input is one sentence on stderr and status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, flags = _split_flags(argv)
    arguments = _parser().parse_args(argv)
    if flags and not hasattr(arguments, "flags"):
        _parser().error(f"{arguments.verb} takes no Megatron flags after --")
    arguments.flags = flags
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # It warns of a CUDA toolkit without a GPU, which concerns nobody who does not build extensions.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except CherryError as error:
        print(f"cherry {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"cherry {arguments.verb}: interrupted", file=sys.stderr)
        return 130
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
    _add_doctor(verbs)
    _add_tokenizer(verbs)
    _add_data(verbs)
    _add_pretrain(verbs)
    _add_evaluate(verbs)
    _add_params(verbs)
    _add_calibrate(verbs)
    _add_compress_depth(verbs)
    _add_lineage(verbs)
    _add_experiment(verbs)
    return parser


def _verb(verbs: argparse._SubParsersAction, name: str, text: str, run: Callable) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _add_config(
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


def _load_config(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    from cherry_megatron.config import load

    path = getattr(arguments, "config_file", None) or arguments.config
    if path is None:
        raise CherryError("name a configuration, e.g. configs/cherry_227m.yaml")
    return load(path, arguments.set, arguments.flags)


def _add_doctor(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from cherry_megatron.platform import doctor, machine

        found = machine.prepare()
        doctor.report(found)
        if not arguments.config:
            return 0
        config = _load_config(arguments)
        from cherry_megatron.checks import obstacles

        problems = obstacles(found, config)
        for line in problems or ["can run here", *doctor.how_to_start(config)]:
            print(f"{config.source}: {line}")
        return 1 if problems else 0

    parser = _verb(verbs, "doctor", "what is installed, what will be used, can a configuration run here", run)
    _add_config(parser, required=False)


def _add_tokenizer(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.data import tokenizer

        left_out = _left_out(arguments.input)
        trained = tokenizer.train(
            arguments.input, arguments.output, arguments.vocab_size, arguments.limit_mb, arguments.key
        )
        size = trained.get_vocab_size()
        padded = -(-size // 128) * 128
        print(f"{arguments.output}: {size} tokens; megatron.padded-vocab-size must be at least that, e.g. {padded}")
        for line in left_out:
            print(line)

    parser = _verb(verbs, "tokenizer", "train a byte-level BPE tokenizer on text", run)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="text files or folders")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of tokens")
    parser.add_argument("--limit-mb", type=int, default=200, help="read at most so much text (default 200)")
    parser.add_argument("--key", default="text", help="key of the text in .jsonl lines (default text)")


def _add_data(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.data import prepare

        left_out = _left_out(arguments.input)
        report = prepare.prepare(
            arguments.input, prepare.output_prefix(arguments.output), arguments.tokenizer, arguments.workers,
            arguments.key, arguments.max_malformed,
        )  # fmt: skip
        print(
            f"{arguments.output}: {report['documents']:,} documents, {report['tokens']:,} tokens, "
            f"{report['bytes'] / 1e6:.1f} MB in {report['seconds']} s "
            f"({report['mb_per_second_and_worker']} MB/s a worker, {report['workers']} workers)"
        )
        if report["malformed"]:
            print(f"{report['malformed']} malformed lines are named in {arguments.output}.json; the first:")
            print("  " + report["named"][0])
        for line in left_out:
            print(line)

    parser = _verb(verbs, "data", "turn text into indexed tokens", run)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="text files or folders")
    parser.add_argument("--output", required=True, help="path prefix of the .bin and .idx files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder made by `cherry tokenizer`")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: all cores)")
    parser.add_argument("--key", default="text", help="key of the text in .jsonl lines (default text)")
    parser.add_argument(
        "--max-malformed",
        type=float,
        default=0.01,
        help="stop above this share of malformed lines (default 0.01)",
    )


def _left_out(inputs: list[Path]) -> list[str]:
    """What to say of files that will not be read; looked at before the output may lie among them."""
    from cherry_megatron.data.text import other_files

    others = other_files(inputs)
    return [f"files of other kinds that were left out: {len(others)}, e.g. {others[0]}"] if others else []


def _add_pretrain(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.platform.machine import prepare

        machine = prepare()
        config = _load_config(arguments)
        from cherry_megatron.pretrain import pretrain

        pretrain(config, machine, show_all=arguments.verbose)

    parser = _verb(verbs, "pretrain", "train a model; goes on from the run's newest checkpoint", run)
    parser.add_argument("--verbose", action="store_true", help="show Megatron's own output too")
    _add_config(parser)


def _add_evaluate(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.platform.machine import prepare

        machine = prepare()
        config = _load_config(arguments)
        from cherry_megatron.evaluate import evaluate

        evaluate(config, machine, arguments.loops, show_all=arguments.verbose)

    parser = _verb(verbs, "evaluate", "held-out loss of a run's checkpoint at several numbers of loops", run)
    parser.add_argument(
        "--loops", type=int, nargs="+", help="numbers of loops (default 1, 2, 4, ... and the model's)"
    )
    parser.add_argument("--verbose", action="store_true", help="show Megatron's own output too")
    _add_config(parser)


def _add_params(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.platform.machine import prepare

        prepare()
        config = _load_config(arguments)
        from cherry_megatron.monitor.tables import params_table

        print(params_table(config))

    parser = _verb(verbs, "params", "parameters, FLOPs and memory of a configuration", run)
    _add_config(parser, positional=True)


def _add_calibrate(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.platform.machine import prepare

        machine = prepare()
        config = _load_config(arguments)
        from cherry_megatron.calibration import calibrate

        calibrate(config, machine, arguments.output, arguments.tokens, show_all=arguments.verbose)

    parser = _verb(verbs, "calibrate", "record activations on training text, for compress-depth", run)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokens", type=int, default=4096, help="how many to record (default 4096)")
    parser.add_argument("--verbose", action="store_true", help="show Megatron's own output too")
    _add_config(parser)


def _add_compress_depth(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.surgery import compress

        found = None
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
            groups = found.groups if found else arguments.groups or "adjacent"
            options = compress.Options(
                groups=groups, method=arguments.method, weights=tuple(arguments.weights), keep=arguments.keep,
                align=arguments.align, calibration=arguments.calibration, optimizer=arguments.optimizer,
                seed=arguments.seed or 0,
            )  # fmt: skip
            surgery = compress.plan_compression(arguments.load, arguments.config, arguments.set, options, found)
        print(compress.summary(surgery, arguments.workers))
        if not arguments.dry_run:
            print(f"written     {surgery.run(arguments.save, arguments.workers)}")

    parser = _verb(verbs, "compress-depth", "average the layers of a checkpoint into few, without a GPU", run)
    parser.add_argument("--load", type=Path, required=True, help="a run's folder, or one of checkpoints")
    parser.add_argument("--save", type=Path, required=True, help="folder to write, of the form that training loads")
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
    parser.add_argument("--workers", type=int, default=0, help="processes (default: all cores)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, sizes and memory, and stop")
    _add_config(parser, flags=False)


def _search(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    """What `--plan search` finds; refused before Megatron is imported if anything else does not go with it."""
    from cherry_megatron.files import refuse_taken
    from cherry_megatron.surgery import compress

    if arguments.expand or arguments.groups is not None:
        other = "--expand" if arguments.expand else f"--groups {arguments.groups}"
        raise CherryError(f"{other} does not go with --plan search, which finds the groups; take one out")
    from cherry_megatron.config import outline

    if outline(arguments.config, arguments.set)[0].loop_rank:
        raise CherryError(
            "--plan search scores plain means, without the corrections of recurrence.loop_rank; search with rank 0 "
            "and give what it finds as --groups"
        )
    if arguments.method != "average" or arguments.align != "none":
        raise CherryError("--plan search scores plain means; use it with --method average and --align none")
    if not arguments.dry_run:
        refuse_taken(arguments.save)
    options = compress.Options(optimizer=arguments.optimizer)
    compress.plan_compression(arguments.load, arguments.config, arguments.set, options)
    from cherry_megatron.platform.machine import prepare

    machine = prepare()
    config = _load_config(arguments)
    from cherry_megatron.plan_search import find_groups

    budget = 64 if arguments.budget is None else arguments.budget
    return find_groups(arguments.load, config, machine, budget, arguments.seed or 0)


def _add_lineage(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.storage.ancestry import describe

        print("\n".join(describe(arguments.checkpoint, not arguments.no_verify)))

    parser = _verb(verbs, "lineage", "what a checkpoint was made from; verifies its hashes", run)
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="a run's folder, or one of checkpoints")
    parser.add_argument("--no-verify", action="store_true", help="do not read the tensors")


def _add_experiment(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from cherry_megatron.experiments.run import run

        return run(
            arguments.experiment, arguments.out, arguments.gpus, arguments.jobs_per_gpu, arguments.only,
            arguments.limit,
        )  # fmt: skip

    def report(arguments: argparse.Namespace) -> None:
        from cherry_megatron.experiments.report import report

        for path in report(arguments.experiment, arguments.records, arguments.out):
            print(path)

    text = "run the stages of an experiment, or report what they found"
    actions = verbs.add_parser("experiment", help=text, description=text).add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    parser = _verb(actions, "run", "run what is not done yet; goes on where it was stopped", run)
    parser.add_argument("experiment", metavar="NAME", help="of configs/experiments/NAME.yaml, or a file")
    parser.add_argument("--out", type=Path, required=True, help="folder of its runs, logs and records")
    parser.add_argument("--gpus", type=int, help="how many to use (default all; without any, the CPU)")
    parser.add_argument(
        "--jobs-per-gpu", type=int, default=1, help="tasks at once on each, or on the CPU (default 1)"
    )
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages, with what they need")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="stop then, so that a later start goes on")
    parser = _verb(actions, "report", "the table and the plots of an experiment's records", report)
    parser.add_argument("experiment", metavar="NAME", help="of configs/experiments/NAME.yaml, or a file")
    parser.add_argument("--records", type=Path, required=True, help="records.jsonl of an experiment's folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write table.md and the plots to")


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers like 1,2,1") from None


if __name__ == "__main__":
    sys.exit(main())
