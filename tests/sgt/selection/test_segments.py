"""Words of a text: what they are, and that they stand where they are said to stand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cherry_megatron.sgt.selection.segments import Analyser, segments
from cherry_megatron.sgt.selection.triggers import Triggers, read_triggers
from cherry_megatron.sgt.selection.words import CONTENT, NAME, NUMBER, TRIGGER
from tests.sgt.selection.conftest import MIXED

TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*MIXED, " ", "\n", "\0", "\r\n", "다시마", "갔다.", "can't", "ㅋ", "　", "\x85"]),
        st.text(),
    ),
    max_size=6,
).map("".join)


@pytest.fixture(scope="module")
def analyse():
    return Analyser(read_triggers(None))


def found(analyse, text: str) -> dict[str, int]:
    return {text[word.start : word.end]: word.kind for word in analyse(text)}


def test_korean(analyse):
    words = found(analyse, "왜냐하면 서울에서 漢字를 가르쳤기 때문이다. 다시 GPU 3대를 샀다")
    assert words == {
        "왜냐하면": TRIGGER, "서울": NAME, "漢字": CONTENT, "가르쳤": CONTENT, "때문이다": TRIGGER, "다시": TRIGGER,
        "GPU": CONTENT, "3": NUMBER, "샀": CONTENT,
    }  # fmt: skip


def test_verbs_are_counted_by_their_stem(analyse):
    keys = [{w.key for w in analyse(text)} for text in ("책을 샀다", "책을 산다", "책을 샀던")]
    assert all("사/VV" in found for found in keys)


def test_english(analyse):
    words = found(analyse, "However, the man wasn't convinced because 3,000 people live in Seoul.")
    assert words == {
        "However": TRIGGER, "man": CONTENT, "convinced": CONTENT, "because": TRIGGER, "3,000": NUMBER,
        "people": CONTENT, "live": CONTENT, "Seoul": NAME,
    }  # fmt: skip


def test_english_within_korean_goes_to_the_tagger(analyse):
    assert "the" not in found(analyse, "다음은 the end of the list 입니다")


def test_letters_without_a_vowel_are_apart():
    text = "ㅋㅋ진짜 재밌다ㅠㅠ"
    assert [text[start:end] for start, end, _ in segments(text)] == ["진짜 재밌다"]


def test_triggers_end_where_a_morpheme_ends_and_begin_a_word():
    analyse = Analyser(Triggers(["다시", "하지만", "예를 들면 # a comment", "-므로", "", "# nothing", "In Fact"]))

    def triggers(text: str) -> list[str]:
        return [text[word.start : word.end] for word in analyse(text) if word.kind == TRIGGER]

    assert triggers("다시 다시마를 예를 들면 사람이므로") == ["다시", "예를 들면", "므로"]
    assert triggers("그는 생각하지만 간다. 하지만 온다") == ["하지만"]
    assert triggers("in fact they check") == ["in fact"]


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_words_follow_one_another_and_hold_no_space_at_their_ends(text):
    analyse = Analyser(Triggers(["다시", "그런데", "wait"]))
    end = 0
    for word in analyse(text):
        assert end <= word.start < word.end <= len(text) and word.key
        assert text[word.start : word.end].strip() == text[word.start : word.end]
        end = word.end
