"""Every command of README and docs: read by the real parsers, its files and keys there; run where that is cheap."""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from cherry_megatron.cli import _verbs, check_arguments
from cherry_megatron.errors import CherryError
from tests.conftest import korean_text, run_ranks
from tests.documented import ROOT, Command, commands, commands_of, paths

COMMANDS = commands()
# A placeholder: it stands for a file or number of the reader's.
STAND_IN = re.compile(r"[A-Z][A-Z0-9_]*(/.*)?|\[.*|.*\]|\.\.\.|…")
MODULE = "cherry_megatron.cli"  # behind -m, where there is no tools/
_TOOLS = {path.name: path for path in (ROOT / "tools").glob("*.py")}


def verb_of(command: Command) -> list[str] | None:
    """The words after `cherry`, of that command or of the script or the module that stands for it."""
    words = list(command.words)
    if words[0] in ("torchrun", "python") and MODULE in words:
        return words[words.index(MODULE) + 1 :]
    if words[0] == "torchrun":
        script = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
        assert script is not None, f"{command}: torchrun of no script"
        words = ["python", *words[script:]]
    if words[0] == "python" and words[1].startswith("tools/"):
        path = ROOT / words[1]
        found = re.search(r'program\(\["([\w-]+)"', path.read_text())
        assert found, f"{command}: {words[1]} stands for no verb"
        return [found[1], *words[2:]]
    return words[1:] if words[0] == "cherry" else None


VERBS = [(command, words) for command in COMMANDS if (words := verb_of(command)) is not None]


def of(*programs: str) -> list[Command]:
    return [command for command in COMMANDS if command.words[0] in programs]


def test_commands_are_found():
    """As many as are known to stand there, so that the reader does not quietly miss them."""
    assert sum(command.whole for command, _ in VERBS) >= 35
    assert {words[0] for _, words in VERBS} >= _verbs().keys()
    assert len(of("make")) >= 4
    assert len(of("bash", "sbatch")) >= 10
    text = (
        '```sh\nA=1 cherry data --input "a b" \\\n  --sft  # why\nx="--key t"\ncherry data $x\n```\n`cherry\ndata`'
    )
    assert [(c.environment, c.words, c.whole) for c in commands_of("page", text)] == [
        (("A=1",), ("cherry", "data", "--input", "a b", "--sft"), True),
        ((), ("cherry", "data", "--key", "t"), True),
        ((), ("cherry", "data"), False),
    ]


def in_full(words: list[str]) -> list[str] | None:
    """A verb's words as they would be typed: without Megatron's flags; None where some are left out."""
    if any(word in ("...", "…") or word[0] == "[" for word in words):
        return None
    return words[: words.index("--")] if "--" in words else words


@pytest.mark.parametrize(
    ("command", "words"), [pair for pair in VERBS if pair[0].whole], ids=lambda value: str(value)[:90]
)
def test_a_verb_takes_these_arguments(command, words):
    words = in_full(words)
    if words is not None:
        check_arguments(words[0], words[1:])
        assert not any(option in words for option in unknown_options(words)), command


def unknown_options(words: list[str]) -> list[str]:
    """Options that the verb, or the one below it, does not know by their whole name; a verb that is none."""
    parser, rest = _verbs().get(words[0]), words[1:]
    rest = rest[: rest.index("--")] if "--" in rest else rest  # Megatron's follow
    if parser is None:
        return words[:1]
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if below and rest and not STAND_IN.fullmatch(rest[0]):
        if rest[0] not in below[0].choices:
            return rest[:1]
        parser, rest = below[0].choices[rest[0]], rest[1:]
    given = [word.strip("[]").split("=")[0] for word in rest if word.strip("[").startswith("--")]
    return [option for option in given if option not in parser._option_string_actions]


def test_verbs_and_options_that_are_spoken_of_are_there():
    spoken = [(command, words) for command, words in VERBS if words[0] != "VERB"]
    assert [str(command) for command, words in spoken if unknown_options(words)] == []


def settings(words: list[str]) -> tuple[str, list[str], list[str]] | None:
    """Configuration, overrides and flags that a command reads; None where the file is the reader's."""
    given = words[: words.index("--")] if "--" in words else words
    files = [after for word, after in pairwise(given) if word == "--config"]
    if given[0] in ("params", "plan") and not files:
        files = [word for word in given[1:2] if word.endswith(".yaml")]
    if not files or not files[0].startswith("configs/"):
        return None
    overrides = [after for word, after in pairwise(given) if word == "--set"]
    return files[0], overrides, words[words.index("--") + 1 :] if "--" in words else []


def _unreadable(asked: list[tuple[str, tuple[str, ...], tuple[str, list[str], list[str]]]]) -> list[str]:
    """What configurations, keys and flags are refused, each with its command."""
    from cherry_megatron.config import load, outline

    os.chdir(ROOT)
    found = []
    for command, environment, (file, overrides, flags) in asked:
        os.environ.update(dict(word.split("=", 1) for word in environment))
        try:
            if flags:
                load(Path(file), overrides, flags)
            else:
                outline(Path(file), overrides)  # without Megatron's parser, which takes a second
        except CherryError as error:
            found.append(f"{command}: {error}")
    return found


def launched(command: Command) -> tuple[str, list[str]] | None:
    """Script and arguments of `bash slurm/...` and `sbatch slurm/...`."""
    words = command.words[1:]
    place = next((n for n, word in enumerate(words) if word.startswith("slurm/")), None)
    return None if place is None else (words[place], list(words[place + 1 :]))


LAUNCHED = [(command, found) for command in of("bash", "sbatch", "sh") if (found := launched(command))]


def test_configurations_and_keys_are_there(tmp_path):
    asked = [(str(c), c.environment, found) for c, words in VERBS if c.whole and (found := settings(words))]
    for command, (_, arguments) in LAUNCHED:
        if arguments[:1] and arguments[0].startswith("configs/"):
            found = settings(["pretrain", "--config", *arguments])
            assert found is not None
            asked.append((str(command), (), found))
    assert len(asked) >= 20
    assert run_ranks(tmp_path, 1, _unreadable, asked) == [[]]


def test_launchers_print_what_they_would_submit(tmp_path):
    """In a copy of the project, without a cluster.env of the user's; what would be started is read too."""
    for folder in ("slurm", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("cluster.env"))
    stand_in = tmp_path / "cherry"
    stand_in.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m cherry_megatron.cli \"$@\"\n")
    stand_in.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "CLUSTER"))}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DRY_RUN": "1", "PYTHONPATH": str(ROOT)}
    done = set()
    for command, (script, arguments) in LAUNCHED:
        if any(STAND_IN.fullmatch(word) for word in arguments) or any(
            "my/" in word for word in command.environment
        ):
            arguments = []
        if (script, *arguments) in done:
            continue
        done.add((script, *arguments))
        said = subprocess.run(
            ["bash", script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert said.returncode == 0, f"{command}: {said.stderr}"
        started = [shlex.split(line) for line in said.stdout.splitlines() if line.startswith("srun ")]
        assert started, f"{command}: {said.stdout}"
        for words in started:
            verb = next(n for n, word in enumerate(words) if Path(word).name == "cherry")
            full = in_full(words[verb + 1 :])
            assert full is not None
            if full[0] not in ("compress-depth", "assemble-moee"):  # of which the job knows what to load
                check_arguments(full[0], full[1:])
    assert len(done) >= 5


def test_targets_of_make_are_there():
    for command in of("make"):
        targets = [word for word in command.words[1:] if "=" not in word]
        said = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
        assert said.returncode == 0, f"{command}: {said.stderr}"


def test_files_that_are_named_are_there():
    theirs = {"slurm/cluster.env"}  # which the reader makes
    missing = [f"{page}: {path}" for page, path in paths() if path not in theirs and not (ROOT / path).is_file()]
    assert missing == []


class _Read(Exception):
    """The arguments were read."""


def _refused(asked: list[tuple[str, ...]]) -> list[str]:
    """Which scripts do not take their arguments, by their own parsers."""
    os.chdir(ROOT)
    read, found = argparse.ArgumentParser.parse_args, []

    def parse_args(parser, arguments=None, namespace=None):
        read(parser, arguments, namespace)
        raise _Read

    argparse.ArgumentParser.parse_args = parse_args
    for script, *arguments in asked:
        sys.argv = [script, *arguments]
        sys.path.insert(0, str((ROOT / script).parent))
        try:
            runpy.run_path(script, run_name="__main__")
            found.append(f"{script} reads no arguments")
        except _Read:
            pass
        except SystemExit as stop:
            if stop.code:
                found.append(f"{shlex.join(sys.argv)}: {stop}")
    argparse.ArgumentParser.parse_args = read
    return found


def test_benchmarks_take_these_arguments(tmp_path):
    """Those of the commands; of a benchmark that is only named its help, unless it is a part of others."""
    asked = [command.words[1:] for command in of("python") if command.words[1].startswith("benchmarks/")]
    named = sorted({path for _, path in paths() if path.startswith("benchmarks/") and path.endswith(".py")})
    asked += [(path, "--help") for path in named if "__main__" in (ROOT / path).read_text()]
    assert asked
    assert run_ranks(tmp_path, 1, _refused, asked) == [[]]


def _run(folder: Path, asked: list[tuple[str, list[str]]]) -> list[str]:
    """Verbs one after the other in a folder; what they return if it is not 0."""
    from cherry_megatron.cli import main

    os.chdir(folder)
    return [command for command, words in asked if main(words) != 0]


def cheap(page: str, *starts: str) -> list[tuple[str, list[str]]]:
    """The whole commands of a page that begin with one of these words."""
    return [(str(c), words) for c, words in VERBS if c.page == page and c.whole and words[0] in starts]


def test_the_commands_on_data_run(tmp_path):
    """docs/data.md from its beginning, on a small corpus."""
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(korean_text(3, documents=40)):
        (tmp_path / f"corpus/{number}.txt").write_text(text)
    pair = {"prompt": "대한민국의 수도는?", "response": "서울입니다."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair, ensure_ascii=False) + "\n")
    asked = cheap("data.md", "tokenizer", "data")
    assert len(asked) >= 3
    assert run_ranks(tmp_path / "out", 1, _run, tmp_path, asked) == [[]]


def test_tables_of_parameters_are_printed(tmp_path):
    asked = [
        (str(c), words)
        for c, words in VERBS
        if c.whole and words[0] in ("params", "doctor", "plan") and settings(words) and "--verify" not in words
    ]  # --verify wants the data
    assert asked
    assert run_ranks(tmp_path, 1, _run, ROOT, asked) == [[]]


@pytest.mark.full
def test_the_commands_on_a_run_run(speaking, tmp_path):
    """Those on RUN of docs/generation.md and docs/evaluation.md, on a run that is trained a little."""
    import yaml

    for name in ("RUN", "OTHER"):
        shutil.copytree(speaking.parent / "run", tmp_path / name)
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        config["run"] = str(tmp_path / name)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    asked = [
        pair
        for page in ("generation.md", "evaluation.md")
        for pair in cheap(page, "generate", "evaluate")
        if "RUN" in pair[0]
    ]
    assert len(asked) == 5
    other = [word.replace("RUN", "OTHER") for word in asked[3][1]]
    for pair in (*asked[:-1], ("the same of OTHER", other), asked[-1]):
        assert run_ranks(tmp_path / "out", 1, _run, tmp_path, [pair]) == [[]], (
            tmp_path / "out/rank0.out"
        ).read_text()
    assert (tmp_path / "changed.jsonl").is_file()
