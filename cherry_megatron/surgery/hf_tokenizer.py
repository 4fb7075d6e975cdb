"""The tokenizer of a model in both forms: a folder of the same files."""

import json
from collections.abc import Mapping
from pathlib import Path

from cherry_megatron.errors import CherryError

VOCABULARY, SETTINGS = "tokenizer.json", "tokenizer_config.json"
NAMES = (VOCABULARY, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# The name that release 4 of transformers, and what is built on it, knows too.
_CLASS = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def tokenizer_files(folder: Path) -> tuple[dict[str, bytes], str]:
    """The files of a tokenizer by name, and its fingerprint.

    Raises:
        CherryError: if it cannot be read.
    """
    # A library that surgery mostly does without.
    from cherry_megatron.data.tokenizer import fingerprint, read_settings

    known = fingerprint(folder)
    settings = read_settings(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    if (found := settings.get("tokenizer_class")) in _CLASS:
        settings["tokenizer_class"] = _CLASS[found]
    try:
        files = {name: (folder / name).read_bytes() for name in NAMES if (folder / name).is_file()}
    except OSError as error:
        raise CherryError(f"cannot read {error.filename}: {error.strerror}") from None
    return files | {SETTINGS: (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()}, known


def special_tokens(files: Mapping[str, bytes]) -> dict[str, int | None]:
    """The ids of the tokens that begin and end a text and that fill up, as far as a tokenizer has them.

    Raises:
        CherryError: if its vocabulary is damaged.
    """
    if VOCABULARY not in files:
        return {}
    from cherry_megatron.data.tokenizer import special_token

    try:
        added = json.loads(files[VOCABULARY]).get("added_tokens", [])
        numbers = {token["content"]: token["id"] for token in added}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CherryError(f"the tokenizer's {VOCABULARY} is damaged ({error}); restore it") from None
    settings = json.loads(files[SETTINGS])
    return {kind: numbers.get(special_token(settings, kind)) for kind in ("bos", "eos", "pad")}
