"""Text out of order, a control: what is learned from marked tokens must not survive it.

The tokens or the words of every document are permuted when they are read, so the documents, their lengths
and Megatron's own order of samples stay what they are.
"""

from collections import OrderedDict
from typing import Any, Literal

import numpy as np

CACHED_TOKENS = 1 << 22  # of the documents read last; their marks are read right after their tokens

Shuffle = Literal["none", "tokens", "words"]


class DocumentOrder:
    """The order in which the tokens of a document are read; it follows from the seed and the document alone.

    Args:
        tokens: Megatron's IndexedDataset.
        seed: another seed gives other orders.
        end: id of the token that ends a document; it stays at the end.
        word_starts: [vocabulary] bool, tokens that begin a word; words are permuted then, else tokens.
    """

    def __init__(self, tokens: Any, seed: int, end: int, word_starts: np.ndarray[Any, Any] | None = None) -> None:
        self._tokens = tokens
        self._seed = seed
        self._end = end
        self._word_starts = word_starts
        self._cache: OrderedDict[int, np.ndarray[Any, Any]] = OrderedDict()
        self._cached = 0

    def __call__(self, document: int) -> np.ndarray[Any, Any]:
        """[tokens of the document] int32, the old place of every new one."""
        found = self._cache.pop(document, None)
        if found is None:
            found = self._permute(document)
            self._cached += len(found)
            while self._cache and self._cached > CACHED_TOKENS:
                self._cached -= len(self._cache.popitem(last=False)[1])
        self._cache[document] = found
        return found

    def _permute(self, document: int) -> np.ndarray[Any, Any]:
        tokens = self._tokens.get(document)
        order = np.arange(len(tokens), dtype=np.int32)
        inside = len(tokens) - int(len(tokens) > 0 and tokens[-1] == self._end)
        draw = np.random.default_rng([self._seed, document])
        if self._word_starts is None:
            draw.shuffle(order[:inside])
        else:
            # What stands before the first start is a word too; it keeps number 0.
            words = np.cumsum(self._word_starts[tokens[:inside]])
            places = draw.permutation(int(words[-1]) + 1 if inside else 0)
            order[:inside] = np.argsort(places[words], kind="stable")
        return order


class ShuffledDocuments:
    """What Megatron's GPTDataset reads of an IndexedDataset, with every document in the order given.

    Args:
        documents: IndexedDataset of tokens or of their marks.
        order: one for the tokens and all their marks.
    """

    def __init__(self, documents: Any, order: DocumentOrder) -> None:
        self.documents = documents
        self.sequence_lengths = documents.sequence_lengths
        self._order = order

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray[Any, Any]:
        """`length` tokens of a document from `offset` on, all that follow if None."""
        end = None if length is None else offset + length
        found: np.ndarray[Any, Any] = self.documents.get(idx)[self._order(int(idx))[offset:end]]
        return found
