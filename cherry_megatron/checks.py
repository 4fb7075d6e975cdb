"""What must hold before a configuration can run here: looked at before anything is written.

`cherry doctor` prints every obstacle, `cherry pretrain` stops at the first.
"""

import json
import os
from pathlib import Path

from cherry_megatron.checkpoints import unloadable
from cherry_megatron.config import Config
from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.data.paths import data_prefixes
from cherry_megatron.errors import CherryError
from cherry_megatron.platform.machine import Machine


def obstacles(machine: Machine, config: Config) -> list[str]:
    """Why a configuration cannot run on this machine, one sentence each; empty if it can."""
    found = _machine(machine, config) + _writable(config.run)
    try:
        found += unloadable(config) + _data(config)
    except CherryError as error:
        found.append(str(error))
    return found


def require(machine: Machine, config: Config) -> None:
    """Raise the first obstacle as a CherryError."""
    for problem in obstacles(machine, config):
        raise CherryError(f"{config.source}: {problem}")


def _machine(machine: Machine, config: Config) -> list[str]:
    found = []
    if config.value("fp8-format") and not machine.usable("transformer-engine"):
        found.append("megatron.fp8-format: FP8 needs Transformer Engine and a GPU; take it out")
    asked = config.megatron.get("transformer-impl") == "transformer_engine"
    if asked and not machine.usable("transformer-engine"):
        found.append("megatron.transformer-impl transformer_engine is not usable here; use local")
    if config.value("fp16") and not machine.devices:
        found.append("megatron.fp16 needs a GPU; use bf16 or neither")
    return found


def _writable(run: Path) -> list[str]:
    there = run.absolute()
    while not there.exists():
        there = there.parent
    if there.is_dir() and os.access(there, os.W_OK):
        return []
    return [f"cannot write the run's folder {run}: {there} is not a folder that you may write"]


def _data(config: Config) -> list[str]:
    """Tokenizer and indexed files are there, belong together, and fit the vocabulary."""
    found = []
    named = config.value("tokenizer-model")
    if config.value("tokenizer-type") != "HuggingFaceTokenizer":
        return []
    if named is None:
        return ["set megatron.tokenizer-model to a folder made by `cherry tokenizer`"]
    folder = Path(named)
    size = tokenizers.load(folder).get_vocab_size()
    if size > config.shape.vocabulary:
        found.append(
            f"megatron.padded-vocab-size {config.shape.vocabulary} is less than the {size} tokens of {folder}"
        )
    for flag, prefix in data_prefixes(config):
        if not Path(f"{prefix}.idx").is_file() or not Path(f"{prefix}.bin").is_file():
            found.append(f"megatron.{flag} {prefix}: {prefix}.idx or .bin is missing; make it with `cherry data`")
            continue
        made = Path(f"{prefix}.json")
        if made.is_file():
            try:
                known = json.loads(made.read_text())["tokenizer"]
            except (ValueError, TypeError, KeyError):
                found.append(f"{made} is not a report of `cherry data`; restore it or make the data again")
                continue
            if known != tokenizers.fingerprint(folder):
                found.append(
                    f"{prefix} was made with another tokenizer than {folder}; name the one it was made with"
                )
    return found
