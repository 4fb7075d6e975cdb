"""Free generation with the training model, under its parallel layout.

The code that was trained is the code that speaks; keys and values of earlier tokens are kept (see model/cache.py).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.training import get_args

from cherry_megatron.inference.draft import Depths, Drafter, Drafting, FewerLoops, NoDrafts
from cherry_megatron.inference.mixture import readers
from cherry_megatron.inference.options import Generation
from cherry_megatron.inference.prompts import check_fit
from cherry_megatron.inference.reader import Reads
from cherry_megatron.inference.rows import Chooser, Row


@dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
        texts: the new tokens of each prompt.
        seconds: that it took.
        drafted, accepted: tokens that were drafted, and those of them that became text.
    """

    texts: list[list[int]]
    seconds: float
    drafted: int
    accepted: int

    def speed(self) -> str:
        """In words."""
        tokens = sum(map(len, self.texts))
        said = f"{tokens} tokens in {self.seconds:.1f} s, {tokens / self.seconds:.1f} tokens/s"
        if self.drafted:
            share = self.accepted / self.drafted
            said += f"; {self.accepted} of {self.drafted} drafted tokens accepted ({share:.0%})"
        return said


def generate(
    model: list[torch.nn.Module],
    prompts: Sequence[Sequence[int]],
    options: Generation,
    loops: int,
    seed: int,
    end: int,
    drafting: Drafting | None = None,
    heard: Callable[[Row], None] | None = None,
) -> Generated:
    """Continue prompts. Every rank must call it, with the same values.

    Data-parallel replicas share out the prompts; where there are experts, ranks that hold all together are one. A
    continuation depends on the model, its prompt, and what is asked here; not on the layout, nor on the other
    prompts, nor on drafting.

    Args:
        model: chunks of this rank.
        prompts: token ids of each, at least one.
        options: how many tokens, and how they are drawn.
        loops: how often the core is walked.
        seed: of the draws.
        end: the token that ends a text.
        drafting: how drafts are made, if any are.
        heard: called with each text of this replica whenever it has grown.

    Returns:
        On every rank; `end` is the last token where a text ended by itself.

    Raises:
        CherryError: if a prompt and its new tokens are longer than --seq-length.
    """
    check_fit(prompts, options.tokens, get_args().seq_length, "generation")
    started = time.perf_counter()
    read, replicas = readers(model)
    mine = range(replicas.rank(), len(prompts), replicas.size())
    rows = [Row(number, prompts[number], options.tokens, end) for number in mine]
    depths = get_args().mtp_num_layers or 0
    drafted_at_once = min(drafting.most(depths), options.tokens) if drafting else 0
    room = max(map(len, prompts)) + options.tokens + drafted_at_once
    chooser = Chooser(options, seed)
    drafter: Drafter = NoDrafts()
    if drafting is not None and drafting.loops is None:
        reader = read(len(rows), room, loops, min(depths, drafted_at_once))
        drafter = Depths(reader, chooser, drafted_at_once)
    else:
        reader = read(len(rows), room, loops)
    if drafting is not None and drafting.loops is not None:
        drafter = FewerLoops(read(len(rows), room, drafting.loops), chooser, drafted_at_once)
    with evaluating(model):
        drafted, accepted = _grow(rows, reader, chooser, drafter, heard or (lambda _: None))
    found: list[Any] = [None] * replicas.size()
    torch.distributed.all_gather_object(found, ([row.new for row in rows], drafted, accepted), group=replicas)
    texts, drafts, right = zip(*found, strict=True)
    return Generated(
        [texts[number % len(texts)][number // len(texts)] for number in range(len(prompts))],
        time.perf_counter() - started,
        sum(drafts),
        sum(right),
    )


def _grow(
    rows: Sequence[Row], reader: Reads, chooser: Chooser, drafter: Drafter, heard: Callable[[Row], None]
) -> tuple[int, int]:
    """Add tokens to all rows until all are over.

    Returns:
        How many tokens were drafted, and how many of these became text.
    """
    drafted = accepted = 0
    while rows:
        # The model itself says one token more than was drafted.
        drafts = drafter.draft(rows, max(row.missing for row in rows) - 1)
        texts = [row.tokens + draft for row, draft in zip(rows, drafts, strict=True)]
        count = len(drafts[0]) + 1
        chosen = chooser.after(reader.logits_after(texts, count), count, rows, texts)
        for row, draft, tokens in zip(rows, drafts, chosen, strict=True):
            drafted += min(len(draft), row.missing)  # the rest could not become text
            taken = row.take(tokens)
            accepted += sum(token == guess for token, guess in zip(taken, draft, strict=False))
            heard(row)
        going = [place for place, row in enumerate(rows) if not row.over]
        if len(going) < len(rows):
            rows = [rows[place] for place in going]
            reader.keep(going)
            drafter.keep(going)
    return drafted, accepted


@contextmanager
def evaluating(model: list[torch.nn.Module]) -> Iterator[None]:
    """The model without dropout and gradients; left as it was."""
    modes = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk, mode in zip(model, modes, strict=True):
            chunk.train(mode)
