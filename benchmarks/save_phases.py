"""`cherry` with a clock on what a save does, for save_cost.py:

    python benchmarks/save_phases.py FILE pretrain --config ...

Each call of a phase is a line of FILE: its seconds without those of phases inside it, when it ended on the clock
of the machine, and whether the training's own thread did it.
"""

import functools
import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

# In the order in which a save comes through them. The first has the rest: what no other phase is.
PHASES = (
    "rest", "empty cache", "look for room", "state", "garbage", "validate", "plan", "copy to host",
    "write and hash", "metadata", "publish", "tracker",
)  # fmt: skip


class Clock:
    """Times functions into a file of lines."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._here = file, threading.local()

    def on(self, owner: Any, name: str, phase: str) -> None:
        """Time a function that stands in a module or class under a name."""
        setattr(owner, name, self.timed(getattr(owner, name), phase))

    def timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            inside = self._here.__dict__.setdefault("inside", [])
            inside.append(0.0)
            began = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                took = (now := time.monotonic()) - began
                own = took - inside.pop()
                if inside:
                    inside[-1] += took
                main = threading.current_thread() is threading.main_thread()
                line = {"phase": phase, "seconds": own, "ended": now, "main": main}
                self._file.write(json.dumps(line) + "\n")

        return call


def install(clock: Clock) -> None:
    """Put the clock on all phases."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import state_dict_saver
    from megatron.training import checkpointing, training

    from cherry_megatron.keeping import Keeping
    from cherry_megatron.platform import saving, staging

    places = (
        (training, "save_checkpoint_and_time"), (torch.cuda, "empty_cache"), (Keeping, "_begins"),
        (checkpointing, "generate_state_dict"), (gc, "collect"), (serialization, "save_preprocess"),
        (state_dict_saver, "save_state_dict_async_plan"), (staging.Staging, "staged"), (saving, "write_shards"),
        (saving, "_finish"), (saving, "_publish"), (Keeping, "_counts"),
    )  # fmt: skip
    for (owner, name), phase in zip(places, PHASES, strict=True):
        clock.on(owner, name, phase)


def main() -> None:
    from cherry_megatron.cli import main as cherry
    from cherry_megatron.platform.machine import prepare

    prepare()  # before Megatron is imported
    with Path(sys.argv[1]).open("w", buffering=1, encoding="utf-8") as file:
        install(Clock(file))
        cherry(sys.argv[2:])


if __name__ == "__main__":
    main()
