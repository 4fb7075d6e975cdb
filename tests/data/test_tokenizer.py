"""The tokenizer: exact round trips, whole folders, fair use of its limit, one sentence for bad input."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from cherry_megatron.cli import main
from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.errors import CherryError
from tests.conftest import korean_text, run_ranks

SPECIAL = [tokenizers.END_OF_DOCUMENT, tokenizers.PADDING]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "text.txt").write_text("\n".join(korean_text(1)))
    tokenizers.train([path / "text.txt"], path / "made", 500)
    return path / "made"


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return tokenizers.load(folder)


def ranges(*pairs: tuple[int, int]) -> st.SearchStrategy[str]:
    return st.one_of(*(st.characters(min_codepoint=a, max_codepoint=b) for a, b in pairs))


HANGUL = ranges((0xAC00, 0xD7A3), (0x1100, 0x11FF), (0x3130, 0x318F), (0x302A, 0x302F))
HANJA = ranges((0x4E00, 0x9FFF), (0xF900, 0xFAD9), (0x20000, 0x2A6DF), (0x2F800, 0x2FA1D))
EMOJI = ranges((0x1F300, 0x1FAFF), (0xFE0F, 0xFE0F), (0x200D, 0x200D), (0x1F1E6, 0x1F1FF), (0x20E3, 0x20E3))
CONTROL = ranges((0, 0x1F), (0x7F, 0x9F), (0x2028, 0x202E), (0xFFF0, 0xFFFF))
MARKS = ranges((0x300, 0x36F), (0x3099, 0x309A))
CODE = st.sampled_from(["def f(x):\n\treturn x**2  # 제곱\n", "<br/>", "\r\n", "   ", "don't", "'s", *SPECIAL])
# The library's normal forms do not know some rare combining marks that came to Unicode after 2016.
OTHER = st.characters(exclude_categories=["Cs", "Mn", "Mc"])
MIXED = st.lists(st.one_of(HANGUL, HANJA, EMOJI, CONTROL, MARKS, CODE, OTHER), max_size=40).map("".join)


@settings(max_examples=300)
@given(MIXED)
@example("\u1112\u1161\u11ab\u1100\u1173\u11af 漢字 👩‍👩‍👧 café cafe\u0301 \x00\x1b[0m")
@example(f"a{SPECIAL[0]}b {SPECIAL[1]}")
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)
    assert not {tokenizer.token_to_id(name) for name in SPECIAL} & set(ids)


def _open_with_transformers(folder: Path, text: str) -> tuple[list[int], str, int, int]:
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(folder)
    ids = opened(text)["input_ids"]
    return ids, opened.decode(ids), opened.eos_token_id, opened.pad_token_id


def test_transformers_opens_the_folder(folder, tokenizer, tmp_path):
    text = "나는 학교에 갑니다 . The model 's trained !\n"
    opened = run_ranks(tmp_path, 1, _open_with_transformers, folder, text)[0]
    assert opened == (tokenizer.encode(text).ids, text, tokenizers.end_of_document(tokenizer, folder), 1)


def test_the_size_covers_the_largest_id(tokenizer):
    assert tokenizers.size(tokenizer) == tokenizer.get_vocab_size() <= 500
    assert tokenizers.size(Tokenizer(models.BPE(vocab={"a": 0, "b": 70000}, merges=[]))) == 70001


def test_training_twice_gives_the_same(folder, tmp_path):
    tokenizers.train([folder.parent / "text.txt"], tmp_path / "again", 500)
    assert tokenizers.fingerprint(tmp_path / "again") == tokenizers.fingerprint(folder)
    tokenizers.train([folder.parent / "text.txt"], tmp_path / "smaller", 400)
    assert tokenizers.fingerprint(tmp_path / "smaller") != tokenizers.fingerprint(folder)


def test_a_limit_leaves_no_file_out(tmp_path):
    """Of two files of 3 MB, a limit of 2 MB takes half from each, and stops at the document that reaches it."""
    for letter in "ab":
        (tmp_path / f"{letter}.jsonl").write_text((json.dumps({"text": letter * 999}) + "\n") * 3000)
    read = "".join(tokenizers._texts(sorted(tmp_path.iterdir()), 2_000_000, "text"))
    assert 2_000_000 <= len(read) <= 2_001_000
    assert min(read.count("a"), read.count("b")) > 900_000


def test_more_files_than_may_be_open_are_all_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "OPEN_FILES", 2)
    for number in range(7):
        (tmp_path / f"{number}.txt").write_text(str(number))
    (tmp_path / "8.txt").write_bytes(b"\xff")  # malformed: passed over
    assert sorted(tokenizers._texts(sorted(tmp_path.iterdir()), 100, "text")) == list("0123456")


def test_files_of_other_kinds_are_counted(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("some text")
    (tmp_path / "in/b.json").touch()
    arguments = ["tokenizer", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "in/made")]
    assert main([*arguments, "--vocab-size", "260"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"files of other kinds that were left out: 1, e.g. {tmp_path / 'in/b.json'}"
    ]


def test_fewer_tokens_than_were_asked_for_are_told(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text, some text")
    arguments = ["tokenizer", "--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "made")]
    assert main([*arguments, "--vocab-size", "32000"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    size = tokenizers.size(tokenizers.load(tmp_path / "made"))
    assert 258 < size < 300 and f"made: {size} tokens; " in first
    assert second.startswith("these are fewer than --vocab-size 32000: the text that was read yields no more; give")


def test_a_run_that_is_killed_leaves_no_folder(folder, tmp_path):
    child = os.fork()
    if not child:
        os.rename = lambda *_: os._exit(9)  # type: ignore[assignment]
        os.replace = os.rename  # type: ignore[assignment]
        tokenizers._save(tokenizers.load(folder), tmp_path / "made")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "made").exists()


def test_an_empty_folder_is_filled_and_nothing_else_is_left(folder, tmp_path):
    (tmp_path / "made").mkdir()
    tokenizers.train([folder.parent / "text.txt"], tmp_path / "made", 300)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in (tmp_path / "made").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"vocabulary": 257}, "--vocab-size 257 is too small; a byte-level vocabulary needs 258"),
        ({"limit_mb": 0}, "--limit-mb 0 leaves nothing"),
        ({"output": "full"}, "full exists"),
        ({"output": "text.jsonl"}, "text.jsonl exists"),
        ({"output": "text.jsonl/below"}, "text.jsonl/below: Not a directory"),
        ({"key": "body"}, "hold no text .*text.jsonl:1: no text under the key 'body'"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, arguments, expected):
    (tmp_path / "text.jsonl").write_text('{"text": "some text"}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    output = tmp_path / arguments.pop("output", "made")
    with pytest.raises(CherryError, match=expected):
        tokenizers.train([tmp_path / "text.jsonl"], output, **{"vocabulary": 300, **arguments})
    assert not (tmp_path / "made").exists()


def test_a_folder_that_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(CherryError, match=r"holds no tokenizer.json; make one with `cherry tokenizer`"):
        tokenizers.load(tmp_path)
    with pytest.raises(CherryError, match=r"cannot read .*tokenizer.json"):
        tokenizers.fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CherryError, match=r"tokenizer.json is not a tokenizer"):
        tokenizers.load(tmp_path)


def test_a_tokenizer_without_an_end_of_document_is_refused(tmp_path):
    with pytest.raises(CherryError, match=r"has no <\|endoftext\|> token"):
        tokenizers.end_of_document(Tokenizer(models.BPE()), tmp_path)


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "lstrip": False}])
def test_a_tokenizer_from_elsewhere_ends_documents_with_its_own_token(token, tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(["<s>", "</s>"])
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"eos_token": token}))
    assert tokenizers.end_of_document(tokenizer, tmp_path) == 1
    path.write_text(json.dumps({"eos_token": "<|none|>"}))
    with pytest.raises(CherryError, match=r"its tokenizer_config.json names no eos_token"):
        tokenizers.end_of_document(tokenizer, tmp_path)
    path.write_text("[")
    with pytest.raises(CherryError, match=r"tokenizer_config.json is damaged"):
        tokenizers.end_of_document(tokenizer, tmp_path)
