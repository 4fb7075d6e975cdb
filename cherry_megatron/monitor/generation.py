"""Health of free generation: does the model repeat itself, say the same to every prompt, find an end?"""

import re
from collections.abc import Sequence

from cherry_megatron.inference.prompts import visible

DISTINCT = (1, 2, 3)
REPEATED = 4


def health(continuations: Sequence[Sequence[int]], end: int) -> dict[str, float]:
    """Measures of generated texts, the end token not counted among their tokens.

    Args:
        continuations: the new tokens of each prompt.
        end: the token that ends a text.

    Returns:
        By name, and where no text is long enough for an n-gram without what counts them:

        - distinct-n: different n-grams over all n-grams, of all texts together (Li et al. 2016, arXiv 1510.03055).
        - repetition: share of the 4-grams of a text that occurred before in it, the mean over the texts (seq-rep-4
          of Welleck et al. 2020, arXiv 1908.04319).
        - length: tokens of a text, the mean.
        - ended: share of the texts that ended by themselves.
    """
    ended = [bool(tokens) and tokens[-1] == end for tokens in continuations]
    texts = [tokens[:-1] if is_over else tokens for tokens, is_over in zip(continuations, ended, strict=True)]
    found = {}
    for n in DISTINCT:
        together = [gram for text in texts for gram in _grams(text, n)]
        if together:
            found[f"distinct-{n}"] = len(set(together)) / len(together)
    each = [grams for text in texts if (grams := _grams(text, REPEATED))]
    if each:
        found["repetition"] = sum(1 - len(set(grams)) / len(grams) for grams in each) / len(each)
    found["length"] = sum(map(len, texts)) / len(texts)
    found["ended"] = sum(ended) / len(texts)
    return found


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def table(prompts: Sequence[str], continuations: Sequence[str]) -> str:
    """A Markdown table that shows the texts as they are, whatever characters they hold."""
    rows = [f"| {_cell(prompt)} | {_cell(text)} |" for prompt, text in zip(prompts, continuations, strict=True)]
    return "\n".join(["| prompt | continuation |", "|---|---|", *rows])


def _cell(text: str) -> str:
    """A text on one line, in which nothing is Markdown or HTML: ASCII punctuation as character references."""
    shown = visible(text).replace("\n", "↵").replace("\t", "⇥")
    return re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", shown)
