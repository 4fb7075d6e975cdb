"""`cherry generate`: a run's newest checkpoint goes on from prompts."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cherry_megatron.config import Config, Generation
from cherry_megatron.errors import CherryError
from cherry_megatron.evaluate import with_loops
from cherry_megatron.inference.generate import generate
from cherry_megatron.inference.prompts import Prompts, encode_prompts, visible
from cherry_megatron.monitor.progress import Progress
from cherry_megatron.platform.machine import Machine
from cherry_megatron.pretrain import load_only, pretrain
from cherry_megatron.runs import checkpoint_to_load


def continue_prompts(
    config: Config,
    machine: Machine,
    texts: list[str],
    options: dict[str, Any],
    seed: int = 0,
    loops: int | None = None,
    show_all: bool = False,
) -> list[str]:
    """Load the checkpoint, continue the prompts, print them with what follows.

    Args:
        config: the run's configuration.
        machine: from `prepare()`.
        texts: prompts.
        options: keys of the `generation` section, in place of the configuration's.
        seed: of the draws.
        loops: of the model; more than the trained number is allowed.
        show_all: show Megatron's own output too.

    Returns:
        The continuations.

    Raises:
        CherryError: if the run has no checkpoint, or a prompt cannot be continued.
    """
    config.require_one_model("cherry generate")
    chosen = replace(config.generation or Generation(prompts="--prompt"), **options)
    if loops is not None and loops < 1:
        raise CherryError(f"--loops {loops} must be a positive number")
    prompts = encode_prompts(config, texts, chosen.tokens, "--prompt")
    if checkpoint_to_load(config) is None:
        raise CherryError(
            f"the run {config.run} has no checkpoint to generate with; train it first, or set megatron.load"
        )
    config = replace(with_loops(config, loops or config.recurrence.loops), generation=None)
    continuation: Continuation = pretrain(
        config, machine, load_only(config), show_all, partial(Continuation, prompts, chosen, seed)
    )
    return continuation.texts


class Continuation:
    """Called with the model in evaluation mode.

    Attributes:
        texts: what followed each prompt, once it has been called.

    Args:
        prompts, options, seed: what to continue, and how.
        progress: prints.
        Others: from `pretrain`.
    """

    def __init__(
        self,
        prompts: Prompts,
        options: Generation,
        seed: int,
        _config: Config,
        progress: Progress,
        _run_micro_batch: Callable[..., Any],
    ) -> None:
        self._prompts, self._options, self._seed, self._progress = prompts, options, seed, progress
        self.texts: list[str] = []

    def __call__(self, model: list[torch.nn.Module]) -> None:
        prompts, options = self._prompts, self._options
        found = generate(model, prompts.ids, options.tokens, options.temperature, self._seed, prompts.end)
        self.texts = [prompts.text_of(tokens) for tokens in found]
        if torch.distributed.get_rank() == 0:
            for prompt, text in zip(prompts.texts, self.texts, strict=True):
                self._progress.say(f"> {visible(prompt)}\n{visible(text)}\n")
