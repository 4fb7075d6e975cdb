"""Tokens a second of generation: whole passes, kept keys and values, and drafts with fewer loops.

    python benchmarks/generate_speed.py --config configs/tiny_recover.yaml [--tokens 64] [--repeats 3]

The run must have been trained (`make demo` for this configuration). All variants run in one process on one
checkpoint, each so often, and the fastest time counts; each text is seen to be the same in all.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import torch

from cherry_megatron.config import Generation, load
from cherry_megatron.inference.prompts import Prompts, encode_prompts, read_prompts
from cherry_megatron.platform.machine import prepare

DRAFTS = ((1, 1), (1, 2), (1, 4), (2, 4), (4, 4))  # (loops, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=Path("configs/prompts_ko.txt"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    machine, config = prepare(), load(given.config)
    from cherry_megatron.pretrain import load_only, pretrain

    prompts = encode_prompts(config, read_prompts(given.prompts), given.tokens, str(given.prompts))
    rows: list[str] = []
    measured = partial(Measured, prompts, given.tokens, given.repeats, rows.append)
    pretrain(config, machine, load_only(config), evaluation=measured)
    print("| texts | temperature | variant | tokens/s | drafts accepted |\n|---|---|---|---|---|")
    print("\n".join(rows))


class Measured:
    """Called with the model; adds a row of the table for each variant."""

    def __init__(
        self,
        prompts: Prompts,
        tokens: int,
        repeats: int,
        add: Callable[[str], None],
        config: Any,
        *_from_pretrain: Any,
    ) -> None:
        self._prompts, self._tokens, self._repeats, self._add = prompts, tokens, repeats, add
        self._loops = config.recurrence.loops

    def __call__(self, model: list[torch.nn.Module]) -> None:
        from cherry_megatron.inference.draft import Drafting

        kept = [None, *(Drafting(*draft) for draft in DRAFTS if draft[0] < self._loops)]
        for count in (1, len(self._prompts.ids)):
            prompts = self._prompts.ids[:count]
            whole, seconds = min((self._uncached(model, prompts) for _ in range(self._repeats)), key=itemgetter(1))
            self._add(f"| {count} | 0 | whole passes | {count * self._tokens / seconds:.1f} | |")
            for temperature in (0.0, 0.8):
                texts = None
                for drafting in kept:
                    found = self._cached(model, prompts, temperature, drafting)
                    name = "kept keys and values"
                    if drafting is not None:
                        name = f"{drafting.tokens} drafted with {drafting.loops} of {self._loops} loops"
                    share = f"{found.accepted / found.drafted:.0%}" if found.drafted else ""
                    speed = sum(map(len, found.texts)) / found.seconds
                    self._add(f"| {count} | {temperature:g} | {name} | {speed:.1f} | {share} |")
                    texts = texts or found.texts
                    assert found.texts == texts, f"{name}: another text"
                assert temperature or texts == whole, "kept keys and values: another text"

    def _cached(self, model: Any, prompts: list[list[int]], temperature: float, drafting: Any) -> Any:
        from cherry_megatron.inference.generate import generate

        options = Generation("benchmark", self._tokens, temperature)
        found = [
            generate(model, prompts, options, self._loops, seed=0, end=-1, drafting=drafting)
            for _ in range(self._repeats)
        ]
        return min(found, key=attrgetter("seconds"))

    def _uncached(self, model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
        """The likeliest tokens by a pass over all texts for each, and the seconds."""
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
        seconds = time.perf_counter() - started
        new = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
        return new, seconds


if __name__ == "__main__":
    main()
