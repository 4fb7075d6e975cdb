"""`cherry select`: the speed of the selectors that run on a CPU, next to their analysers alone on the same text.

    python benchmarks/select_speed.py --input TEXT.jsonl --tokenizer FOLDER [--repeats 2]

Makes the tokens first, untimed. The analysers alone get the lines of the documents, which are in memory already,
on one core, and what they find is thrown away. `cherry select` is timed from start to exit with one worker; its own
count of seconds, which leaves out the start of Python, is printed too. Megabytes are of UTF-8 text. The
turn with the fewest seconds of CPU counts: on a machine that others use as well, compare those.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

from cherry_megatron.data.text import documents, read_chunks
from cherry_megatron.sgt.selection.segments import LIBRARIES, english_analyser, korean_analyser, segments


def main() -> None:
    """Measure and print a Markdown report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a text file")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder made by `cherry tokenizer`")
    parser.add_argument("--repeats", type=int, default=2, help="take turns so often; the best of each counts")
    options = parser.parse_args()
    texts = [text for chunk in read_chunks(options.input) for _, text in documents(chunk) if isinstance(text, str)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    parts = [(text[start:end], korean) for text in texts for start, end, korean in segments(text)]
    korean = sum(len(part.encode()) for part, is_korean in parts if is_korean) / 1e6
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES))
    print(f"{megabytes:.1f} MB of text, {korean:.1f} MB of it for mecab-ko\n")
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        prefix = Path(scratch) / "text"
        cherry("data", "--input", options.input, "--output", prefix, "--tokenizer", options.tokenizer)
        for turn in range(options.repeats):
            for name, work in {
                "analysers alone": partial(analyse, parts, True),
                "analysers, spans and keys": partial(analyse, parts, False),
                "random": partial(select, "random", prefix, turn),
                "semantic": partial(select, "semantic", prefix, turn, "--tokenizer", options.tokenizer),
            }.items():
                started = cpu_seconds(), time.perf_counter()
                work()
                took = cpu_seconds() - started[0], time.perf_counter() - started[1]
                best[name] = min(best.get(name, took), took)
    print("| | wall s | CPU s | MB/s | MB a CPU second |\n|---|---|---|---|---|")
    for name, (cpu, wall) in best.items():
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {megabytes / wall:.3f} | {megabytes / cpu:.3f} |")


def analyse(parts: list[tuple[str, bool]], plain: bool) -> None:
    """Both analysers over the text: their own calls, or with what `cherry select` makes of the answers."""
    if plain:
        import mecab_ko
        from textblob import en

        parse = mecab_ko.Tagger().parse
        for text, is_korean in parts:
            parse(text) if is_korean else en.tag(text)
        return
    korean, english = korean_analyser(), english_analyser()
    for text, is_korean in parts:
        (korean if is_korean else english)(text)


def select(name: str, prefix: Path, turn: int, *options: object) -> None:
    """`cherry select` with one worker."""
    marks = f"{name}{turn}"
    print(cherry("select", "--data", prefix, "--selector", name, "--name", marks, "--workers", 1, *options))


def cherry(*arguments: object) -> str:
    """What a command says."""
    command = [sys.executable, "-m", "cherry_megatron.cli", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def cpu_seconds() -> float:
    """Of this process and of the ones that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
