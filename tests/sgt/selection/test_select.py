"""`cherry select`, end to end: exactly so many marks, whatever the workers and interruptions; bad input."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cherry_megatron import cli
from cherry_megatron.data.marks import Marks, read_marks, write_marks
from cherry_megatron.sgt.selection import scratch, select, tokens
from cherry_megatron.sgt.selection.scratch import Scratch
from cherry_megatron.sgt.selection.select import check
from cherry_megatron.sgt.selection.show import bracketed, show
from tests.conftest import run_ranks
from tests.sgt.selection.conftest import read_marks as marks_of
from tests.sgt.selection.conftest import run, small_pieces

END = 0


def _contents(folder: Path, name: str) -> list[bytes]:
    assert not (folder / f"text.{name}.parts").exists()
    return [(folder / f"text.{name}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")]


def _remove(folder: Path, name: str) -> None:
    for path in folder.glob(f"text.{name}.*"):
        path.unlink()


def _exact(folder: Path) -> None:
    small_pieces()
    ids = np.fromfile(folder / "text.bin", np.uint16)
    for name in ("random", "semantic"):
        for rho in (0.0001, 0.15, 0.5, 1.0):
            run(folder, name, rho)
            marked = marks_of(folder, name)
            found = read_marks(folder / "text", name)
            assert len(marked) == len(ids) == found.tokens == found.eligible
            assert marked.sum() == round(rho * len(ids)) == found.marked and found.selector == name
            if name == "semantic" and rho == 0.5:
                assert not marked[ids == END].any() and found.options["mecab-ko"]
            if name == "random" and rho == 0.5:
                assert 0.3 < marked[ids == END].mean() < 0.7
            _remove(folder, name)
    small_pieces(10**6)
    whole = [run(folder, name) and _contents(folder, name) for name in ("random", "semantic")]
    _remove(folder, "random")
    _remove(folder, "semantic")
    small_pieces()
    assert whole == [run(folder, name) and _contents(folder, name) for name in ("random", "semantic")]
    text = show(folder / "text", "semantic", folder / "tokenizer", 3)
    assert text.count("--- document") == 3 and "[" in text


def test_exactly_so_many_whatever_the_pieces(own, tmp_path):
    run_ranks(tmp_path / "logs", 1, _exact, own)


def _answers(folder: Path) -> None:
    small_pieces()
    opened, lengths = tokens.open_tokens(folder / "text")
    answers = (np.arange(opened.total) // 7 % 3 == 0).astype(np.uint8)
    given = Marks("answers", "test", "1", opened.total, opened.total, int(answers.sum()), opened.data)
    write_marks(folder / "text", given, lengths, [answers])
    for name in ("random", "semantic"):
        selection = run(folder, name)
        marked = marks_of(folder, name)
        assert not (marked & ~answers & 1).any() and marked.sum() == round(0.15 * answers.sum())
        assert selection.marks.eligible == answers.sum() and abs(selection.marks.rho - 0.15) < 1e-3


def test_only_answers_are_targets_where_they_are_marked(own, tmp_path):
    run_ranks(tmp_path / "logs", 1, _answers, own)


def _dying_at(step: int) -> Callable[[Path, Any], Path]:
    """`Path.replace` that kills this process instead of its step-th call."""
    replace, calls = Path.replace, count(1)

    def dying(path: Path, target: Any) -> Path:
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    return dying


def _killed_at_every_file(folder: Path) -> tuple[int, int]:
    """Dies before the n-th file of the scratch folder or of the marks; the second run asks for another share."""
    small_pieces(3000)
    expected = run(folder, "semantic", 0.2) and _contents(folder, "semantic")
    _remove(folder, "semantic")
    resumed = step = 0
    while True:
        step += 1
        child = os.fork()
        if not child:
            Path.replace = _dying_at(step)
            run(folder, "semantic", 0.15)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            return step, resumed
        for path in folder.glob("text.semantic.*"):
            assert path.suffix != ".idx", "the index comes last"
        selection = run(folder, "semantic", 0.2)
        resumed += selection.scored < selection.marks.tokens
        assert _contents(folder, "semantic") == expected
        _remove(folder, "semantic")


def test_killed_at_any_file_a_second_run_goes_on(own, tmp_path):
    ((steps, resumed),) = run_ranks(tmp_path / "logs", 1, _killed_at_every_file, own)
    assert steps > 10 and resumed > 3


def _killed_after_the_marks(folder: Path) -> None:
    small_pieces()
    run(folder, "random")
    left = folder / "text.random.parts"
    left.mkdir()
    (left / "000000.scores.npy").write_bytes(b"")
    with pytest.raises(select.CherryError, match=r"text\.random\.idx exists; remove it or give the marks another"):
        run(folder, "random")
    assert not left.exists()


def test_what_a_finished_run_left_is_removed(own, tmp_path):
    run_ranks(tmp_path / "logs", 1, _killed_after_the_marks, own)


def _processes(folder: Path) -> list[bytes]:
    tokens.PIECE_TOKENS = 2000
    arguments = ["select", "--data", str(folder / "text"), "--selector", "semantic", "--workers", "2"]
    assert cli.main([*arguments, "--tokenizer", str(folder / "tokenizer"), "--show", "2"]) == 0
    assert not multiprocessing.active_children()
    return _contents(folder, "semantic")


def _one_thread(folder: Path) -> list[bytes]:
    small_pieces(2000)
    return run(folder, "semantic") and _contents(folder, "semantic")


def test_the_command_with_processes_gives_the_same_bytes(own, tmp_path):
    (processes,) = run_ranks(tmp_path / "logs", 1, _processes, own)
    said = (tmp_path / "logs/rank0.out").read_text()
    assert "rho 0.15" in said and "triggers" in said and "most frequent" in said and "MB/s a worker" in said
    _remove(own, "semantic")
    assert run_ranks(tmp_path / "logs", 1, _one_thread, own) == [processes]


# Bad input


def _unreadable(folder: Path) -> list[str]:
    small_pieces()
    said = []

    def refused(**options: Any) -> None:
        with pytest.raises(select.CherryError) as error:
            run(folder, options.pop("name", "semantic"), **options)
        said.append(str(error.value))

    refused(rho=1e-9)
    ids = np.fromfile(folder / "text.bin", np.uint16)
    lead = next(number for number, part in enumerate(_table(folder)) if part == b"\xed")
    (folder / "text.bin").unlink()
    broken = ids.copy()
    broken[-2] = lead
    broken.tofile(folder / "text.bin")
    refused()
    shutil.rmtree(folder / "text.semantic.parts")
    opened, lengths = tokens.open_tokens(folder / "text")
    other = Marks("answers", "test", "1", opened.total, opened.total, opened.total, "of something else")
    write_marks(folder / "text", other, lengths, [np.ones(opened.total, np.uint8)])
    refused(name="random")
    ids[:-1].tofile(folder / "text.bin")
    refused(name="random")
    (folder / "text.idx").unlink()
    (folder / "text.idx").write_bytes(b"nothing")
    refused(name="random")
    assert not list(folder.glob("text.semantic.*")) and not list(folder.glob("text.random.*"))
    return said


def _table(folder: Path) -> list[bytes]:
    return tokens.token_bytes(tokens.open_tokenizer(folder / "tokenizer", folder / "text"), folder / "tokenizer")


def test_damaged_data(own, tmp_path):
    (said,) = run_ranks(tmp_path / "logs", 1, _unreadable, own)
    for found, wanted in zip(
        said,
        [
            "selects none; give a larger share",
            f"document 119 of {own}/text cannot be read ('utf-8' codec can't decode",
            "text.answers.json belongs to other tokens than",
            "text.bin has another size than",
            "text.idx is no index of tokens",
        ],
        strict=True,
    ):
        assert wanted in found and "\n" not in found, found


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--selector", "clever"], "--selector clever is unknown; there are semantic, random, top-loss"),
        (["--selector", "random", "--rho", "0"], "--rho 0 is no share of the tokens; give a number above 0"),
        (["--selector", "random", "--rho", "1.5"], "--rho 1.5 is no share"),
        (["--selector", "random", "--name", "answers"], "--name answers names the tokens that may be targets"),
        (["--selector", "random", "--name", "idx"], "--name idx is what files of the tokens end in"),
        (["--selector", "random", "--data", "text.bin"], "give what its files have in common, text"),
        (["--selector", "random", "--name", "a/b"], "--name a/b must be letters, digits, - and _"),
        (["--selector", "random", "--workers", "-1"], "--workers -1 is negative"),
        (["--selector", "random", "--seed", "-1"], "--seed -1 is negative"),
        (["--selector", "random", "--triggers", "x"], "--triggers is that of --selector semantic; take it out"),
        (["--selector", "semantic"], "--selector semantic reads text; name the --tokenizer of the data"),
        (["--selector", "semantic", "--tokenizer", "nowhere"], "nowhere holds no tokenizer.json"),
        (["--selector", "top-loss"], "--selector top-loss asks a checkpoint; name its --config"),
        (["--selector", "excess-loss", "--config", "c"], "asks a checkpoint; name its --reference-config"),
        (["--show", "3"], "give --selector, or --show N with the --name of marks that are there"),
        (["--selector", "random"], "nowhere/text.bin is missing; make it with `cherry data`"),
    ],
)
def test_one_clear_line(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["select", "--data", "nowhere/text", *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "No such file"), ("# nothing\n", "names no expression"), (b"\xff", "is no UTF-8 text")],
)
def test_triggers_that_are_none(content, says, own, capsys):
    path = own / "triggers.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    command = ["select", "--data", str(own / "text"), "--selector", "semantic", "--tokenizer"]
    assert cli.main([*command, str(own / "tokenizer"), "--triggers", str(path)]) == 2
    assert says in capsys.readouterr().err and not list(own.glob("text.semantic*"))


def test_a_missing_analyser_is_said_in_one_sentence(monkeypatch, own, capsys):
    monkeypatch.setitem(__import__("sys").modules, "mecab_ko", None)
    command = ["select", "--data", str(own / "text"), "--selector", "semantic"]
    assert cli.main([*command, "--tokenizer", str(own / "tokenizer")]) == 2
    said = capsys.readouterr().err
    assert "needs mecab-ko and textblob" in said and "pip install 'cherry-megatron[select]'" in said


def test_another_tokenizer_is_refused(own, capsys):
    (own / "other").mkdir()
    (own / "other/tokenizer.json").write_text((own / "tokenizer/tokenizer.json").read_text() + " ")
    command = ["select", "--data", str(own / "text"), "--selector", "semantic"]
    assert cli.main([*command, "--tokenizer", str(own / "other")]) == 2
    assert "was made with another tokenizer" in capsys.readouterr().err and not list(own.glob("text.semantic*"))


def test_a_second_run_at_the_same_time_is_refused(tmp_path):
    with scratch.open_scratch(tmp_path / "text", "random", {}) as held:
        assert isinstance(held, Scratch)
        with (
            pytest.raises(select.CherryError, match="another run is writing"),
            scratch.open_scratch(tmp_path / "text", "random", {}),
        ):
            raise AssertionError
    assert not held.folder.exists()


def test_marks_that_exist_are_refused(tmp_path):
    (tmp_path / "text.random.idx").write_bytes(b"")
    with pytest.raises(select.CherryError, match="remove it or give the marks another name"):
        check(tmp_path / "text", "random", 0.15)


def test_brackets_hold_whole_characters():
    parts = ["한".encode()[:2], "한".encode()[2:] + b" ab", b" c", b"d"]
    assert bracketed(parts, [1, 0, 1, 0]) == "[한] ab [c]d"
