"""Tokens a second of generation: whole passes, kept keys and values, drafts with fewer loops and by prediction.

    python benchmarks/generate_speed.py --config RUN/config.yaml --output RESULT.md [--tokens 64] [--repeats 3]

The run must have been trained (`make demo` makes runs/demo/recovered, say). All variants run in one process on one
checkpoint, each so often, and the fastest time counts. The last column counts the texts that are those of the
variant without drafts: all of them in float32; in lower precision a pass over several tokens rounds otherwise than
one of a single token, and a text may go on differently from where two tokens are nearly as likely.
"""

import argparse
import time
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from cherry_megatron.config import load
from cherry_megatron.inference.options import Generation
from cherry_megatron.inference.prompts import Prompts, encode_prompts, read_prompts
from cherry_megatron.platform.machine import prepare

# Loops to draft with, or None for multi-token prediction, and tokens of a draft.
DRAFTS = ((1, 1), (1, 2), (1, 4), (2, 4), (4, 4), (None, 1), (None, 2), (None, 4))
HEAD = (
    "| texts | temperature | variant | tokens/s | against plain | drafts accepted | same texts |\n"
    "|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="the table, row by row as it is measured")
    parser.add_argument("--prompts", type=Path, default=Path("configs/prompts_ko.txt"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    machine, config = prepare(), load(given.config)
    from cherry_megatron.pretrain import load_only, pretrain

    prompts = encode_prompts(config, read_prompts(given.prompts), given.tokens, str(given.prompts))
    measured = partial(Measured, prompts, given.tokens, given.repeats, given.output)
    pretrain(config, machine, load_only(config), evaluation=measured)


class Measured:
    """Called with the model; writes a row of the table for each variant."""

    def __init__(
        self,
        prompts: Prompts,
        tokens: int,
        repeats: int,
        output: Path,
        config: Any,
        *_from_pretrain: Any,
    ) -> None:
        self._prompts, self._tokens, self._repeats = prompts, tokens, repeats
        self._output = output
        self._loops, self._mixture = config.recurrence.loops, config.moee is not None
        self._drafts = [
            (loops, tokens)
            for loops, tokens in DRAFTS
            if (config.mtp.depths > 0 if loops is None else loops < self._loops)
        ]

    def __call__(self, model: list[torch.nn.Module]) -> None:
        self._output.write_text(f"{HEAD}\n")
        for count in (1, len(self._prompts.ids)):
            prompts = self._prompts.ids[:count]
            if not self._mixture:  # its gates are no matter of one pass over a text
                seconds = min(self._uncached(model, prompts) for _ in range(self._repeats))
                self._add(f"| {count} | 0 | whole passes | {count * self._tokens / seconds:.1f} | | | |")
            for temperature in (0.0, 0.8):
                self._all_drafts(model, prompts, temperature)

    def _add(self, row: str) -> None:
        with self._output.open("a") as file:
            file.write(f"{row}\n")

    def _all_drafts(self, model: Any, prompts: list[list[int]], temperature: float) -> None:
        from cherry_megatron.inference.draft import Drafting

        def speed(found: Any) -> float:
            return sum(map(len, found.texts)) / found.seconds

        row = f"| {len(prompts)} | {temperature:g} "
        plain = self._cached(model, prompts, temperature, None)
        self._add(f"{row}| kept keys and values | {speed(plain):.1f} | 1 | | |")
        for loops, tokens in self._drafts:
            found = self._cached(model, prompts, temperature, Drafting(loops, tokens))
            way = "by prediction" if loops is None else f"with {loops} of {self._loops} loops"
            same = sum(text == before for text, before in zip(found.texts, plain.texts, strict=True))
            self._add(
                f"{row}| {tokens} drafted {way} | {speed(found):.1f} | {speed(found) / speed(plain):.2f} | "
                f"{found.accepted / found.drafted:.0%} | {same} of {len(prompts)} |",
            )

    def _cached(self, model: Any, prompts: list[list[int]], temperature: float, drafting: Any) -> Any:
        from cherry_megatron.inference.generate import generate

        options = Generation("benchmark", self._tokens, temperature)
        found = [
            generate(model, prompts, options, self._loops, seed=0, end=-1, drafting=drafting)
            for _ in range(self._repeats)
        ]
        return min(found, key=attrgetter("seconds"))

    def _uncached(self, model: Any, prompts: list[list[int]]) -> float:
        """Seconds for the likeliest tokens, by a pass over all texts for each."""
        texts = [list(prompt) for prompt in prompts]
        device = torch.cuda.current_device()
        model[0].eval()
        started = time.perf_counter()
        with torch.no_grad():
            for _ in range(self._tokens):
                tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long, device=device)
                for row, text in zip(tokens, texts, strict=True):
                    row[: len(text)] = torch.tensor(text, device=device)
                logits = model[0](tokens, torch.arange(tokens.shape[1], device=device).expand_as(tokens), None)
                for text, likely in zip(texts, logits, strict=True):
                    text.append(int(likely[len(text) - 1].argmax()))
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
