"""Prompts and what follows them, on a terminal."""

from collections.abc import Callable, Sequence

from cherry_megatron.inference.prompts import Prompts, visible

_INCOMPLETE = "\ufffd"  # what the bytes of half a character decode to


class Printer:
    """Prints texts one after the other, each as far as it is known; the whole does not depend on when it is told.

    Args:
        prompts: in the order in which they are printed.
        write: prints a piece of a line.
    """

    def __init__(self, prompts: Prompts, write: Callable[[str], None]) -> None:
        self._prompts, self._write = prompts, write
        self._known: dict[int, tuple[str, bool]] = {}
        self._next = 0
        self._shown: str | None = None  # of the text under way

    def tell(self, number: int, tokens: Sequence[int], over: bool) -> None:
        """What follows a prompt so far, and whether that is all."""
        text = self._prompts.text_of(tokens)
        self._known[number] = (text if over else text.rstrip(_INCOMPLETE), over)
        while self._next in self._known:
            text, over = self._known[self._next]
            self._print(text)
            if not over:
                break
            self._write("\n\n")
            self._next, self._shown = self._next + 1, None

    def _print(self, text: str) -> None:
        """What is new of the text under way."""
        if self._shown is None:
            self._write(f"> {visible(self._prompts.texts[self._next])}\n")
            self._shown = ""
        self._write(visible(text[len(self._shown) :]))
        self._shown = text
