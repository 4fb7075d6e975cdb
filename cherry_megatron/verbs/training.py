"""doctor, params, pretrain, generate."""

import argparse

from cherry_megatron.errors import CherryError
from cherry_megatron.verbs.common import add_config, add_verb, load_config


def add_doctor(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> int:
        from cherry_megatron.platform import doctor, machine

        found = machine.prepare()
        doctor.report(found)
        if not arguments.config:
            if arguments.verify:
                raise CherryError("--verify needs --config, which names the data")
            return 0
        config = load_config(arguments)
        from cherry_megatron.checks import obstacles
        from cherry_megatron.data.paths import data_prefixes
        from cherry_megatron.data.verify import changed, verified

        problems, lines = obstacles(found, config), []
        if arguments.verify:
            prefixes = list(dict.fromkeys(prefix for _, prefix in data_prefixes(config)))
            damage = [why for prefix in prefixes for why in changed(prefix)]
            problems += damage
            lines = [] if damage else [verified(prefixes)]
        lines += problems or ["can run here", doctor.reads_by(config), *doctor.how_to_start(config)]
        for line in lines:
            print(f"{config.source}: {line}")
        return 1 if problems else 0

    parser = add_verb(verbs, "doctor", "what is installed, what will be used, can a configuration run here", run)
    parser.add_argument(
        "--verify", action="store_true", help="read the configuration's data and compare its hashes"
    )
    add_config(parser, required=False)


def add_params(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.platform.machine import prepare

        prepare()
        config = load_config(arguments)
        from cherry_megatron.monitor.tables import params_table

        print(params_table(config))

    parser = add_verb(verbs, "params", "parameters, FLOPs and memory of a configuration", run)
    add_config(parser, positional=True)


def add_pretrain(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.platform.machine import prepare

        machine = prepare()
        config = load_config(arguments)
        from cherry_megatron.pretrain import pretrain

        pretrain(config, machine, show_all=arguments.verbose)

    parser = add_verb(verbs, "pretrain", "train a model; goes on from the run's newest checkpoint", run)
    parser.add_argument("--verbose", action="store_true", help="show Megatron's own output too")
    add_config(parser)


def add_generate(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.platform.machine import prepare

        machine = prepare()
        config = load_config(arguments)
        from cherry_megatron.inference.continuation import continue_prompts
        from cherry_megatron.inference.draft import drafting

        given = {name: getattr(arguments, name) for name in ("tokens", "temperature", "top_k", "top_p")}
        continue_prompts(
            config,
            machine,
            arguments.prompt,
            {name: value for name, value in given.items() if value is not None},
            arguments.seed,
            arguments.loops,
            drafting(arguments.draft_loops, arguments.draft_mtp, arguments.draft_tokens),
            arguments.stream,
            show_all=arguments.verbose,
        )

    parser = add_verb(verbs, "generate", "continue prompts with a run's checkpoint", run)
    parser.add_argument("--prompt", nargs="+", required=True, metavar="TEXT", help="texts to go on from")
    parser.add_argument("--tokens", type=int, help="new tokens at most (default generation.tokens, or 64)")
    parser.add_argument(
        "--temperature", type=float, help="0 takes the likeliest token (default generation.temperature, or 1)"
    )
    parser.add_argument(
        "--top-k", type=int, help="draw from so many of the likeliest, 0 for all (default generation.top_k, or 0)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        help="draw from the fewest likeliest that have this share together (default generation.top_p, or 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--loops", type=int, help="number of loops (default the model's)")
    parser.add_argument("--stream", action="store_true", help="print texts while they grow")
    parser.add_argument(
        "--draft-loops",
        type=int,
        help="draft with so few loops, which changes the speed and, but for rounding, not the text",
    )
    parser.add_argument(
        "--draft-mtp", action="store_true", help="draft by multi-token prediction (mtp.depths), likewise"
    )
    parser.add_argument(
        "--draft-tokens", type=int, help="tokens of a draft (default 2, or with --draft-mtp the number of depths)"
    )
    parser.add_argument("--verbose", action="store_true", help="show Megatron's own output too")
    add_config(parser)
