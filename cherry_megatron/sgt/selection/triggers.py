"""Expressions that steer reasoning (therefore, 왜냐하면, wait, 다시): lists, and where they stand in a text."""

import hashlib
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path

from cherry_megatron.errors import CherryError
from cherry_megatron.sgt.selection.words import TRIGGER, Word

SHIPPED = ("ko.txt", "en.txt")
COMMENT, INSIDE = "#", "-"


class Triggers:
    """A list of expressions of one or more words.

    Args:
        lines: an expression each. One that begins with a hyphen is an ending: it may stand inside of a word.
            What follows a # is a comment.

    Attributes:
        hash: of the expressions, to compare lists.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        found = sorted({" ".join(line.partition(COMMENT)[0].lower().split()) for line in lines} - {"", INSIDE})
        self.hash = hashlib.sha256("\n".join(found).encode()).hexdigest()[:12]
        self._by_first: dict[str, list[tuple[str, bool]]] = {}
        for text in sorted(found, key=len, reverse=True):
            bare = text.removeprefix(INSIDE)
            self._by_first.setdefault(bare[0], []).append((bare, bare != text))

    def __bool__(self) -> bool:
        return bool(self._by_first)

    def join(self, text: str, words: list[Word]) -> Iterator[Word]:
        """The words of a text, where those of an expression are one. An expression ends where a word ends."""
        lower = text.lower()
        if len(lower) != len(text):  # few letters become two
            lower = text
        ends = {word.end for word in words}
        until = 0
        for word in words:
            if word.start < until:
                continue
            expression = self._at(lower, word.start, ends)
            if expression is None:
                yield word
            else:
                until = word.start + len(expression)
                yield Word(word.start, until, TRIGGER, f"{expression}/trigger")

    def _at(self, text: str, start: int, ends: set[int]) -> str | None:
        """The longest expression that begins at a character."""
        for expression, inside in self._by_first.get(text[start], ()):
            if text.startswith(expression, start) and start + len(expression) in ends:
                begins_word = start == 0 or not text[start - 1].isalnum()
                if inside or begins_word:
                    return expression
        return None


def read_triggers(path: Path | None) -> Triggers:
    """The list in a file, or the shipped ones.

    Raises:
        CherryError: if the file cannot be read or names nothing.
    """
    if path is None:
        folder = files("cherry_megatron.sgt.selection") / "triggers"
        return Triggers(line for name in SHIPPED for line in (folder / name).read_text("utf-8").splitlines())
    try:
        triggers = Triggers(path.read_text(encoding="utf-8").splitlines())
    except OSError as error:
        raise CherryError(f"--triggers {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise CherryError(f"--triggers {path} is no UTF-8 text; save it as UTF-8, an expression a line") from None
    if not triggers:
        raise CherryError(f"--triggers {path} names no expression; write one a line")
    return triggers
