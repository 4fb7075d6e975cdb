"""Measures of generated text against naive counting, the table as TensorBoard shows it, and what a run records."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cherry_megatron.monitor.generation import health, table
from tests.conftest import PROMPTS, run_ranks

END = 0
TEXTS = st.lists(st.lists(st.integers(0, 4), max_size=14), min_size=1, max_size=4)


def windows(text, n):
    return [text[start : start + n] for start in range(len(text) - n + 1)]


def naive(continuations):
    texts = [text[:-1] if text[-1:] == [END] else text for text in continuations]
    found = {}
    for n in (1, 2, 3):
        seen = []
        for text in texts:
            seen += windows(text, n)
        different = [gram for number, gram in enumerate(seen) if gram not in seen[:number]]
        if seen:
            found[f"distinct-{n}"] = len(different) / len(seen)
    shares = []
    for text in texts:
        grams = windows(text, 4)
        again = sum(gram in grams[:number] for number, gram in enumerate(grams))
        shares += [again / len(grams)] if grams else []
    if shares:
        found["repetition"] = sum(shares) / len(shares)
    found["length"] = sum(len(text) for text in texts) / len(texts)
    found["ended"] = sum(text[-1:] == [END] for text in continuations) / len(texts)
    return found


@given(TEXTS)
def test_measures_are_those_of_naive_counting(continuations):
    found = health(continuations, END)
    assert found == pytest.approx(naive(continuations))
    assert all(0 <= value <= 1 for name, value in found.items() if name != "length")


@pytest.mark.parametrize(
    ("continuations", "expected"),
    [
        ([[END]], {"length": 0, "ended": 1}),
        ([[1, 2]], {"distinct-1": 1, "distinct-2": 1, "length": 2, "ended": 0}),
        (  # one text for every prompt: no repetition within any, no variety together
            [[1, 2, 3, 4, END], [1, 2, 3, 4]],
            {"distinct-1": 0.5, "distinct-2": 0.5, "distinct-3": 0.5, "repetition": 0, "length": 4, "ended": 0.5},
        ),
        (
            [[1] * 5],
            {
                "distinct-1": 0.2,
                "distinct-2": 0.25,
                "distinct-3": 1 / 3,
                "repetition": 0.5,
                "length": 5,
                "ended": 0,
            },
        ),
    ],
)
def test_measures_of_plain_cases(continuations, expected):
    assert health(continuations, END) == pytest.approx(expected)


# What Markdown, HTML and a terminal would take for something else, among Korean and other letters.
ODD = "|\\`*_<>&#[]()~!-:;'\"\n\r\t\x00\x02\x1b\x85\u2028 a가漢\ufffd"
CHARACTERS = st.text(st.sampled_from(ODD) | st.characters(codec="utf-8"))


@given(st.lists(st.tuples(CHARACTERS, CHARACTERS), min_size=1, max_size=3))
def test_a_table_shows_its_texts_in_their_cells(rows):
    from tensorboard.plugin_util import markdown_to_safe_html

    shown = markdown_to_safe_html(table(*zip(*rows, strict=True)))
    assert set(re.findall(r"</?(\w+)", shown)) <= {"table", "thead", "tbody", "tr", "th", "td"}
    cells = [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", shown, re.DOTALL)]
    assert len(cells) == 2 * len(rows)
    for cell, text in zip(cells, (text for row in rows for text in row), strict=True):
        assert cell.isprintable() or not text.isprintable()
        written = text.replace("\n", "↵").replace("\t", "⇥")
        if written.isprintable():
            assert cell.split() == written.split()


def events(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    return found


def lines(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_evaluation_records_texts_and_measures(speaking: Path):
    run = speaking.parent / "run"
    recorded = lines(run / "generations.jsonl")
    assert [record["iteration"] for record in recorded] == [4, 8]
    found = events(run)
    for name in ("distinct-1", "distinct-2", "distinct-3", "repetition", "length", "ended"):
        scalars = found.Scalars(f"cherry/generation/{name}")
        assert [event.step for event in scalars] == [4, 8]
        assert [event.value for event in scalars] == pytest.approx([record["health"][name] for record in recorded])
    texts = found.Tensors("cherry/generation/text/text_summary")
    assert [event.step for event in texts] == [4, 8]
    for event, record in zip(texts, recorded, strict=True):
        assert (record["loops"], record["temperature"], record["tokens"]) == (3, 0.8, 8)
        assert [text["prompt"] for text in record["texts"]] == PROMPTS
        continuations = [text["continuation"] for text in record["texts"]]
        assert event.tensor_proto.string_val[0].decode() == table(PROMPTS, continuations)
        lengths = [text["health"]["length"] for text in record["texts"]]
        assert sum(lengths) / len(lengths) == pytest.approx(record["health"]["length"])
    assert recorded[0]["texts"] != recorded[1]["texts"]
    assert "generation  distinct-1" in (speaking.parent / "output" / "rank0.out").read_text()


def elsewhere(speaking: Path, folder: Path, **changed) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(speaking.read_text()), "run": str(folder / "run"), **changed}))
    return path


def test_a_training_does_not_notice(speaking: Path, tmp_path: Path, train):
    silent = train(elsewhere(speaking, tmp_path, generation=None), flags="--exit-interval 6")
    spoke = lines(speaking.parent / "run" / "steps.jsonl")[:6]
    assert [(step["loss"], step["grad_norm"]) for step in silent] == [(s["loss"], s["grad_norm"]) for s in spoke]


def evaluate(path: Path) -> int:
    from cherry_megatron.cli import main

    return main(["evaluate", "--config", str(path), "--loops", "3"])


def test_evaluation_of_a_checkpoint_says_what_its_training_said(speaking: Path, tmp_path: Path):
    path = elsewhere(speaking, tmp_path)
    shutil.copytree(speaking.parent / "run" / "checkpoints", tmp_path / "run" / "checkpoints")
    assert run_ranks(tmp_path / "output", 1, evaluate, path) == [0]
    (again,) = lines(tmp_path / "run" / "generations.jsonl")
    assert again == lines(speaking.parent / "run" / "generations.jsonl")[-1]
