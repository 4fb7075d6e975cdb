"""Marked tokens in their text, for people: [brackets] around them."""

from itertools import groupby
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cherry_megatron.data.marks import marks_prefix, read_marks
from cherry_megatron.sgt.selection.select import Selection
from cherry_megatron.sgt.selection.semantic import byte_places
from cherry_megatron.sgt.selection.tokens import open_tokenizer, open_tokens, token_bytes
from cherry_megatron.sgt.selection.words import KINDS

SHOWN_TOKENS = 400  # of a document


def show(prefix: Path, name: str, tokenizer: Path, documents: int) -> str:
    """The beginnings of some documents, spread evenly over the data set.

    Args:
        prefix: of the tokens.
        name: of the marks.
        tokenizer: folder of the data set's tokenizer.
        documents: how many.

    Raises:
        CherryError: if there are no such marks, or it is another tokenizer.
    """
    read_marks(prefix, name)
    table = token_bytes(open_tokenizer(tokenizer, prefix), tokenizer)
    tokens, lengths = open_tokens(prefix)
    firsts = np.cumsum(lengths, dtype=np.int64) - lengths
    lines = []
    for document in sorted({len(lengths) * at // documents for at in range(documents)}):
        first, count = int(firsts[document]), min(int(lengths[document]), SHOWN_TOKENS)
        marked = np.fromfile(f"{marks_prefix(prefix, name)}.bin", np.uint8, count, offset=first)
        text = bracketed([table[number] for number in tokens.read(first, count).tolist()], marked.tolist())
        lines += [f"--- document {document}", text.strip(), ""]
    return "\n".join(lines)


def bracketed(parts: list[bytes], marked: list[int]) -> str:
    """The text of tokens, with brackets around the characters that a marked token has a part of."""
    text = b"".join(parts).decode(errors="ignore")  # the last token may end within a character
    of_bytes = np.repeat(marked, [len(part) for part in parts])
    of_characters = np.maximum.reduceat(of_bytes, byte_places(text)[:-1]) if text else of_bytes[:0]
    found = ""
    for is_marked, group in groupby(zip(of_characters, text, strict=True), key=lambda pair: pair[0]):
        run = "".join(character for _, character in group)
        bare = run.strip()
        found += run.replace(bare, f"[{bare}]") if is_marked and bare else run
    return found


def summary(selection: Selection, prefix: Path, tokenizer: Path | None) -> str:
    """What a selection is, in some lines."""
    marks = selection.marks
    lines = [
        f"{marks_prefix(prefix, marks.name)}: {marks.marked:,} of {marks.eligible:,} tokens, rho {marks.rho:.6g}, "
        f"{marks.selector} {marks.version}"
    ]
    if selection.kinds is not None:
        lines.append(f"{'':<14}{'of the tokens':>14}{'of the marked':>14}{'marked':>9}")
        for kind, (all_, marked) in zip(KINDS, selection.kinds.tolist(), strict=True):
            shares = f"{all_ / marks.eligible:>14.1%}{marked / marks.marked:>14.1%}{marked / max(all_, 1):>9.1%}"
            lines.append(f"{kind:<14}{shares}")
    if selection.words and tokenizer is not None:
        words = ", ".join(_words(selection, prefix, open_tokenizer(tokenizer, prefix), tokenizer))
        lines.append(f"most frequent: {words}")
    lines.append(_speed(selection))
    return "\n".join(lines)


def _words(selection: Selection, prefix: Path, tokenizer: Tokenizer, folder: Path) -> list[str]:
    """The tokens of the most frequent words, as they are first written."""
    table = token_bytes(tokenizer, folder)
    tokens, lengths = open_tokens(prefix)
    firsts = np.cumsum(lengths, dtype=np.int64) - lengths
    found = []
    for word in selection.words:
        ids = tokens.read(int(firsts[word.document]) + word.start, word.end - word.start)
        text = b"".join(table[number] for number in ids.tolist()).decode(errors="replace").strip()
        found.append(f"{text} ({word.count:,})")
    return found


def _speed(selection: Selection) -> str:
    text = f"{selection.scored:,} tokens scored in {selection.seconds:.1f} s, starting included: "
    if selection.bytes_a_token is not None:
        text += f"{selection.tokens_per_second * selection.bytes_a_token / 1e6:.3f} MB/s a worker, "
    return f"{text}{selection.tokens_per_second:,.0f} tokens/s, {selection.workers} workers"
