"""YAML files that may extend one another and name environment variables, and what `--set` puts into them."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from cherry_megatron.beginning import hint
from cherry_megatron.errors import CherryError


class _Once(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {key.value!r} stands twice; keep one", key.start_mark
                    )
                seen.add(key.value)
        return node


def read_file(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a YAML file and of what it extends, as they stand.

    Raises:
        CherryError: if it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        what_to_do = hint(path) or "; correct the name"
        raise CherryError(f"cannot read the configuration {path}: {error.strerror}{what_to_do}") from None
    except UnicodeDecodeError:
        raise CherryError(f"{path} is not a UTF-8 text file") from None
    try:
        data = yaml.load(_environment(path, text), _Once) or {}
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        says = str(getattr(error, "problem", error)).partition("\n")[0]
        raise CherryError(f"{path}{line}: not valid YAML ({says})") from None
    if not isinstance(data, dict):
        raise CherryError(f"{path}: expected keys and values, found {type(data).__name__}")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise CherryError(f"{path}: `extends` is {parent!r}; name one file, as text")
    base = path.parent / parent
    if not base.exists():
        raise CherryError(f"{path}: `extends` names {parent}, and {base} is not there; correct the name")
    if base.resolve() in seen:
        raise CherryError(f"{path}: extends {parent}, which extends it again")
    return _merge(read_file(base, (*seen, path.resolve())), data)


def set_value(data: dict[str, Any], override: str) -> None:
    """Put what `--set` says, `section.key=value`, into the values of a file.

    Raises:
        CherryError: if it is not of that form.
    """
    name, found, text = override.partition("=")
    keys = name.split(".")
    if not found or len(keys) > 2 or not all(keys):
        raise CherryError(f"--set {override!r}: write it as section.key=value")
    if keys == ["extends"]:
        raise CherryError(f"--set {override!r}: only a file can extend another; write it there")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text  # such as *-[(*-)x4]x2*-, in which YAML sees the name of an anchor
    section = data
    if len(keys) == 2:
        section = data.setdefault(keys[0], {})
        if not isinstance(section, dict):
            raise CherryError(f"--set {override!r}: {keys[0]!r} is not a section")
    section[keys[-1]] = value


def _environment(path: Path, text: str) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if name in os.environ:
            return os.environ[name]
        if default is None:
            raise CherryError(f"{path}: the environment variable {name} is not set")
        return default

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", value, text)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
