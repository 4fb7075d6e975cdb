"""Conversations: the text that transformers' template gives, and marks on the answers alone, exactly."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cherry_megatron import cli
from cherry_megatron.data import chat, marks, prepare
from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.data.text import Chunk
from cherry_megatron.errors import CherryError
from tests.conftest import korean_text, run_ranks
from tests.data.conftest import read_back
from tests.data.test_prepare_killed import kill_at_every_step

CONTENTS = [
    "학교에 갑니다", "각\u1100\u1161", "漢字와 한글", "🙂👍🏽👨‍👩‍👧", "\n\n", " ", "def f(x):\n\treturn x  # 끝\n",
    "<|endoftext|>", "<|assistant|>\n", "<|user|>", "", "a\u0301\r\n", "  x",
]  # fmt: skip
contents = st.lists(st.sampled_from(CONTENTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=9))
turns = st.lists(st.tuples(st.sampled_from(chat.ROLES), contents.map("".join)), max_size=5)


def _line(messages: list[tuple[str, str]]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def _encode(tokenizer: Any, lines: list[Any]) -> tuple[list[list[int]], list[list[int]], tokenizers.Counts]:
    """The ids and the answers' marks of each document."""
    raw = "\n".join(json.dumps(line) for line in lines).encode()
    encoded = tokenizers.encode(tokenizer, [Chunk(Path("a.jsonl"), 1, raw, len(raw))], None, 0, "H")
    cuts = np.cumsum(np.frombuffer(encoded.streams["lengths"], np.int32))[:-1]
    split = (
        np.split(np.frombuffer(encoded.streams[name], dtype), cuts)
        for name, dtype in (("tokens.bin", np.uint16), ("answers", np.uint8))
    )
    ids, answers = ([part.tolist() for part in parts] for parts in split)
    return ids, answers, encoded.counts


def _answers_are_marked(folder: Path) -> int:
    """Returns how many conversations were compared."""
    from transformers import AutoTokenizer

    tokenizer, theirs = tokenizers.load(folder / "tokenizer"), AutoTokenizer.from_pretrained(folder / "tokenizer")
    normal = tokenizer.normalizer.normalize_str
    compared = 0

    @settings(max_examples=100, database=None, suppress_health_check=list(HealthCheck), deadline=None)
    @given(turns, contents.map("".join).filter(str.strip))
    def check(before, last):
        nonlocal compared
        compared += 1
        messages = [*before, ("assistant", last)]
        (ids,), (learned,), counts = _encode(tokenizer, [_line(messages)])
        answers = [content for role, content in messages if role == "assistant"]
        marked = [token for token, mark in zip(ids, learned, strict=True) if mark]
        assert tokenizer.decode(marked) == normal("".join(answers)) and counts.answers == len(marked)
        ends = [place for place, token in enumerate(ids) if token == 0]
        assert len(ends) == len(answers) and all(learned[place] for place in ends) and ends[-1] == len(ids) - 1
        for answer, start, end in zip(answers, [-1, *ends], ends, strict=False):
            own = [
                token for token, mark in zip(ids[start + 1 : end], learned[start + 1 : end], strict=True) if mark
            ]
            assert tokenizer.decode(own) == normal(answer)
        text = theirs.apply_chat_template(_line(messages)["messages"], tokenize=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == normal(text)
        first = next(place for place, mark in enumerate(learned) if mark)
        asked = messages[: [role for role, _ in messages].index("assistant")]
        if asked and not any(
            "<|endoftext|>" in content for _, content in asked
        ):  # transformers takes it for the token
            prompt = theirs.apply_chat_template(
                _line(asked)["messages"], add_generation_prompt=True, tokenize=False
            )
            assert theirs(prompt)["input_ids"] == ids[:first], "a model is asked as it was taught"

    check()
    return compared


def test_answers_and_their_ends_are_marked_and_nothing_else(folder, tmp_path):
    assert run_ranks(tmp_path, 1, _answers_are_marked, folder)[0] >= 100


def test_prompt_and_response_are_a_conversation_of_two_messages(folder):
    tokenizer = tokenizers.load(folder / "tokenizer")
    pair = {"prompt": "학교에\n", "response": " 갑니다"}
    ids, learned, _ = _encode(tokenizer, [pair, _line([("user", "학교에\n"), ("assistant", " 갑니다")])])
    assert ids[0] == ids[1] and learned[0] == learned[1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"text": "a"}, "neither messages nor prompt and response"),
        ({"prompt": "a"}, "neither messages nor prompt and response"),
        ({"prompt": "a", "response": None}, "no text under the key 'response'"),
        ({"messages": "a"}, "messages is no list"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "message 1 has no role of system, user, assistant"),
        ({"messages": [{"role": [], "content": "a"}]}, "message 1 has no role of system, user, assistant"),
        ({"messages": [{"role": "user"}]}, "no text under the key 'content'"),
        (_line([("user", "\ud800"), ("assistant", "b")]), "an unpaired surrogate is no character"),
        (_line([("assistant", "b"), ("user", "a")]), "the last message is not of the assistant"),
        (["a"], "no JSON object"),
    ],
)
def test_a_malformed_line_is_named(folder, line, reason):
    good = _line([("user", "a"), ("assistant", "b")])
    ids, _, counts = _encode(tokenizers.load(folder / "tokenizer"), [good, line, good])
    assert ids[0] == ids[1] and len(ids) == 2 and counts.malformed == 1
    assert counts.named == [f"a.jsonl:2: {reason}"]


def test_conversations_without_an_answer_are_empty(folder):
    lines = [{"messages": []}, _line([("user", "a"), ("assistant", " \n")])]
    ids, _, counts = _encode(tokenizers.load(folder / "tokenizer"), [*lines, _line([("assistant", "b")])])
    assert len(ids) == 1 and (counts.empty, counts.malformed) == (2, 0)


# The command


@pytest.fixture(scope="module")
def chats(folder, tmp_path_factory) -> Path:
    """Two files of 30 conversations of two and four messages, and a tokenizer without a template."""
    path = tmp_path_factory.mktemp("chats")
    shutil.copytree(folder / "tokenizer", path / "tokenizer")
    (path / "tokenizer" / chat.TEMPLATE_FILE).unlink()
    for seed in (1, 2):
        roles = ("user", "assistant") * 2
        lines = [
            _line([*zip(roles[: 2 + 2 * (n % 2)], t.split(), strict=False)])
            for n, t in enumerate(korean_text(seed, 30))
        ]
        (path / f"{seed}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return path


def _written(chats: Path, output: Path) -> tuple[list[list[int]], list[int], float]:
    from cherry_megatron.data.dataset import MarkedDataset
    from tests.data.test_dataset import build

    options = ["--tokenizer", str(chats / "tokenizer"), "--output", str(output), "--workers", "2", "--sft"]
    assert cli.main(["data", "--input", str(chats / "1.jsonl"), str(chats / "2.jsonl"), *options]) == 0
    dataset = build(MarkedDataset, output, 8, None, path_to_cache=str(output.parent / "logs"))
    learned = sum(dataset[number]["loss_mask"].sum().item() for number in range(len(dataset)))
    return read_back(output), np.fromfile(f"{output}.answers.bin", np.uint8).tolist(), learned / len(dataset) / 8


def test_the_data_set_has_its_answers_beside_it(chats, tmp_path):
    ids, learned, share = run_ranks(tmp_path / "logs", 1, _written, chats, tmp_path / "out")[0]
    tokenizer = tokenizers.load(chats / "tokenizer")
    lines = [json.loads(line) for seed in (1, 2) for line in (chats / f"{seed}.jsonl").read_text().splitlines()]
    expected_ids, expected, counts = _encode(tokenizer, lines)
    assert ids == expected_ids and learned == [mark for marks_of in expected for mark in marks_of]
    read = marks.read_marks(tmp_path / "out", marks.ANSWERS)
    assert (read.tokens, read.marked, read.name) == (len(learned), sum(learned), "answers")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["answers"] == counts.answers == sum(learned) and report["documents"] == 60
    assert share == pytest.approx(read.rho, abs=0.02), "training learns from the answers without being told to"
    assert (chats / "tokenizer" / chat.TEMPLATE_FILE).read_text() == chat.CHAT_TEMPLATE
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "logs", "out.answers.bin", "out.answers.idx", "out.answers.json", "out.bin", "out.idx", "out.json",
    ]  # fmt: skip
    (tmp_path / "out.answers.json").unlink()
    assert marks.has_answers(tmp_path / "out"), "lost answers are missed"


def test_killed_at_any_step_a_second_run_gives_the_same_answers(chats, tmp_path):
    steps, _ = run_ranks(tmp_path, 1, kill_at_every_step, chats, tmp_path, 6, {"sft": True})[0]
    assert steps >= 45


def test_what_holds_no_conversations_is_refused(chats, folder, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(CherryError, match=r"a.txt: --sft reads conversations, one a line, from .jsonl files alone"):
        prepare.prepare([tmp_path], tmp_path / "out", chats / "tokenizer", sft=True)
    with pytest.raises(CherryError, match="102 of 103 lines are malformed"):
        prepare.prepare([folder / "1.jsonl"], tmp_path / "out", chats / "tokenizer", max_malformed=0.5, sft=True)


@pytest.mark.parametrize("name", [chat.TEMPLATE_FILE, "tokenizer_config.json"])
def test_another_template_is_refused(chats, tmp_path, name):
    shutil.copytree(chats / "tokenizer", tmp_path / "other")
    (tmp_path / "other" / chat.TEMPLATE_FILE).unlink(missing_ok=True)
    (tmp_path / "other" / name).write_text('{"chat_template": "{{ messages }}"}')
    with pytest.raises(CherryError, match="has another chat template"):
        prepare.prepare([chats / "1.jsonl"], tmp_path / "out", tmp_path / "other", sft=True)
