"""Texts that grow, and the token that comes next in each."""

from collections.abc import Sequence

import torch
from megatron.core import mpu
from torch import Tensor

from cherry_megatron.inference.options import Generation
from cherry_megatron.inference.sampling import pick, shares_of
from cherry_megatron.model.seeding import seed_of

_NONE = -1  # where no token is chosen


class Row:
    """A text that grows.

    Attributes:
        number: of its prompt among all.
        tokens: so far.
        given: number of the prompt's.

    Args:
        number, prompt: its beginning.
        most: new tokens.
        end: the token that ends a text.
    """

    def __init__(self, number: int, prompt: Sequence[int], most: int, end: int) -> None:
        self.number, self.tokens, self.given = number, list(prompt), len(prompt)
        self._most, self._end, self._name = most, end, str(self.tokens)
        self._stopped = False

    @property
    def new(self) -> list[int]:
        """The tokens that followed the prompt."""
        return self.tokens[self.given :]

    @property
    def missing(self) -> int:
        """How many tokens may still follow."""
        return self._most - len(self.tokens) + self.given

    @property
    def over(self) -> bool:
        """Whether the text has come to its end, was stopped, or is as long as it may be."""
        ended = len(self.tokens) > self.given and self.tokens[-1] == self._end
        return self._stopped or ended or self.missing == 0

    def stop(self) -> None:
        """Let nothing follow any more."""
        self._stopped = True

    def generator(self, seed: int, position: int) -> torch.Generator:
        """Of the token at a position: from the seed, the prompt and the position alone."""
        return torch.Generator().manual_seed(seed_of(seed, f"{self._name}/{position}"))

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Go on with tokens up to the text's end; returns those taken."""
        before = len(self.tokens)
        for token in tokens:
            if not self.over:
                self.tokens.append(token)
        return self.tokens[before:]


class Chooser:
    """Chooses what comes next.

    Args:
        options: how a token is drawn.
        seed: of the draws.
    """

    def __init__(self, options: Generation, seed: int) -> None:
        self._options, self._seed = options, seed

    def after(
        self, logits: Tensor | None, count: int, rows: Sequence[Row], texts: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """The tokens after the last ones of each text, up to the first that differs from the text's own.

        Args:
            logits: after each of the last `count` tokens, [n, count, v], on the last pipeline stage.
            count: so many tokens of each text are to be followed.
            rows: whose texts they are.
            texts: each a row's tokens and, it may be, further ones.

        Returns:
            One to `count` tokens of each, the same on all ranks of a replica.
        """
        chosen = torch.full((len(rows), count), _NONE)
        if logits is not None:
            shares = shares_of(
                logits, self._options
            ).cpu()  # drawn there, as a generator's numbers are each device's own
            for found, *given in zip(chosen, shares, rows, texts, strict=True):
                tokens = self._of_one(*given)
                found[: len(tokens)] = torch.tensor(tokens)
        shared = chosen.to(torch.cuda.current_device())
        group = mpu.get_model_parallel_group()
        torch.distributed.broadcast(shared, group=group, group_src=group.size() - 1)  # a rank of the last stage
        return [[token for token in found if token != _NONE] for found in shared.tolist()]

    def _of_one(self, shares: Tensor, row: Row, text: Sequence[int]) -> list[int]:
        """shares: [count, v]."""
        tokens: list[int] = []
        for position, likely in enumerate(shares, start=len(text) - len(shares) + 1):
            tokens.append(pick(likely, self._options, row.generator(self._seed, position)))
            if position < len(text) and tokens[-1] != text[position]:
                break  # the rest of the text was read after another token
        return tokens
