"""Prompts as tokens: read, encoded and seen to fit, before anything runs."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from cherry_megatron.config import Config
from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.errors import CherryError

# Categories of Unicode that break a line or steer a terminal: controls, line and paragraph separators.
_INVISIBLE = ("Cc", "Zl", "Zp")


@dataclass(frozen=True)
class Prompts:
    """Texts to go on from.

    Attributes:
        texts: as they were given.
        ids: the tokens of each.
        end: the token that ends a document.
        tokenizer: that of the model.
    """

    texts: list[str]
    ids: list[list[int]]
    end: int
    tokenizer: Tokenizer

    def text_of(self, continuation: Sequence[int]) -> str:
        """A continuation as text, without its end. Half a character is U+FFFD, an id without a token is nothing."""
        ids = continuation[:-1] if continuation and continuation[-1] == self.end else continuation
        decoded: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return decoded


def configured_prompts(config: Config) -> Prompts:
    """The prompts of the `generation` section.

    Raises:
        CherryError: if the file has none, or they do not fit.
    """
    assert config.generation is not None
    path = Path(config.generation.prompts)
    return encode_prompts(config, read_prompts(path), config.generation.tokens, f"generation.prompts {path}")


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 file; blank ones are left out.

    Raises:
        CherryError: if there are none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CherryError(f"generation.prompts {path}: {error.strerror}; name a file of prompts") from None
    except UnicodeDecodeError:
        raise CherryError(f"generation.prompts {path} is not a UTF-8 text file") from None
    # str.splitlines would also cut at separators inside a line.
    found = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not found:
        raise CherryError(f"generation.prompts {path} holds no prompt; write one a line")
    return found


def encode_prompts(config: Config, texts: list[str], new_tokens: int, named: str) -> Prompts:
    """Prompts as tokens of the configured tokenizer.

    Args:
        config: names tokenizer and sequence length.
        texts: prompts.
        new_tokens: how many are to follow at most.
        named: where the prompts come from, for a sentence about them.

    Raises:
        CherryError: if there is no tokenizer, or a prompt is blank, no text or too long.
    """
    folder = config.value("tokenizer-model")
    if config.value("tokenizer-type") != "HuggingFaceTokenizer" or folder is None:
        raise CherryError(f"{named}: set megatron.tokenizer-model to a folder made by `cherry tokenizer`")
    tokenizer = tokenizers.load(Path(folder))
    for number, text in enumerate(texts, start=1):
        if not text.strip() or any(unicodedata.category(character) == "Cs" for character in text):
            raise CherryError(f"{named}: prompt {number} is blank or no UTF-8 text")
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    check_fit(ids, new_tokens, config.positive("seq-length"), named)
    return Prompts(texts, ids, tokenizers.end_of_document(tokenizer, Path(folder)), tokenizer)


def check_fit(prompts: Sequence[Sequence[int]], new_tokens: int, longest: int, named: str) -> None:
    """See that each prompt has tokens and fits into one sequence with what follows it.

    Raises:
        CherryError: the first that does not.
    """
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise CherryError(f"{named}: the tokenizer has no token for anything in prompt {number}; change it")
        if len(prompt) + new_tokens > longest:
            raise CherryError(
                f"{named}: prompt {number} of {len(prompt)} tokens and {new_tokens} new ones do not fit into "
                f"megatron.seq-length {longest}; shorten the prompt or generate fewer"
            )


def visible(text: str) -> str:
    """Text with control characters, other than line ends and tabs, as their escapes."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _INVISIBLE and character not in "\n\t"
        else character
        for character in text
    )
