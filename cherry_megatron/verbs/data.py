"""tokenizer, data."""

import argparse
from pathlib import Path

from cherry_megatron.verbs.common import WORKERS, add_verb


def add_tokenizer(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.data import tokenizer

        left_out = _left_out(arguments.input)
        trained = tokenizer.train(
            arguments.input, arguments.output, arguments.vocab_size, arguments.limit_mb, arguments.key
        )
        size = trained.get_vocab_size()
        padded = -(-size // 128) * 128
        print(f"{arguments.output}: {size} tokens; megatron.padded-vocab-size must be at least that, e.g. {padded}")
        if size < arguments.vocab_size:
            print(
                f"these are fewer than --vocab-size {arguments.vocab_size}: the text that was read yields no more; "
                "give more of it (--input, --limit-mb), or go on with these"
            )
        for line in left_out:
            print(line)

    parser = add_verb(verbs, "tokenizer", "train a byte-level BPE tokenizer on text", run)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="text files or folders")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab-size", type=int, required=True, help="number of tokens")
    parser.add_argument("--limit-mb", type=int, default=200, help="read at most so much text (default 200)")
    parser.add_argument("--key", default="text", help="key of the text in .jsonl lines (default text)")


def add_data(verbs: argparse._SubParsersAction) -> None:
    def run(arguments: argparse.Namespace) -> None:
        from cherry_megatron.data import prepare

        left_out = _left_out(arguments.input)
        report = prepare.prepare(
            arguments.input, prepare.output_prefix(arguments.output), arguments.tokenizer, arguments.workers,
            arguments.key, arguments.max_malformed, arguments.sft,
        )  # fmt: skip
        print(
            f"{arguments.output}: {report['documents']:,} documents, {report['tokens']:,} tokens, "
            f"{report['bytes'] / 1e6:.1f} MB in {report['seconds']} s "
            f"({report['mb_per_second_and_worker']} MB/s a worker, {report['workers']} workers)"
        )
        if arguments.sft:
            print(f"{report['answers']:,} of the tokens are answers, which alone are learned from")
        if report["malformed"]:
            print(f"{report['malformed']} malformed lines are named in {arguments.output}.json; the first:")
            print("  " + report["named"][0])
        for line in left_out:
            print(line)

    parser = add_verb(verbs, "data", "turn text into indexed tokens", run)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="text files or folders")
    parser.add_argument("--output", required=True, help="path prefix of the .bin and .idx files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder made by `cherry tokenizer`")
    parser.add_argument("--workers", type=int, default=0, help=WORKERS)
    parser.add_argument("--key", default="text", help="key of the text in .jsonl lines (default text)")
    parser.add_argument(
        "--max-malformed",
        type=float,
        default=0.01,
        help="stop above this share of malformed lines (default 0.01)",
    )
    parser.add_argument("--sft", action="store_true", help="the .jsonl lines are conversations; mark their answers")


def _left_out(inputs: list[Path]) -> list[str]:
    """What to say of files that will not be read; looked at before the output may lie among them."""
    from cherry_megatron.data.text import other_files

    others = other_files(inputs)
    return [f"files of other kinds that were left out: {len(others)}, e.g. {others[0]}"] if others else []
