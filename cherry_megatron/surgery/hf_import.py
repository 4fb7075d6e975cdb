"""`cherry convert-hf`, in: a folder of safetensors becomes a checkpoint that training loads, with its settings.

What `cherry convert-hf` has written comes back to the bit. A Llama model from elsewhere becomes one of this
project, which can be compressed.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from cherry_megatron.config import Outline, outline
from cherry_megatron.errors import CherryError
from cherry_megatron.storage.checkpoint import Tensor
from cherry_megatron.storage.fits import check_model
from cherry_megatron.storage.layers import HEAD
from cherry_megatron.storage.lineage import chain, read_lineage
from cherry_megatron.storage.trained import WALK
from cherry_megatron.storage.weights import CONFIG, Weights, arguments_of
from cherry_megatron.surgery.assemble import expert_prefix, mixture_objects
from cherry_megatron.surgery.compress import Surgery
from cherry_megatron.surgery.depth import objects
from cherry_megatron.surgery.hf_form import Form, arguments, read_form, settings_of
from cherry_megatron.surgery.hf_names import TOP, Row, rows
from cherry_megatron.surgery.hf_tokenizer import VOCABULARY, tokenizer_files
from cherry_megatron.surgery.jobs import Recut, Step
from cherry_megatron.surgery.writing import Job, Spec

CONFIGURATION, TOKENIZER = "config.yaml", "tokenizer"
# Angles that older Llama checkpoints keep; they follow from rope_theta.
_NOT_WEIGHTS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def plan_import(load: Path, config: Path | None, overrides: Sequence[str], save: Path) -> Surgery:
    """Look at everything that a conversion from the form of Hugging Face needs.

    Args:
        load: the folder.
        config: of the model, which it is held against; None: one is written.
        overrides: as in `config.load`.
        save: where the checkpoint will be.

    Raises:
        CherryError: if something is not supported or does not fit, naming the tensor or the key.
    """
    form, source = read_form(load), Weights(load)
    wanted = None if config is None else outline(config, overrides)
    padding = 0 if wanted is None else _padding(form, wanted)
    form = replace(form, shape=replace(form.shape, vocabulary=form.words + padding))
    found = rows(form)
    dtype = _check(source, form, found)
    tokenizer, fingerprint = tokenizer_files(load) if (load / VOCABULARY).is_file() else ({}, None)
    recorded = [
        entry["tokenizer"] for _, entry in chain(read_lineage(load) or {"parents": []}) if "tokenizer" in entry
    ]
    fingerprint = fingerprint or next(iter(recorded), None)
    place = save / TOKENIZER if tokenizer else None
    settings = settings_of(form, dtype, str(save.parent / f"{save.name}-run"), save, place)
    there = _as_it_will_be(source, found, dtype, settings)
    if config is not None:
        assert wanted is not None
        _check_configuration(there, form, config, wanted)
    jobs: list[Job] = [
        Recut(tuple(_step(row, dtype) for row in group), joins=True)
        for _, group in groupby(found, key=lambda row: row.group)
    ]
    beside = {f"{TOKENIZER}/{name}": content for name, content in tokenizer.items()}
    if config is None:
        head = f"# The model of {load}, by `cherry convert-hf`: what it is. Add text and how it is to be trained.\n"
        beside[CONFIGURATION] = (head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)).encode()
    details = {
        "config": str(config or save / CONFIGURATION), "settings": wanted.settings if wanted else settings,
        "recurrence": asdict(wanted.recurrence if wanted else form.recurrence), "form": form.kind,
        **({"tokenizer": fingerprint} if fingerprint else {}),
    }  # fmt: skip
    pattern = form.recurrence.parsed
    lines = [
        f"source      {load}: {form.kind}, {len(pattern.layers)} stored layers",
        *([f"vocabulary  {form.words} words, and {padding} of zeros"] if padding else []),
        f"config      {'held against ' + str(config) if config else save / CONFIGURATION}",
        f"tokenizer   {place or 'there is none'}",
    ]
    if form.moee is None:
        made = objects(there, pattern, False, form.depths, form.shape.experts)
    else:
        starts = [expert_prefix(number) for number in range(form.moee.experts)]
        made = mixture_objects(there, form.recurrence, starts, form.depths)
    return Surgery({"": source}, jobs, made, "import-hf", details, lines, beside)


def _padding(form: Form, wanted: Outline) -> int:
    """Rows that a configuration's vocabulary has more; Megatron's is a multiple of what it is cut by."""
    rows_wanted = wanted.megatron.get("padded-vocab-size")
    more = rows_wanted - form.words if isinstance(rows_wanted, int) else 0
    return max(more, 0) if form.moee is None else 0


def _check(source: Weights, form: Form, found: Sequence[Row]) -> str:
    """There is every tensor of the model and no other, of its shape and all of one type, which is given back."""
    wanted = {
        name: shape
        for row in found
        for name, shape in zip(row.theirs, row.cut.shapes(row.shape), strict=True)
    }  # fmt: skip
    dtype, first = None, ""
    for name, shape in wanted.items():
        if name not in source.tensors:
            raise CherryError(f"{source.folder}: the tensor {name} is missing; restore it, or correct {CONFIG}")
        tensor = source.tensors[name]
        dtype, first = dtype or tensor.dtype, first or name
        if tensor.shape != shape:
            raise CherryError(
                f"{source.folder}: the tensor {name} is {list(tensor.shape)}, by {CONFIG} {list(shape)}"
            )
        if tensor.dtype != dtype:
            raise CherryError(
                f"{source.folder}: the tensor {name} is {tensor.dtype}, but {first} {dtype}; save the model in one "
                "type"
            )
    assert dtype is not None
    for name in sorted(source.tensors.keys() - wanted.keys()):
        _check_further(source, form, name)
    source.check([*wanted])
    return dtype


def _check_further(source: Weights, form: Form, name: str) -> None:
    """A tensor that the model has not: an output layer beside tied embeddings may be there, if it is these."""
    if form.kind == "llama" and _NOT_WEIGHTS.fullmatch(name):
        return
    embedding = next(iter(TOP.values()))
    if form.shape.tied and name == TOP[HEAD]:
        if source.read(name).tobytes() == source.read(embedding).tobytes():
            return
        raise CherryError(
            f"{source.folder}: {name} is not {embedding}, but tie_word_embeddings is true; correct {CONFIG}"
        )
    raise CherryError(f"{source.folder}: the tensor {name} is not one of a model of this {CONFIG}")


def _check_configuration(there: Weights, form: Form, config: Path, wanted: Outline) -> None:
    """A configuration describes the model that the weights will be."""
    experts, depths = 0 if form.moee is None else form.moee.experts, form.depths
    ours = 0 if wanted.moee is None else wanted.moee.experts
    if ours != experts:
        raise CherryError(
            f"{config}: moee.experts is {ours or 'not set'}, but {there.folder} has {experts or 'none'}"
        )
    if wanted.depths != depths:
        raise CherryError(f"{config}: mtp.depths is {wanted.depths}, but {there.folder} has {depths}; set it so")
    one = there.under(expert_prefix(0)) if experts else there
    check_model(one, wanted.recurrence, config, wanted.megatron, (*WALK, "loops"))
    keys = ("loops",) if form.kind == "llama" else ("loops", "order", "injection")
    held: list[tuple[str, str, Any, Any]] = [
        ("recurrence", key, wanted.recurrence, form.recurrence) for key in keys
    ]
    held += [("moee", key, wanted.moee, form.moee) for key in ("prefix", "router_hidden") if experts]
    for section, key, theirs, own in held:
        if getattr(theirs, key) != getattr(own, key):
            raise CherryError(
                f"{config}: {section}.{key} is {getattr(theirs, key)}, but {there.folder} has "
                f"{getattr(own, key)}; set it so"
            )


def _as_it_will_be(source: Weights, found: Sequence[Row], dtype: str, settings: dict[str, Any]) -> Weights:
    """A source with tensors of our names and shapes, which cannot be read, and a common state."""
    there = source.under("")
    assert isinstance(there, Weights)
    there.tensors = {row.ours: Tensor(row.ours, dtype, row.shape, ()) for row in found}
    there.common_state = {"args": arguments_of(arguments(settings)), "checkpoint_version": 3.0}
    return there


def _step(row: Row, dtype: str) -> Step:
    return Step(row.theirs, (Spec(row.ours, dtype, row.shape),), row.cut)
