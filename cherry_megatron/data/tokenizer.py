"""A byte-level BPE tokenizer: trained with Hugging Face `tokenizers`, kept as a folder that
transformers and Megatron's HuggingFaceTokenizer open."""

import hashlib
import itertools
import json
import os
import shutil
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

from cherry_megatron.data.chat import CHAT_TEMPLATE, conversations
from cherry_megatron.data.text import Chunk, documents, find_files, read_chunks
from cherry_megatron.errors import CherryError

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|padding|>"
SETTINGS = "tokenizer_config.json"
SMALLEST = 256 + 2  # every byte, and the two special tokens
OPEN_FILES = 64
NAMED_LINES = 100  # malformed lines that are named one by one


@dataclass
class Counts:
    """What was read and written."""

    input_bytes: int = 0
    """Of the input files, as they lie on disk."""
    lines: int = 0
    """Lines of .jsonl files, documents of others."""
    bytes: int = 0
    """Of UTF-8 text in the documents."""
    characters: int = 0
    documents: int = 0
    tokens: int = 0
    """Each document's end included."""
    empty: int = 0
    malformed: int = 0
    answers: int = 0
    """Tokens of conversations that are learned from."""
    named: list[str] = field(default_factory=list)

    def add(self, later: "Counts") -> None:
        """Add the counts of input that follows."""
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        del self.named[NAMED_LINES:]


@dataclass(frozen=True)
class Encoded:
    """A batch after tokenization.

    Attributes:
        streams: what is appended to each file of OUTPUT.parts: tokens.bin, the ids of all documents; lengths,
            how many each has (int32); answers, of conversations, 1 for ids that are learned from (uint8).
        counts: of the batch.
    """

    streams: dict[str, bytes]
    counts: Counts


def train(
    inputs: Iterable[Path], output: Path, vocabulary: int, limit_mb: int = 200, key: str = "text"
) -> Tokenizer:
    """Train a tokenizer and save it as a folder, whole or not at all.

    Args:
        inputs: text files or folders. They take turns, about a megabyte each, so that a limit does not
            leave the later ones out. Malformed lines are passed over: `cherry data` reports them.
        output: the folder to write; must not exist or be empty.
        vocabulary: number of tokens, special ones included. Little text may give fewer.
        limit_mb: read at most so many megabytes of text.
        key: the key of the text in .jsonl lines.

    Raises:
        CherryError: unusable inputs, output or size.
    """
    if vocabulary < SMALLEST:
        raise CherryError(f"--vocab-size {vocabulary} is too small; a byte-level vocabulary needs {SMALLEST}")
    if limit_mb < 1:
        raise CherryError(f"--limit-mb {limit_mb} leaves nothing to read; it must be at least 1")
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise CherryError(f"{output} exists; remove it or choose another --output")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_DOCUMENT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    files = find_files(inputs)
    texts = _texts(files, limit_mb * 1_000_000, key)
    first = next(texts, None)
    if first is None:
        raise CherryError(f"the inputs hold no text to train a tokenizer on; {_why_none(files, key)}")
    tokenizer.train_from_iterator(itertools.chain([first], texts), trainer)
    _save(tokenizer, output)
    return tokenizer


def _texts(files: list[Path], limit: int, key: str) -> Iterator[str]:
    """Usable documents up to a number of bytes."""
    read = 0
    with tqdm(total=limit, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for chunk in _take_turns(files):
            for _, text in documents(chunk, key):
                if isinstance(text, ValueError) or not text.strip():
                    continue
                yield text
                size = len(text.encode())
                read += size
                bar.update(size)
                if read >= limit:
                    return


def _why_none(files: list[Path], key: str) -> str:
    for chunk in _take_turns(files):
        for number, text in documents(chunk, key):
            if isinstance(text, ValueError):
                return f"the first malformed line is {chunk.path}:{number}: {text}"
    return "they are empty"


def _take_turns(files: list[Path]) -> Iterator[Chunk]:
    """A chunk of each file in turn; of so many files at a time, as open files are limited."""
    waiting = deque(files)
    reading: deque[Iterator[Chunk]] = deque()
    while waiting or reading:
        while waiting and len(reading) < OPEN_FILES:
            reading.append(read_chunks(waiting.popleft()))
        chunks = reading.popleft()
        chunk = next(chunks, None)
        if chunk is not None:
            reading.append(chunks)
            yield chunk


def _save(tokenizer: Tokenizer, output: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=END_OF_DOCUMENT,
            pad_token=PADDING,
            chat_template=CHAT_TEMPLATE,
        ).save_pretrained(partial)
        partial.replace(output)
    except OSError as error:
        raise CherryError(f"cannot write the tokenizer to {output}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(folder: Path) -> Tokenizer:
    """Open a tokenizer folder to encode documents with.

    Raises:
        CherryError: if it is not one.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CherryError(f"{folder} holds no tokenizer.json; make one with `cherry tokenizer`")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise CherryError(f"{file} is not a tokenizer: {error}") from None
    # A document that speaks of "<|endoftext|>" holds these characters, not the end of a document.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_document(tokenizer: Tokenizer, folder: Path) -> int:
    """The id that ends every document: of our own token, or of what a tokenizer from elsewhere ends texts with.

    Raises:
        CherryError: if the tokenizer has none.
    """
    found: int | None = tokenizer.token_to_id(END_OF_DOCUMENT)
    if found is None and (folder / SETTINGS).is_file():
        found = tokenizer.token_to_id(special_token(read_settings(folder / SETTINGS), "eos") or END_OF_DOCUMENT)
    if found is None:
        raise CherryError(
            f"the tokenizer {folder} has no {END_OF_DOCUMENT} token, and its {SETTINGS} names no eos_token; make "
            "one with `cherry tokenizer`"
        )
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a tokenizer_config.json.

    Raises:
        CherryError: if it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no keys and values")
    except (OSError, ValueError, RecursionError) as error:
        raise CherryError(f"{path} is damaged ({error}); restore it") from None
    return found


def special_token(settings: dict[str, Any], kind: str) -> str | None:
    """A special token by its kind (bos, eos, pad), as a tokenizer_config.json names it; None if it does not."""
    token = settings.get(f"{kind}_token")
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: what a model's vocabulary must hold at least."""
    return max(tokenizer.get_vocab().values()) + 1


def word_starts(tokenizer: Tokenizer) -> np.ndarray[Any, Any]:
    """Which tokens of a byte-level vocabulary begin with white space, and so begin a word: [size] bool."""
    spaces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(" \t\n\v\f\r")
    found = np.zeros(size(tokenizer), bool)
    found[[id for token, id in tokenizer.get_vocab().items() if token[0] in spaces[0][0]]] = True
    return found


def fingerprint(folder: Path) -> str:
    """Twelve hex digits of the vocabulary and merges, to compare tokenizers.

    Raises:
        CherryError: if the folder cannot be read.
    """
    try:
        return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise CherryError(f"cannot read {folder}/tokenizer.json: {error.strerror}") from None


def encode(tokenizer: Tokenizer, chunks: Iterable[Chunk], key: str | None, end: int, typecode: str) -> Encoded:
    """Tokenize the documents of some chunks.

    Args:
        tokenizer: from `load`.
        chunks: of any files.
        key: the key of the text in .jsonl lines; None if they are conversations.
        end: the id that ends every document, and every answer.
        typecode: of the ids, as `array` names it.
    """
    counts = Counts()
    found = list(_usable(chunks, key, counts))
    ids, lengths, answers = array(typecode), array("i"), bytearray()
    # What is asked is encoded without its answer, as it is when a model is asked.
    encodings = iter(tokenizer.encode_batch_fast(list(itertools.chain(*found)), add_special_tokens=False))
    for pieces in found:
        before = len(ids)
        for encoding, is_answer in zip(itertools.islice(encodings, len(pieces)), itertools.cycle((False, True))):
            row = encoding.ids
            if is_answer or key is not None:
                row.append(end)
            ids.fromlist(row)
            if key is None:
                answers += bytes([is_answer]) * len(row)
        lengths.append(len(ids) - before)
    counts.documents, counts.tokens, counts.answers = len(lengths), len(ids), sum(answers)
    streams = {"tokens.bin": ids.tobytes(), "lengths": lengths.tobytes(), "answers": bytes(answers)}
    return Encoded(streams, counts)


def _usable(chunks: Iterable[Chunk], key: str | None, counts: Counts) -> Iterator[list[str]]:
    """The pieces of the documents that are neither malformed nor empty; what was read is added to `counts`."""
    for chunk in chunks:
        counts.input_bytes += chunk.disk
        for number, found in conversations(chunk) if key is None else documents(chunk, key):
            counts.lines += 1
            if isinstance(found, ValueError):
                counts.malformed += 1
                if len(counts.named) < NAMED_LINES:
                    counts.named.append(f"{chunk.path}:{number}: {found}")
                continue
            pieces = [found] if isinstance(found, str) else found
            text = "".join(pieces)
            if not text or text.isspace():
                counts.empty += 1
            else:
                counts.characters += len(text)
                counts.bytes += len(text.encode())
                yield pieces


def worker(folder: Path) -> Callable[..., Encoded]:
    """`encode` with the tokenizer of a folder, for a worker process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return partial(encode, load(folder))
