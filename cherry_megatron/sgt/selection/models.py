"""The selectors that ask a checkpoint: `top-loss`, `entropy`, and `excess-loss` (Rho-1, arXiv 2404.07965).

A model reads the tokens as they are stored, in windows of megatron.seq-length that follow one another, from the
first token of each piece on: a token is predicted from those before it in its window and the one before the
window, be they of other documents. So a document's first token is predicted from the end of the one before.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cherry_megatron.config import Config, load
from cherry_megatron.data.tokenizer import end_of_document
from cherry_megatron.errors import CherryError
from cherry_megatron.monitor.console import hide_warnings
from cherry_megatron.platform.machine import prepare
from cherry_megatron.runs import checkpoint_to_load
from cherry_megatron.sgt.selection.scratch import SCORES, Scratch
from cherry_megatron.sgt.selection.selectors import LAST
from cherry_megatron.sgt.selection.tokens import Piece, Tokens, open_tokenizer
from cherry_megatron.storage.lineage import identity, read_manifest
from cherry_megatron.workers import worker_processes

LOSS, ENTROPY = "loss", "entropy"
REFERENCE = "reference"
MEASURES = {"top-loss": LOSS, "excess-loss": LOSS, "entropy": ENTROPY}


@dataclass(frozen=True)
class Source:
    """A configuration whose newest checkpoint is asked. A worker process can be given it.

    Attributes:
        path: of the YAML file.
        overrides: keys of it, KEY=VALUE.
        flags: of Megatron.
    """

    path: Path
    overrides: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def load(self) -> Config:
        """The configuration."""
        # The model alone is asked; the marks that its training is to have may not be there yet.
        return replace(load(self.path, self.overrides, self.flags), sgt=None, generation=None)


class ModelScores:
    """Scores of tokens by a checkpoint, on one process; each model in a process of its own, one after the other.

    top-loss     cross-entropy of the token, in nats
    excess-loss  that minus the cross-entropy of the reference checkpoint
    entropy      of the prediction that the token is compared with, in nats

    Args:
        name: one of MEASURES.
        prefix: of the data set.
        source: the model.
        reference: of excess-loss.

    Raises:
        CherryError: if there is no checkpoint, the vocabulary is another, or there are several ranks.
    """

    version = "1"

    def __init__(self, name: str, prefix: Path, source: Source, reference: Source | None) -> None:
        self.name, self._source, self._reference = name, source, reference
        prepare()
        ranks = int(os.environ["WORLD_SIZE"])
        if ranks > 1:
            raise CherryError(f"--selector {name} runs on one process, not on {ranks}; start it without torchrun")
        self.options: dict[str, Any] = {"checkpoint": _asked(source, prefix)}
        if reference is not None:
            self.options["reference"] = _asked(reference, prefix)
        logging.getLogger().setLevel(logging.WARNING)  # megatron.training has made it INFO, for ranks' logs

    def score(self, tokens: Tokens, pieces: list[Piece], scratch: Scratch, workers: int) -> int:
        missing = scratch.missing(pieces, SCORES)
        if self._reference is not None:
            wanted = scratch.missing(missing, REFERENCE)
            _run(self._reference, tokens, scratch, wanted, REFERENCE, LOSS, None)
        minus = None if self._reference is None else REFERENCE
        _run(self._source, tokens, scratch, missing, SCORES, MEASURES[self.name], minus)
        return sum(piece.tokens for piece in missing)


def _asked(source: Source, prefix: Path) -> dict[str, Any]:
    """The checkpoint of a configuration, for the marks' description."""
    config = source.load()
    config.require_one_model("a selector")
    checkpoint = checkpoint_to_load(config)
    if checkpoint is None:
        raise CherryError(f"the run {config.run} has no checkpoint to ask; train it first, or set megatron.load")
    _end(config, prefix)
    manifest = read_manifest(checkpoint)
    return {
        "path": str(checkpoint),
        "identity": None if manifest is None else identity(manifest),
        "window": config.value("seq-length"),
    }


def _end(config: Config, prefix: Path) -> int:
    """The id that ends documents; refuses a model of another vocabulary than the data's."""
    folder = config.value("tokenizer-model")
    if folder is None:
        raise CherryError(f"{config.source}: set megatron.tokenizer-model to the tokenizer of {prefix}")
    return end_of_document(open_tokenizer(Path(folder), prefix), Path(folder))


def _run(
    source: Source,
    tokens: Tokens,
    scratch: Scratch,
    pieces: list[Piece],
    kind: str,
    measure: str,
    minus: str | None,
) -> None:
    """Have a model write an array of each piece. Megatron can be set up once in a process, so it has its own."""
    if pieces:
        with worker_processes(1, _worker, source, tokens, scratch, kind, measure, minus) as submit:
            submit(pieces).result()


def _worker(
    source: Source, tokens: Tokens, scratch: Scratch, kind: str, measure: str, minus: str | None
) -> Callable[[list[Piece]], None]:
    def work(pieces: list[Piece]) -> None:
        hide_warnings()
        tqdm.set_lock(threading.RLock())  # its own, between processes, is reported as lost when this one is killed
        machine = prepare()
        config = source.load()
        from cherry_megatron.pretrain import load_only, pretrain

        extra = {**load_only(config), "num-workers": 0}  # a worker process can have none of its own
        scoring = partial(Scoring, tokens, scratch, pieces, kind, measure, minus)
        pretrain(config, machine, extra, evaluation=scoring)

    return work


class Scoring:
    """Called once with the model in evaluation mode: runs it over the pieces and writes an array of each.

    Args:
        tokens, scratch, pieces: see `Selector.score`.
        kind: of the array.
        measure: LOSS or ENTROPY.
        minus: kind of an array that is taken from it.
        config: from `pretrain`; and what else it gives.
    """

    def __init__(
        self,
        tokens: Tokens,
        scratch: Scratch,
        pieces: list[Piece],
        kind: str,
        measure: str,
        minus: str | None,
        config: Config,
        *_: Any,
    ) -> None:
        self._tokens, self._scratch, self._pieces = tokens, scratch, pieces
        self._kind, self._measure, self._minus = kind, measure, minus
        self._config, self._end = config, _end(config, tokens.prefix)

    def __call__(self, model: list[Any]) -> None:
        total = sum(piece.tokens for piece in self._pieces)
        with tqdm(total=total, unit="tokens", unit_scale=True, desc=self._kind, disable=None) as bar:
            for piece in self._pieces:
                found = []
                for part in self._measured(model[0], piece):
                    found.append(part)
                    bar.update(len(part))
                scores = np.concatenate(found)
                if not np.isfinite(scores).all():
                    raise CherryError(
                        f"{self._config.source}: the checkpoint gives infinite or NaN {self._measure}"
                    )
                if self._minus is not None:
                    scores = scores - self._scratch.read(piece, self._minus)
                if self._kind == SCORES:
                    scores[self._tokens.read(piece.first, piece.tokens) == self._end] = LAST
                self._scratch.write(piece, self._kind, scores)

    def _measured(self, model: Any, piece: Piece) -> Iterator[np.ndarray[Any, Any]]:
        """The measure of the tokens of a piece, batch by batch."""
        window, rows = self._config.value("seq-length"), self._config.value("micro-batch-size")
        before = self._tokens.read(piece.first - 1, 1) if piece.first else [self._end]
        stream = np.concatenate((before, self._tokens.read(piece.first, piece.tokens))).astype(np.int64)
        for start in range(0, piece.tokens, window * rows):
            count = min(window * rows, piece.tokens - start)
            padding = np.full(-count % window, self._end)
            inputs, labels = (
                np.concatenate((stream[at : at + count], padding)).reshape(-1, window) for at in (start, start + 1)
            )
            yield measured(model, inputs, labels, self._measure).reshape(-1)[:count]


def measured(
    model: Any, inputs: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], measure: str
) -> np.ndarray[Any, Any]:
    """Loss of the labels or entropy of the predictions, [b, s] of float32 in nats.

    Args:
        model: Megatron's, whole on this process.
        inputs, labels: [b, s] of int64.
        measure: LOSS or ENTROPY.
    """
    import torch

    device = torch.cuda.current_device()
    tokens, targets = (torch.from_numpy(array).to(device) for array in (inputs, labels))
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    with torch.no_grad():
        if measure == LOSS:
            return model(tokens, positions, None, labels=targets).float().cpu().numpy()
        logits = model(tokens, positions, None)  # [b, s, v]
        # A sequence at a time: in float32 the logits of all of them may not fit.
        rows = [torch.distributions.Categorical(logits=row.float()).entropy() for row in logits]
        return torch.stack(rows).cpu().numpy()
