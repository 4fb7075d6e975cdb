"""The tokenizer of a model in both forms: a folder of the same files."""

import json
from collections.abc import Mapping
from pathlib import Path

from cherry_megatron.errors import CherryError

VOCABULARY, SETTINGS = "tokenizer.json", "tokenizer_config.json"
NAMES = (VOCABULARY, SETTINGS, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# The name that release 4 of transformers, and what is built on it, knows too.
_CLASS = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def tokenizer_files(folder: Path) -> tuple[dict[str, bytes], str]:
    """The files of a tokenizer by name, and its fingerprint.

    Raises:
        CherryError: if it cannot be read.
    """
    from cherry_megatron.data.tokenizer import fingerprint  # a library that surgery mostly does without

    known = fingerprint(folder)
    try:
        files = {name: (folder / name).read_bytes() for name in NAMES if (folder / name).is_file()}
        settings = json.loads(files.get(SETTINGS, b"{}"))
        settings["tokenizer_class"] = _CLASS.get(found := settings.get("tokenizer_class"), found)
        files[SETTINGS] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    except OSError as error:
        raise CherryError(f"cannot read the tokenizer {folder}: {error.strerror} ({error.filename})") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CherryError(f"{folder / SETTINGS} is damaged ({error}); restore it") from None
    return files, known


def special_tokens(files: Mapping[str, bytes]) -> dict[str, int | None]:
    """The ids of the tokens that begin and end a text and that fill up, as far as a tokenizer has them."""
    if VOCABULARY not in files:
        return {}
    whole = json.loads(files[VOCABULARY])
    numbers = {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
    settings = json.loads(files[SETTINGS])
    found: dict[str, int | None] = {}
    for kind in ("bos", "eos", "pad"):
        token = settings.get(f"{kind}_token")
        content = token.get("content") if isinstance(token, dict) else token
        found[kind] = numbers.get(content)
    return found
