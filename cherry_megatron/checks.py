"""What must hold before a configuration can run here: looked at before anything is written.

`cherry doctor` prints every obstacle, `cherry pretrain` stops at the first.
"""

import json
from dataclasses import replace
from pathlib import Path

from cherry_megatron.checkpoints import unloadable
from cherry_megatron.config import Config
from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.data.index import is_index
from cherry_megatron.data.marks import read_marks
from cherry_megatron.data.paths import DATA_FLAGS, data_prefixes
from cherry_megatron.data.prepare import token_type
from cherry_megatron.errors import CherryError
from cherry_megatron.files import why_not_writable
from cherry_megatron.inference.prompts import configured_prompts
from cherry_megatron.keeping import why_no_room
from cherry_megatron.platform.machine import Machine, dali


def obstacles(machine: Machine, config: Config, training: bool = True) -> list[str]:
    """Why a configuration cannot run on this machine, one sentence each; empty if it can.

    Args:
        machine: from `inspect_machine`.
        config: it.
        training: whether it is to be trained, and not only read.
    """
    found = _machine(machine, config) + _writable(config.run)
    try:
        if training and (why := why_no_room(config)):
            found.append(why)
        found += unloadable(config, training) + _tokenizer(config) + _data(config)
        _check_teacher(config)
        if config.generation is not None:
            configured_prompts(config)
    except CherryError as error:
        found.append(str(error).removeprefix(f"{config.source}: "))  # which those who print it put in front
    return found


def require(machine: Machine, config: Config, training: bool = True) -> None:
    """Raise the first obstacle as a CherryError, see `obstacles`."""
    for problem in obstacles(machine, config, training):
        raise CherryError(f"{config.source}: {problem}")


def _machine(machine: Machine, config: Config) -> list[str]:
    found = []
    if config.value("fp8-format") and not machine.usable("transformer-engine"):
        found.append("megatron.fp8-format: FP8 needs Transformer Engine and a GPU; take it out")
    layers = replace(config, megatron={**machine.flags, **config.megatron}).value("transformer-impl")
    if layers != "local" and not (layers == "transformer_engine" and machine.usable("transformer-engine")):
        found.append(f"megatron.transformer-impl {layers} is not usable here; use local")
    if config.value("cuda-graph-impl") != "none" and not machine.devices:
        found.append("megatron.cuda-graph-impl needs a GPU; take it out")
    if config.value("fp16") and not machine.devices:
        found.append("megatron.fp16 needs a GPU; use bf16 or neither")
    if config.data.loader == "dali" and not dali().usable:
        found.append(
            f"data.loader dali: DALI is not usable here, {dali().note}; install cherry-megatron[dali], or use torch"
        )
    return found


def _writable(run: Path) -> list[str]:
    for folder in (run, run / "checkpoints"):
        if why := why_not_writable(folder):
            return [f"cannot write the run's folder {folder}: {why}; choose another"]
    return []


def _tokenizer(config: Config) -> list[str]:
    """The tokenizer is there and fits the vocabulary."""
    if config.value("tokenizer-type") != "HuggingFaceTokenizer":
        return []
    folder = config.value("tokenizer-model")
    if folder is None:
        return ["set megatron.tokenizer-model to a folder made by `cherry tokenizer`"]
    size, rows = tokenizers.load(Path(folder)).get_vocab_size(), config.shape.vocabulary
    return [f"megatron.padded-vocab-size {rows} is less than the {size} tokens of {folder}"] if size > rows else []


def _check_teacher(config: Config) -> None:
    if config.distillation is not None:
        from cherry_megatron.distillation import check_teacher  # imports Megatron

        check_teacher(config.distillation, config)


def _data(config: Config) -> list[str]:
    """One source of text with a split, or a source for each split. Megatron fails late on anything else."""
    found = [why for flag, prefix in data_prefixes(config) for why in _data_set(config, flag, prefix)]
    if config.sgt is not None and config.sgt.marks is not None and not found:
        for _, prefix in data_prefixes(config):
            try:
                read_marks(Path(prefix), config.sgt.marks)
            except CherryError as error:
                raise CherryError(f"{error} (or go without the selection: --set sgt=null)") from None
    split = config.value("split")
    given = [flag for flag in (*DATA_FLAGS, "data-args-path") if config.value(flag)]
    whole = [flag for flag in given if flag in ("data-path", "data-args-path")]
    missing = [flag for flag in ("train-data-path", "valid-data-path") if flag not in given]
    if not given:
        found.append("set megatron.data-path to what `cherry data` has written, without .bin or .idx")
    elif whole and len(given) > 1:
        found.append(f"megatron.{given[0]} and megatron.{given[1]} are both set; keep one")
    elif whole and split is None:
        found.append("set megatron.split to the shares of training, validation and test, e.g. 990,8,2")
    elif not whole and split is not None:
        found.append(f"megatron.split {split} does not go with megatron.{given[0]}; set it to null")
    elif not whole and missing:
        found.append(f"megatron.{given[0]} needs megatron.{missing[0]} beside it")
    return found


def _data_set(config: Config, flag: str, prefix: str) -> list[str]:
    """The indexed files are there, whole, of the configured tokenizer, and enough for the split."""
    if not Path(f"{prefix}.idx").is_file() or not Path(f"{prefix}.bin").is_file():
        return [f"megatron.{flag} {prefix}: {prefix}.idx or .bin is missing; make it with `cherry data`"]
    made = Path(f"{prefix}.json")
    if not made.is_file():
        return []
    try:
        report = json.loads(made.read_text(encoding="utf-8"))
        known, documents = report["tokenizer"], report["documents"]
        if not all(
            type(report[name]) is int and report[name] > 0 for name in ("documents", "tokens", "vocabulary")
        ):
            raise TypeError
        # The index: a header, the length and place of each document, and the borders between them.
        sizes = {
            ".bin": report["tokens"] * token_type(report["vocabulary"]).itemsize,
            ".idx": 34 + 12 * documents + 8 * (documents + 1),
        }
    except (ValueError, TypeError, KeyError):
        return [f"{made} is not a report of `cherry data`; restore it or make the data again"]
    found = []
    for suffix, wanted in sizes.items():
        size = Path(f"{prefix}{suffix}").stat().st_size
        if size != wanted:
            found.append(f"{prefix}{suffix} has {size} bytes, not {wanted}: copy it again or make the data again")
    dtype = token_type(report["vocabulary"])
    if not found and not is_index(Path(f"{prefix}.idx"), documents, report["tokens"], dtype):
        found.append(f"{prefix}.idx is not what was written: copy it again or make the data again")
    named = config.value("tokenizer-model") if config.value("tokenizer-type") == "HuggingFaceTokenizer" else None
    if named is not None and known != tokenizers.fingerprint(Path(named)):
        found.append(f"{prefix} was made with another tokenizer than {named}; name the one it was made with")
    return found + _empty_share(config.value("split"), prefix, documents)


def _empty_share(split: str | None, prefix: str, documents: int) -> list[str]:
    """Of a share without a document Megatron collects tokens for ever."""
    if split is None:
        return []
    shares = [float(share) for share in split.split(",")]
    ends = [round(sum(shares[:count]) / sum(shares) * documents) for count in range(4)]
    empty = [count for count in range(3) if shares[count] and ends[count] == ends[count + 1]]
    names = ("training", "validation", "test (or none: 0)")
    return [
        f"megatron.split {split} leaves none of the {documents} documents of {prefix} for {names[count]}; "
        "give it a larger share"
        for count in empty
    ]
