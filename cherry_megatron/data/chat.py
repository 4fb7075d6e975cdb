"""Conversations as documents: the chat template, and what of a conversation is learned from.

The markers of the template are ordinary text, so that every tokenizer and checkpoint can be used: tokens of
their own would change the vocabulary, and their embeddings would have seen no pretraining.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cherry_megatron.data.text import Chunk, json_object, lines, text_under
from cherry_megatron.errors import CherryError
from cherry_megatron.files import cannot_write, write_atomically

ROLES = ("system", "user", "assistant")
LEARNED = "assistant"
# What `_pieces` puts together, for transformers' apply_chat_template; the tokenizer's end of a text ends an answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}"
    "{% endfor %}"
    "{{ '<|assistant|>\\n' if add_generation_prompt else '' }}"
)
TEMPLATE_FILE = "chat_template.jinja"  # where transformers looks for it


def conversations(chunk: Chunk) -> Iterator[tuple[int, list[str] | ValueError]]:
    """The conversations of a .jsonl chunk: the number of the line, and its pieces or why it is malformed.

    The pieces are what is asked (with all markers) and what is answered, in turn; none if nothing is answered.
    """
    return lines(chunk, _parse)


def _parse(line: bytes) -> list[str]:
    parsed = json_object(line)
    return [] if parsed is None else _pieces(_messages(parsed))


def _messages(parsed: dict[str, Any]) -> list[tuple[str, str]]:
    """Role and content of each message of {"messages": [{"role", "content"}]} or {"prompt", "response"}."""
    if "messages" not in parsed:
        if not {"prompt", "response"} <= parsed.keys():
            raise ValueError("neither messages nor prompt and response")
        return [("user", text_under(parsed, "prompt")), (LEARNED, text_under(parsed, "response"))]
    if not isinstance(parsed["messages"], list):
        raise ValueError("messages is no list")
    found = []
    for number, message in enumerate(parsed["messages"], start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"message {number} has no role of {', '.join(ROLES)}")
        found.append((message["role"], text_under(message, "content")))
    return found


def _pieces(messages: list[tuple[str, str]]) -> list[str]:
    pieces = [""]
    for role, content in messages:
        pieces[-1] += f"<|{role}|>\n"
        if role == LEARNED:
            pieces += [content, ""]
        else:
            pieces[-1] += f"{content}\n"
    if pieces.pop():
        raise ValueError(f"the last message is not of the {LEARNED}")
    return pieces if any(answer.strip() for answer in pieces[1::2]) else []


def keep_template(folder: Path) -> None:
    """Put the chat template into a tokenizer folder that has none, for whoever talks to the model later.

    Raises:
        CherryError: if it has another one, or cannot be written.
    """
    found = _template_of(folder)
    if found is None:
        try:
            write_atomically(folder / TEMPLATE_FILE, CHAT_TEMPLATE)
        except OSError as error:
            raise cannot_write(folder / TEMPLATE_FILE, error) from None
    elif found != CHAT_TEMPLATE:
        raise CherryError(
            f"the tokenizer {folder} has another chat template than conversations are written with; "
            "remove it, or give a copy of the folder without it"
        )


def _template_of(folder: Path) -> Any:
    try:
        if (folder / TEMPLATE_FILE).exists():
            return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        settings = folder / "tokenizer_config.json"
        return json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.exists() else None
    except (OSError, ValueError, AttributeError) as error:
        raise CherryError(f"cannot read the chat template of {folder}: {error}") from None
