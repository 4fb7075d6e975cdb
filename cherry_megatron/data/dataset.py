"""Megatron's GPTDataset whose samples also say which of their targets are marked.

Marks lie in Megatron's own format with the documents of the tokens (`marks.py`), so the sample of the same
number, read from them instead, holds the mark of every token of the sample.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.data.marks import ANSWERS, has_answers, marks_prefix, read_marks, verify_marks
from cherry_megatron.data.shuffle import DocumentOrder, Shuffle, ShuffledDocuments
from cherry_megatron.errors import CherryError

COUNTED_TOKENS = 1 << 24  # at a time


@dataclass
class MarkedDatasetConfig(GPTDatasetConfig):
    """GPTDatasetConfig, and what is wanted of the marks.

    Attributes:
        selection: name of the marks that become `selected`; none are read if None.
        shuffle: what is permuted within each document.
        context: targets among the first so many tokens of a sample have a `loss_mask` of 0.
    """

    selection: str | None = None
    shuffle: Shuffle = "none"
    context: int = 0


class MarkedDataset(GPTDataset):
    """GPTDataset, with the marks of the targets. Without marks and shuffle, exactly GPTDataset.

    `selected` [s] float32 is 1 where the target is marked by `config.selection`. Where the tokens have
    `answers`, `loss_mask` is 0 for every target that is not part of one.
    """

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: MarkedDatasetConfig) -> Any:
        """The tokens, once their marks are seen to belong to them.

        Raises:
            CherryError: if marks are missing, incomplete, or belong to other tokens.
        """
        for name in _mark_names(dataset_path, config):
            read_marks(Path(dataset_path), name)
        return GPTDataset.build_low_level_dataset(dataset_path, config)

    def __init__(
        self,
        indexed_dataset: Any,
        dataset_path: str,
        indexed_indices: np.ndarray[Any, Any],
        num_samples: int | None,
        index_split: Any,
        config: MarkedDatasetConfig,
    ) -> None:
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
        marks = {
            name: IndexedDataset(str(marks_prefix(Path(dataset_path), name)), mmap=config.mmap_bin_files)
            for name in _mark_names(dataset_path, config)
        }
        if config.shuffle != "none":
            order = _document_order(indexed_dataset, config)
            self.dataset = ShuffledDocuments(indexed_dataset, order)
            marks = {name: ShuffledDocuments(documents, order) for name, documents in marks.items()}
        self._marks = {name: self._read_from(documents) for name, documents in marks.items()}

    def _read_from(self, documents: Any) -> "MarkedDataset":
        """The same samples of other contents; what Megatron pads a sample with is not marked."""
        other = copy.copy(self)
        other.dataset = documents
        other._pad_token_id = 0
        return other

    def __getitem__(self, idx: int | None) -> dict[str, Any]:
        sample: dict[str, Any] = super().__getitem__(idx)
        if ANSWERS in self._marks:
            sample["loss_mask"] = sample["loss_mask"] * self._marks_of_targets(ANSWERS, idx)
        if self.config.context > 1:  # the sample's first token is no target anyway; Megatron shares its masks
            sample["loss_mask"] = sample["loss_mask"].clone()
            sample["loss_mask"][: self.config.context - 1] = 0.0
        if self.config.selection is not None:
            sample["selected"] = self._marks_of_targets(self.config.selection, idx)
        return sample

    @property
    def marks(self) -> list[str]:
        """The names of the marks that are read."""
        return list(self._marks)

    def stored(self, idx: int, marks: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        """A sample as it is stored, for those who make masks of it themselves.

        Args:
            idx: of the sample.
            marks: names of some; answers that are not there are everywhere, as what has none is learned from whole.

        Returns:
            Its tokens [s + 1], and the marks of each of these names.
        """
        tokens, _, _ = self._query_document_sample_shuffle_indices(idx)
        found = [
            self._marks[name]._query_document_sample_shuffle_indices(idx)[0]
            if name in self._marks
            else np.ones_like(tokens)
            for name in marks
        ]
        return [tokens, *found]

    def _marks_of_targets(self, name: str, idx: int | None) -> torch.Tensor:
        marks, _, _ = self._marks[name]._query_document_sample_shuffle_indices(idx or 0)
        return torch.from_numpy(marks[1:].astype(np.float32))

    @property
    def selection(self) -> Path:
        """The path prefix of the selection's marks."""
        return marks_prefix(Path(self.dataset_path), self.config.selection)

    def rho_counts(self) -> tuple[int, int]:
        """How many targets of this split's documents are selected, and how many there are.

        Every token counts as a target once, as in an epoch, if `loss_mask` is 1 for it; at the beginning of a
        sample (`config.context`) any token may lie, so that does not matter here.

        Returns:
            Selected targets, all targets.

        Raises:
            CherryError: if marks are damaged.
        """
        for name in self._marks:
            verify_marks(Path(self.dataset_path), name)
        selected = eligible = 0
        for first, last in self._document_ranges():
            counts = self._is_target(first, last)
            marked = self._contents(self._marks[self.config.selection].dataset, first, last)
            eligible += int(np.count_nonzero(counts))
            selected += int(np.count_nonzero(counts & (marked != 0)))
        return selected, eligible

    def _document_ranges(self) -> Iterator[tuple[int, int]]:
        """The split's documents [first, last), of about COUNTED_TOKENS tokens each time."""
        start = int(self.indices[0])
        ends = np.cumsum(self.dataset.sequence_lengths[self.indices], dtype=np.int64)
        steps = np.arange(COUNTED_TOKENS, ends[-1], COUNTED_TOKENS)
        borders = np.unique([0, *(np.searchsorted(ends, steps) + 1), len(ends)])
        for first, last in pairwise(borders):
            yield start + int(first), start + int(last)

    def _contents(self, dataset: Any, first: int, last: int) -> np.ndarray[Any, Any]:
        """Of documents [first, last), one after the other."""
        if isinstance(dataset, ShuffledDocuments):
            if self.config.eod_mask_loss:  # it masks what follows a document's end, whatever was moved there
                return np.concatenate([dataset.get(document) for document in range(first, last)])
            dataset = dataset.documents
        index = dataset.index
        count = int(index.sequence_lengths[first:last].sum(dtype=np.int64))
        found: np.ndarray[Any, Any] = dataset.bin_reader.read(
            index.dtype, count, int(index.sequence_pointers[first])
        )
        return found

    def _is_target(self, first: int, last: int) -> np.ndarray[Any, Any]:
        """Which tokens of documents [first, last) have a `loss_mask` of 1 as targets."""
        tokens = self._contents(self.dataset, first, last)
        found: np.ndarray[Any, Any] = tokens != self._pad_token_id
        if ANSWERS in self._marks:
            found &= self._contents(self._marks[ANSWERS].dataset, first, last) != 0
        if self.config.eod_mask_loss:
            found[1:] &= tokens[:-1] != self.config.tokenizer.eod
            found[0] = False  # another document's end stands before it
        return found


# Megatron names the cached order of the samples by the class: with marks or without, it is the same one.
MarkedDataset.__name__ = GPTDataset.__name__


def rho_of(dataset: Any) -> float:
    """The selected share of all targets of a split; of a blend, as the data sets take part in it.

    A sample has the same number of targets whatever data set it is from, so those of a data set count by
    its share of the samples, and by the share of its tokens that are targets, or selected.

    Args:
        dataset: MarkedDataset with a selection, or a BlendedDataset of such.

    Raises:
        CherryError: if nothing is selected.
    """
    if isinstance(dataset, BlendedDataset):
        parts = dataset.datasets
        samples = np.bincount(dataset.dataset_index, minlength=len(parts)).tolist()
    else:
        parts, samples = [dataset], [1]
    selected = eligible = 0.0
    for part, count in zip(parts, samples, strict=True):
        share = count / part._get_num_tokens_per_epoch()
        of_part = part.rho_counts()
        selected += share * of_part[0]
        eligible += share * of_part[1]
    if not selected:
        names = ", ".join(str(part.selection) for part in parts)
        raise CherryError(
            f"the marks {names} select no target of the {parts[0].index_split.name} split; "
            "select more, or change megatron.split"
        )
    return selected / eligible


def _mark_names(prefix: str, config: MarkedDatasetConfig) -> list[str]:
    """The marks that are read beside the tokens."""
    names = [] if config.selection is None else [config.selection]
    return [*names, ANSWERS] if ANSWERS not in names and has_answers(Path(prefix)) else names


def _document_order(tokens: Any, config: MarkedDatasetConfig) -> DocumentOrder:
    starts = None
    if config.shuffle == "words":
        starts = tokenizers.word_starts(tokenizers.load(Path(config.tokenizer.path)))
    return DocumentOrder(tokens, config.random_seed, config.tokenizer.eod, starts)
