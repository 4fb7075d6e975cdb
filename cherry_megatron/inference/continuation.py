"""`cherry generate`: a run's newest checkpoint goes on from prompts."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cherry_megatron.config import Config
from cherry_megatron.errors import CherryError
from cherry_megatron.evaluate import with_loops
from cherry_megatron.inference.draft import Drafting
from cherry_megatron.inference.generate import Generated, generate
from cherry_megatron.inference.options import Generation
from cherry_megatron.inference.printing import Printer
from cherry_megatron.inference.prompts import Prompts, encode_prompts
from cherry_megatron.inference.rows import Row
from cherry_megatron.monitor.progress import Progress
from cherry_megatron.platform.machine import Machine
from cherry_megatron.pretrain import load_only, pretrain
from cherry_megatron.runs import checkpoint_to_load
from cherry_megatron.section_rules import check_generation


def continue_prompts(
    config: Config,
    machine: Machine,
    texts: list[str],
    options: dict[str, Any],
    seed: int = 0,
    loops: int | None = None,
    drafting: Drafting | None = None,
    stream: bool = False,
    show_all: bool = False,
) -> Generated:
    """Load the checkpoint, continue the prompts, print them with what follows, and on stderr the speed.

    Args:
        config: the run's configuration.
        machine: from `prepare()`.
        texts: prompts.
        options: keys of the `generation` section, in place of the configuration's.
        seed: of the draws.
        loops: of the model; more than the trained number is allowed.
        drafting: how drafts are made, if any are.
        stream: print while texts grow.
        show_all: show Megatron's own output too.

    Raises:
        CherryError: if the run has no checkpoint, a prompt cannot be continued, or an option is out of range.
    """
    chosen = replace(config.generation or Generation(prompts="--prompt"), **options)
    if loops is not None and loops < 1:
        raise CherryError(f"--loops {loops} must be a positive number")
    loops = loops or config.recurrence.loops
    if drafting is not None:
        drafting.check(loops, config.mtp.depths)
    check_generation(config)
    prompts = encode_prompts(config, texts, chosen.tokens, "--prompt")
    if checkpoint_to_load(config) is None:
        raise CherryError(
            f"the run {config.run} has no checkpoint to generate with; train it first, or set megatron.load"
        )
    config = replace(with_loops(config, loops), generation=None)
    asked = partial(Continuation, prompts, chosen, seed, drafting, stream)
    continuation: Continuation = pretrain(config, machine, load_only(config), show_all, asked)
    assert continuation.generated is not None
    return continuation.generated


class Continuation:
    """Called with the model in evaluation mode.

    Attributes:
        generated: what followed the prompts, once it has been called.

    Args:
        prompts, options, seed, drafting, stream: what to continue, and how.
        config: of the model, with the number of loops that is walked.
        progress: prints.
        Others: from `pretrain`.
    """

    def __init__(
        self,
        prompts: Prompts,
        options: Generation,
        seed: int,
        drafting: Drafting | None,
        stream: bool,
        config: Config,
        progress: Progress,
        _run_micro_batch: Callable[..., Any],
    ) -> None:
        self._prompts, self._stream = prompts, stream
        self._continue = partial(
            generate,
            prompts=prompts.ids,
            options=options,
            loops=config.recurrence.loops,
            seed=seed,
            end=prompts.end,
            drafting=drafting,
        )
        self._write = partial(progress.say, end="")
        self.generated: Generated | None = None

    def __call__(self, model: list[torch.nn.Module]) -> None:
        prints = torch.distributed.get_rank() == 0
        printer = Printer(self._prompts, self._write)

        def heard(row: Row) -> None:
            if prints and self._stream:
                printer.tell(row.number, row.new, row.over)

        self.generated = self._continue(model, heard=heard)
        if prints:
            # What is printed already is not printed again; other replicas' texts are known only now.
            for number, tokens in enumerate(self.generated.texts):
                printer.tell(number, tokens, over=True)
            print(self.generated.speed(), file=sys.stderr)
