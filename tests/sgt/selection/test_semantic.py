"""Words to tokens, exactly; and the order by frequency."""

import json
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cherry_megatron.data import prepare, tokenizer
from cherry_megatron.sgt.selection.segments import Analyser
from cherry_megatron.sgt.selection.semantic import Reader, kinds, merged, rarities
from cherry_megatron.sgt.selection.tokens import token_bytes
from cherry_megatron.sgt.selection.triggers import read_triggers
from cherry_megatron.sgt.selection.words import CONTENT, NUMBER, TRIGGER, Word
from tests.conftest import run_ranks
from tests.sgt.selection.conftest import MIXED, read_marks, run, small_pieces


@st.composite
def cut_texts(draw):
    """A text, its bytes cut anywhere into tokens, and spans of its characters."""
    text = "".join(draw(st.lists(st.one_of(st.sampled_from(MIXED), st.text(max_size=8)), min_size=1, max_size=3)))
    content = text.encode()
    borders = sorted({0, len(content), *draw(st.lists(st.integers(0, len(content)), max_size=40))})
    parts = [content[start:end] for start, end in pairwise(borders)]
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=10)))
    return text, parts, list(zip(places[::2], places[1::2], strict=False))


@settings(max_examples=150, deadline=None)
@given(cut_texts())
def test_a_token_is_of_a_word_if_they_share_a_byte(drawn):
    text, parts, spans = drawn
    reader = Reader(parts, lambda found: [Word(*span, CONTENT, "a") for span in spans if found == text])
    records = reader.words(list(range(len(parts))))
    owner = [number for number, part in enumerate(parts) for _ in part]
    for record, (start, end) in zip(records, spans, strict=True):
        touched = {owner[at] for at in range(len(text[:start].encode()), len(text[:end].encode()))}
        assert set(range(record["start"], record["end"])) == touched


def test_the_tokens_of_real_text(source):
    """With the tokenizer and the analysers: the bytes of a word's tokens hold the word, and no less would."""
    made = tokenizer.load(source / "tokenizer")
    table = token_bytes(made, source / "tokenizer")
    assert table[made.token_to_id(tokenizer.END_OF_DOCUMENT)] == b"\n"
    analyse = Analyser(read_triggers(None))
    for text in MIXED:
        ids = made.encode(text).ids
        assert b"".join(table[number] for number in ids).decode() == text
        records = Reader(table, analyse).words(ids)
        words = analyse(text)
        assert len(records) == len(words) > 2
        for record, word in zip(records, words, strict=True):
            held = [table[number] for number in ids[record["start"] : record["end"]]]
            wanted = text[word.start : word.end].encode()
            assert wanted in b"".join(held)
            assert wanted not in b"".join(held[1:]) and wanted not in b"".join(held[:-1])


@given(st.lists(st.lists(st.integers(0, 9)), max_size=5))
def test_counts_are_summed_and_the_rare_is_above_the_frequent(parts):
    counted = [np.array([(key, 1) for key in part], [("key", "<u8"), ("count", "<i8")]) for part in parts]
    found = merged(merged([part]) for part in counted)
    keys = [key for part in parts for key in part]
    assert dict(found.tolist()) == {key: keys.count(key) for key in keys}
    rarity = dict(rarities(found).tolist())
    assert all(rarity[a] > rarity[b] for a in rarity for b in rarity if keys.count(a) < keys.count(b))
    assert all(0.5 < value <= 1 for value in rarity.values()) and len(set(rarity.values())) == len(rarity)


def _select_from(texts: list[str], folder, rhos: list[float]) -> list[list[str]]:
    """The words that are marked, for each share."""
    small_pieces(50)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (folder / "text.jsonl").write_text("\n".join(lines))
    tokenizer.train([folder / "text.jsonl"], folder / "tokenizer", 2000)
    prepare.prepare([folder / "text.jsonl"], folder / "text", folder / "tokenizer", workers=1)
    table = token_bytes(tokenizer.load(folder / "tokenizer"), folder / "tokenizer")
    ids = np.fromfile(folder / "text.bin", np.uint16)
    found = []
    for rho in rhos:
        selection = run(folder, "semantic", rho)
        marked = read_marks(folder, "semantic")
        assert selection.kinds[:, 1].sum() == marked.sum()
        found.append(sorted({table[number].decode().strip() for number in ids[marked > 0]} - {""}))
        for path in folder.glob("text.semantic.*"):
            path.unlink()
    return found


def test_triggers_numbers_names_then_rare_words(tmp_path):
    """A corpus in which every word is a token, whose frequencies are known."""
    text = " ".join(["the apple"] * 40 + ["the pencil"] * 20 + ["the castle"] * 5 + ["because"] * 30 + ["42"] * 10)
    total = 40 * 2 + 20 * 2 + 5 * 2 + 30 + 10 + 1
    rhos = [count / total for count in (30, 40, 45, 65, 105)]
    ((*steps,),) = run_ranks(tmp_path / "logs", 1, _select_from, [text], tmp_path, rhos)
    expected = ["because"], ["42"], ["castle"], ["pencil"], ["apple"]
    for step in range(len(rhos)):
        assert steps[step] == sorted(word for words in expected[: step + 1] for word in words)


def test_kinds_are_read_from_scores():
    scores = np.array([0, -np.inf, CONTENT - 0.49, CONTENT, NUMBER - 0.49, TRIGGER], np.float32)
    assert kinds(scores).tolist() == [0, 0, CONTENT, CONTENT, NUMBER, TRIGGER]
