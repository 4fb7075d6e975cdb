"""`cherry evaluate`: the held-out loss of a run's newest checkpoint, loop count by loop count."""

import sys
from dataclasses import replace
from functools import partial

from cherry_megatron.checkpoints import other_losses
from cherry_megatron.config import Config
from cherry_megatron.errors import CherryError
from cherry_megatron.monitor.evaluation import LoopEvaluation
from cherry_megatron.platform.machine import Machine
from cherry_megatron.pretrain import pretrain
from cherry_megatron.runs import checkpoint_to_load


def evaluate(
    config: Config, machine: Machine, loops: list[int] | None = None, show_all: bool = False
) -> LoopEvaluation:
    """Load the checkpoint, evaluate the validation split, print the table.

    Args:
        config: the run's configuration.
        machine: from `prepare()`.
        loops: numbers of loops; more than the trained number is allowed.
        show_all: show Megatron's own output too.

    Raises:
        CherryError: if the run has no checkpoint.
    """
    if checkpoint_to_load(config) is None:
        raise CherryError(
            f"the run {config.run} has no checkpoint to evaluate; train it first, or set megatron.load"
        )
    differing = other_losses(config)
    if differing:
        verb = "differs" if len(differing) == 1 else "differ"
        print(
            f"note: {', '.join(differing)} {verb} from training: the losses do not compare with those of the run, "
            "and are not recorded there",
            file=sys.stderr,
        )
    if loops:
        config = replace(config, evaluation=replace(config.evaluation, loops=tuple(loops)))
    config = with_loops(config, max(config.evaluation.loop_counts(config.recurrence.loops)))
    extra = {"skip-train": True, "no-load-optim": True, "no-load-rng": True}
    evaluation: LoopEvaluation = pretrain(
        config, machine, extra, show_all, partial(LoopEvaluation, recorded=not differing)
    )
    if not evaluation.losses:
        raise CherryError(f"{config.source}: megatron.split leaves no validation text to evaluate on")
    return evaluation


def with_loops(config: Config, loops: int) -> Config:
    """A configuration of the same model, not to be trained, that walks so many loops."""
    recurrence = replace(
        config.recurrence,
        loops=loops,
        random_loops=None,
        backprop_loops=None,
        stages=config.recurrence.stages if loops == config.recurrence.loops else None,
    )
    return replace(config, recurrence=recurrence)
