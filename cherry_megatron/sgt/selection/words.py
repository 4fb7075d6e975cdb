"""Words of a text and what kinds of them there are."""

from typing import NamedTuple

REST, CONTENT, NAME, NUMBER, TRIGGER = range(5)
KINDS = ("other", "content words", "names", "numbers", "triggers")


class Word(NamedTuple):
    """A word of a text.

    Attributes:
        start: character that it begins with.
        end: character after it.
        kind: REST to TRIGGER.
        key: what it is counted by; empty for REST.
    """

    start: int
    end: int
    kind: int
    key: str
