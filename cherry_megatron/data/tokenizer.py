"""A byte-level BPE tokenizer: trained with Hugging Face `tokenizers`, kept as a folder that
transformers and Megatron's HuggingFaceTokenizer open."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

from cherry_megatron.data.text import document, find_files, read_lines
from cherry_megatron.errors import CherryError

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|padding|>"
SMALLEST = 256 + 2  # every byte, and the two special tokens


def train(
    inputs: Iterable[Path], output: Path, vocabulary: int, limit_mb: int = 200, key: str = "text"
) -> Tokenizer:
    """Train a tokenizer and save it as a folder.

    Args:
        inputs: text files or folders.
        output: the folder to write; must not exist or be empty.
        vocabulary: number of tokens, special ones included.
        limit_mb: read at most so many megabytes of text.
        key: the key of the text in .jsonl lines.

    Raises:
        CherryError: unusable inputs, output or size.
    """
    if vocabulary < SMALLEST:
        raise CherryError(f"--vocab-size {vocabulary} is too small; a byte-level vocabulary needs {SMALLEST}")
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
    texts = _texts(find_files(inputs), limit_mb << 20, key)
    first = next(texts, None)
    if first is None:
        raise CherryError("the inputs hold no text to train a tokenizer on")
    tokenizer.train_from_iterator(itertools.chain([first], texts), trainer)
    _save(tokenizer, output)
    return tokenizer


def _texts(files: list[Path], limit: int, key: str) -> Iterator[str]:
    """Usable documents up to a number of bytes; `cherry data` is where malformed ones are reported."""
    with tqdm(total=limit, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for line in itertools.chain.from_iterable(map(read_lines, files)):
            try:
                text = document(line, key)
            except ValueError:
                continue
            if text.strip():
                yield text
            bar.update(len(line.raw))
            if bar.n >= limit:
                return


def _save(tokenizer: Tokenizer, output: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    try:
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT, pad_token=PADDING
        ).save_pretrained(output)
    except OSError as error:
        raise CherryError(f"cannot write the tokenizer to {output}: {error.strerror}") from None


def load(folder: Path) -> Tokenizer:
    """Open a tokenizer folder.

    Raises:
        CherryError: if it is not one.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CherryError(f"{folder} holds no tokenizer.json; make one with `cherry tokenizer`")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise CherryError(f"{file} is not a tokenizer: {error}") from None


def end_of_document(tokenizer: Tokenizer, folder: Path) -> int:
    """The id that ends every document.

    Raises:
        CherryError: if the tokenizer has none.
    """
    found: Any = tokenizer.token_to_id(END_OF_DOCUMENT)
    if found is None:
        raise CherryError(f"the tokenizer {folder} has no {END_OF_DOCUMENT} token")
    return int(found)


def fingerprint(folder: Path) -> str:
    """Twelve hex digits of the vocabulary and merges, to compare tokenizers."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()[:12]
