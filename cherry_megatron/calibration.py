"""`cherry calibrate`: what heads and neurons put out on training text, for `compress-depth --align activations`.

Every data-parallel rank reads the same text; every pipeline stage writes the layers that it holds.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args
from torch.utils.data import DataLoader

from cherry_megatron.config import Config
from cherry_megatron.data.paths import data_prefixes
from cherry_megatron.errors import CherryError
from cherry_megatron.files import cannot_write, hidden_folder, new_folder, refuse_taken, sync_folder
from cherry_megatron.model.pattern import ATTENTION
from cherry_megatron.model.stack import RecurrentStack
from cherry_megatron.monitor.progress import Progress
from cherry_megatron.platform.machine import Machine
from cherry_megatron.pretrain import load_only, pretrain
from cherry_megatron.runs import checkpoint_to_load
from cherry_megatron.storage.checkpoint import hash_values
from cherry_megatron.storage.lineage import read_manifest
from cherry_megatron.surgery.activations import CALIBRATION, calibration_text, file_name

SPARE = 1 << 20  # for what is no activation
LARGEST = float(np.finfo(np.float16).max)


def calibrate(config: Config, machine: Machine, output: Path, tokens: int, show_all: bool = False) -> None:
    """Run the newest checkpoint over the beginning of its training text and write what is recorded to a folder.

    Args:
        config: of the model that will be compressed.
        machine: from `prepare()`.
        output: the folder to write; see surgery/activations.py.
        tokens: how many to record.
        show_all: show Megatron's own output too.

    Raises:
        CherryError: if there is no checkpoint, the model has loops or is tensor-parallel, or `output` is taken.
    """
    if tokens < 1:
        raise CherryError(f"--tokens {tokens} must be a positive number")
    config.require_one_model("cherry calibrate")
    config.require_no_experts("cherry calibrate")
    if max(config.recurrence.loops, config.recurrence.parsed.loops) > 1:
        raise CherryError(
            f"{config.source}: recurrence.pattern has loops; calibrate the model that is going to be compressed"
        )
    tensor = config.value("tensor-model-parallel-size")
    if tensor > 1:
        raise CherryError(
            f"{config.source}: megatron.tensor-model-parallel-size {tensor} divides heads and neurons over ranks; "
            "use 1, which loads a checkpoint of any layout"
        )
    checkpoint = checkpoint_to_load(config)
    if checkpoint is None:
        raise CherryError(
            f"the run {config.run} has no checkpoint to calibrate; train it first, or set megatron.load"
        )
    refuse_taken(output)
    pretrain(
        config, machine, load_only(config), show_all, partial(Recording, output.absolute(), tokens, checkpoint)
    )


class Recording:
    """Called once with the model in evaluation mode: runs it over the text and writes the folder.

    Args:
        output, tokens: as in `calibrate`.
        checkpoint: the one that was loaded.
        config, progress, run_micro_batch: from `pretrain`.
    """

    def __init__(
        self,
        output: Path,
        tokens: int,
        checkpoint: Path,
        config: Config,
        progress: Progress,
        run_micro_batch: Callable[..., Any],
    ) -> None:
        self._output, self._tokens, self._checkpoint = output, tokens, checkpoint
        self._config, self._progress, self._run = config, progress, run_micro_batch

    def __call__(self, model: list[torch.nn.Module]) -> None:
        args = get_args()
        there = args.seq_length * (args.train_samples or args.train_iters * args.global_batch_size)
        if self._tokens > there:
            raise CherryError(f"--tokens {self._tokens} is more than the {there} of the training; use fewer")
        recorded = self._record(model)
        shape, symbols = self._config.shape, self._config.recurrence.parsed.symbols
        widths = sum(shape.heads * shape.head_size if symbol == ATTENTION else shape.ffn for symbol in symbols)
        needed = widths * self._tokens * np.dtype(np.float16).itemsize + SPARE
        first = torch.distributed.get_rank() == 0
        with new_folder(self._output, needed) if first else nullcontext(hidden_folder(self._output)) as folder:
            torch.distributed.barrier()  # the folder is there
            if mpu.get_data_parallel_rank() == 0:
                for inputs in recorded:
                    inputs.save(folder)
            torch.distributed.barrier()  # and so is all that belongs into it
            if first:
                self._publish(folder)

    def _record(self, model: list[torch.nn.Module]) -> list["Inputs"]:
        """The inputs of this stage's output projections and second linear layers, on the first tokens."""
        args = get_args()
        stack: RecurrentStack = get_attr_wrapped_model(model[0], "decoder")
        recorded, hooks = [], []
        for layer, sublayers in stack.stored_layers():
            for place, (symbol, sublayer) in enumerate(sublayers):
                linear = sublayer.self_attention.linear_proj if symbol == ATTENTION else sublayer.mlp.linear_fc2
                recorded.append(Inputs(file_name(layer, place, symbol), self._tokens))
                hooks.append(linear.register_forward_pre_hook(recorded[-1].add))
        text = self._progress.train_dataset  # None where a stage reads none
        each = args.eval_micro_batch_size
        get_forward_backward_func()(
            forward_step_func=self._run,
            data_iterator=None if text is None else iter(DataLoader(text, batch_size=each)),
            model=model,
            num_microbatches=-(-self._tokens // (each * args.seq_length)),
            seq_length=args.seq_length,
            micro_batch_size=each,
            forward_only=True,
        )
        for hook in hooks:
            hook.remove()
        return recorded

    def _publish(self, folder: Path) -> None:
        layers = len(self._config.recurrence.parsed.layers)
        files = {path.name: hash_values(np.load(path, mmap_mode="r")) for path in sorted(folder.glob("*.npy"))}
        data = [prefix for _, prefix in data_prefixes(self._config)]
        manifest = read_manifest(self._checkpoint)
        text = calibration_text(self._checkpoint, manifest, layers, self._tokens, data, files)
        with (folder / CALIBRATION).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)
        folder.rename(self._output)
        sync_folder(self._output.parent)
        self._progress.say(f"{self._output}: {self._tokens:,} tokens through {layers} layers of {self._checkpoint}")


class Inputs:
    """The first inputs of a linear layer.

    Args:
        name: of the file to be.
        tokens: how many.
    """

    def __init__(self, name: str, tokens: int) -> None:
        self._name, self._missing = name, tokens
        self._parts: list[torch.Tensor] = []

    def add(self, _module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        """A forward pre-hook; the input is [s, b, width].

        Float16 has three digits, which is enough to compare. What is larger than it can hold is clipped: the
        sign and that it is large remain.

        Raises:
            CherryError: if an input is not finite.
        """
        rows = arguments[0].transpose(0, 1).flatten(0, 1)[: self._missing]
        if not torch.isfinite(rows).all():
            raise CherryError(f"{self._name}: infinite or NaN activations; this checkpoint cannot be calibrated")
        self._missing -= len(rows)
        self._parts.append(rows.float().clamp(-LARGEST, LARGEST).half().cpu())

    def save(self, folder: Path) -> None:
        """Write [tokens, width] as float16."""
        path = folder / self._name
        try:
            with path.open("wb") as file:
                np.save(file, torch.cat(self._parts).numpy())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(path, error) from None
