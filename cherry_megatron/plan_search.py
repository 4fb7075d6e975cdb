"""`cherry compress-depth --plan search`: scores groupings by the loss of the compressed model before any training.

The text is the first `evaluation.batches` global batches of the training split: held-out text stays held out. The
model is built and laid out as training would, on one process or under torchrun.

Memory: beside the compressed model every rank keeps in CPU memory its share of every source layer, as stored: the
source's layers divided by the tensor-parallel size, whatever its pipeline stage holds. Every rank reads the source
once, tensor by tensor.
"""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from tqdm import tqdm

from cherry_megatron.config import Config
from cherry_megatron.errors import CherryError
from cherry_megatron.flags import megatron_arguments
from cherry_megatron.model.pattern import Pattern
from cherry_megatron.monitor.evaluation import mean_losses
from cherry_megatron.monitor.progress import Progress
from cherry_megatron.platform.machine import Machine
from cherry_megatron.pretrain import pretrain
from cherry_megatron.shares import Share, shares
from cherry_megatron.storage.checkpoint import Checkpoint, Tensor, open_checkpoint
from cherry_megatron.storage.layers import ROLES, Source, source_layers, sublayer_prefixes
from cherry_megatron.storage.numbers import Mean, to_float
from cherry_megatron.storage.records import Array
from cherry_megatron.surgery.depth import same
from cherry_megatron.surgery.grouping import groups_text
from cherry_megatron.surgery.search import Found, Groups, Search


def find_groups(load: Path, config: Config, machine: Machine, budget: int, seed: int) -> Found:
    """Search. Every rank must call it, and every rank gets the same answer.

    Args:
        load: the source, see `open_checkpoint`; it fits the configuration, see `plan_compression`.
        config: of the compressed model.
        machine: from `prepare()`, which must have been called.
        budget, seed: see Search.

    Raises:
        CherryError: if layers differ in kind, the training split is too short, or no loss is finite.
    """
    config.require_one_model("--plan search")
    config.require_no_experts("--plan search")
    source = open_checkpoint(load)
    layers = source_layers(source)
    kinds = {"".join(sublayer.symbol for sublayer in layer) for layer in layers.layers}
    if len(kinds | set(config.recurrence.parsed.layers)) > 1:
        raise CherryError(
            f"--plan search needs layers of one kind; {source.folder} and {config.source} have several"
        )
    search = Search(len(layers.layers), config.recurrence, budget, seed)
    # Megatron looks at held-out text first, with whatever weights there are.
    extra = {"skip-train": True, "no-load-optim": True, "no-load-rng": True, "eval-iters": 1}
    evaluation = partial(Searching, search, source, layers, sys.stdout)
    searching: Searching = pretrain(_without_start(config), machine, extra, evaluation=evaluation)
    assert searching.found is not None
    if not math.isfinite(searching.found.loss):
        raise CherryError(f"--plan search: no grouping of {source.folder} gives a finite loss")
    return searching.found


def _without_start(config: Config) -> Config:
    """The configuration without what it starts from, in a folder of its own: the run may have checkpoints."""
    # The training split comes in training's micro-batches.
    batch = {
        "eval-micro-batch-size": config.value("micro-batch-size"),
        "eval-global-batch-size": config.value("global-batch-size"),
    }
    return replace(
        config,
        run=config.run / "search",
        distillation=None,
        megatron={key: value for key, value in config.megatron.items() if key not in ("load", "finetune")},
        flags=(*config.flags, *megatron_arguments(batch)),
    )


class Searching:
    """Megatron's `non_loss_data_func`: called with the model, it searches.

    Attributes:
        found: the result, once it has been called.
    """

    def __init__(
        self,
        search: Search,
        source: Checkpoint,
        layers: Source,
        terminal: TextIO,
        config: Config,
        progress: Progress,
        run_micro_batch: Any,
    ) -> None:
        self._search, self._source, self._layers, self._terminal = search, source, layers, terminal
        self._config, self._progress, self._run = config, progress, run_micro_batch
        self._best, self._scored = math.inf, 0
        self.found: Found | None = None

    def __call__(self, model: list[torch.nn.Module]) -> None:
        args, batches = get_args(), self._config.evaluation.batches
        steps = args.train_iters or args.train_samples // args.global_batch_size
        if batches > steps:
            raise CherryError(
                f"{self._config.source}: evaluation.batches {batches} is more than the {steps} batches of the "
                "training, on whose text groupings are scored"
            )
        compressed = Compressed(unwrap_model(model[0]), self._source, self._layers, self._config.recurrence.parsed)
        quiet = True if args.rank else None
        with tqdm(total=self._search.budget, unit="grouping", desc="search", disable=quiet) as bar:
            self.found = self._search.run(partial(self._score, model, compressed, bar))

    def _score(self, model: list[torch.nn.Module], compressed: "Compressed", bar: Any, groups: Groups) -> float:
        """The loss of a grouping, the same on every rank; a line for each that is the best yet."""
        compressed.write(groups)
        means = mean_losses(model, self._progress.train_dataset, self._config.evaluation.batches, self._run)
        loss = means.get("lm loss", math.nan)  # the last pipeline stage has it
        # Ranks that see different losses would walk apart.
        shared = torch.tensor([loss], dtype=torch.float64, device=torch.cuda.current_device())
        torch.distributed.broadcast(shared, torch.distributed.get_world_size() - 1)
        loss = shared.item()
        self._scored += 1
        bar.update()
        if loss < self._best:
            self._best = loss
            if get_args().rank == 0:
                where = f"{self._scored:>4}/{self._search.budget}"
                bar.write(f"search {where}  loss {loss:.6f}  --groups {groups_text(groups)}", file=self._terminal)
        return loss


class Compressed:
    """This rank's part of the compressed model, whose layers are written anew for each grouping.

    What is outside the layers is loaded once; per-loop vectors stay as they begin.

    Args:
        model: a model that was just built.
        source: what it is made from.
        layers: of the source, all of one kind.
        pattern: of the model.

    Raises:
        CherryError: if sizes differ.
    """

    def __init__(self, model: torch.nn.Module, source: Checkpoint, layers: Source, pattern: Pattern) -> None:
        self._source, self._layers = source, layers
        self._shares: dict[int, list[tuple[Share, int, str]]] = {}  # of a layer: with sublayer and role
        self._parts: dict[tuple[str, tuple[slice, ...]], Array] = {}
        self._written: dict[int, tuple[int, ...]] = {}
        places = {
            prefix + role: (layer, place, role)
            for layer, sublayers in enumerate(sublayer_prefixes(pattern))
            for place, (symbol, prefix) in enumerate(sublayers)
            for role in ROLES[symbol]
        }
        wanted: dict[tuple[int, str], list[Share]] = {}
        for share in shares(model):
            if share.key in places:
                layer, place, role = places[share.key]
                self._shares.setdefault(layer, []).append((share, place, role))
                wanted.setdefault((place, role), []).append(share)
            elif share.key in layers.top:
                name = layers.top[share.key]
                self._check(share, source.tensors[name])
                share.fill(source.tensors[name].dtype, source.read(name)[share.cut])
        for (place, role), held in wanted.items():
            self._keep(self._names(place, role), held)

    def write(self, groups: Groups) -> None:
        """Make every layer the mean of its group, as `compression` and a training that loads it would."""
        for layer, held in self._shares.items():
            if self._written.get(layer) == groups[layer]:
                continue
            for share, place, role in held:
                names = self._names(place, role)
                dtype = self._source.tensors[names[0]].dtype
                mean = Mean(share.key, dtype)
                for member in groups[layer]:
                    mean.add(to_float(dtype, self._parts[names[member], share.cut]))
                share.fill(dtype, mean.result())
            self._written[layer] = groups[layer]

    def _names(self, place: int, role: str) -> list[str]:
        """A tensor's name in each source layer."""
        return [layer[place].names[role] for layer in self._layers.layers]

    def _keep(self, names: list[str], held: list[Share]) -> None:
        """Read a tensor of every source layer; layers of the model mostly have the same share of it."""
        stored = same(self._source, names)
        for share in held:
            self._check(share, stored)
        for name in names:
            values = self._source.read(name)
            for share in held:
                if (name, share.cut) not in self._parts:
                    self._parts[name, share.cut] = values[share.cut].copy()

    def _check(self, share: Share, stored: Tensor) -> None:
        if stored.shape != share.shape:
            raise CherryError(
                f"{self._source.folder}: {stored.name} is {list(stored.shape)}, but the compressed model wants "
                f"{list(share.shape)}; correct the sizes under megatron"
            )
