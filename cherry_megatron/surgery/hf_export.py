"""`cherry convert-hf`, out: a checkpoint becomes a folder that transformers loads.

Weights are streamed, tensor by tensor, into safetensors files laid out before. Everything is written into a hidden
folder beside the target and appears at once.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from cherry_megatron import huggingface
from cherry_megatron.config import Outline, outline
from cherry_megatron.errors import CherryError
from cherry_megatron.files import cannot_write, new_folder, sync_folder
from cherry_megatron.storage.checkpoint import Checkpoint, hash_values, open_checkpoint
from cherry_megatron.storage.layers import Source, source_layers
from cherry_megatron.storage.lineage import LINEAGE, MANIFEST, manifest_text, record
from cherry_megatron.storage.trained import tokenizer_of, told_tokenizer
from cherry_megatron.storage.weights import CONFIG, INDEX, Shard, index_of, shards
from cherry_megatron.surgery.assemble import expert_prefix, tensors_of
from cherry_megatron.surgery.compress import SPARE, Surgery, configuration
from cherry_megatron.surgery.depth import written_bytes
from cherry_megatron.surgery.hf_card import card
from cherry_megatron.surgery.hf_form import Form, config_json, form_of
from cherry_megatron.surgery.hf_names import Row, rows
from cherry_megatron.surgery.hf_tokenizer import special_tokens, tokenizer_files
from cherry_megatron.surgery.jobs import Recut, Step
from cherry_megatron.surgery.writing import Job, Report, Spec, manifest_of, run_jobs, write_flushed

_ONE = ("configuration_cherry.py", "modeling_cherry.py")
CODE = {"llama": (), "cherry": _ONE, "cherry_mixture": (*_ONE, "modeling_cherry_mixture.py")}
SHARD = 5_000_000_000


@dataclass(frozen=True)
class Export(Surgery):
    """What is going to be written.

    Attributes:
        shard: bytes of values in a file, see `shards`.
    """

    shard: int = SHARD

    def run(self, save: Path, workers: int) -> Path:
        """Do it; returns the folder.

        Raises:
            CherryError: if the source is damaged, or the target cannot be written.
        """
        count = workers or len(os.sched_getaffinity(0))
        laid = shards([job.writes for job in self.jobs], self.shard)
        with new_folder(save, written_bytes(self.jobs) + SPARE) as partial:
            for shard in laid:
                with (partial / shard.file).open("xb") as file:
                    file.write(shard.header)
                    file.truncate(shard.size)
            reports = run_jobs(self.source, partial, self.jobs, count, fill_shards, laid)
            read = {name: chunks for report in reports for name, chunks in report.read.items()}
            manifest = manifest_of(reports)
            content = record(self.operation, manifest, self._parents(read), **self.details)
            files = {**self.beside, MANIFEST: manifest_text(manifest).encode()}
            files[LINEAGE] = json.dumps(content, indent=1, ensure_ascii=False).encode()
            if len(laid) > 1:
                files[INDEX] = index_of(laid).encode()
            for name, text in files.items():
                write_flushed(partial / name, text)
            sync_folder(partial)
            partial.rename(save)
            sync_folder(save.parent)
        return save


def fill_shards(source: Checkpoint, folder: Path, laid: Sequence[Shard]) -> Callable[[int, Job], Report]:
    """What a worker process does: put the tensors of a job into the places that are theirs."""
    places = {name: (shard.file, at) for shard in laid for name, at in shard.places.items()}

    def do(number: int, job: Job) -> Report:
        source.read_hashes.clear()
        file = places[job.writes[0].name][0]
        written = []
        try:
            with (folder / file).open("r+b") as target:
                for spec, values in zip(job.writes, job.make(source), strict=True):
                    assert values.shape == spec.shape, (spec, values.shape)
                    at = places[spec.name][1]
                    target.seek(at)
                    values = values if values.flags.c_contiguous else values.copy()
                    target.write(values.data.cast("B") if values.size else b"")
                    written.append((spec, at, spec.nbytes, hash_values(values)))
        except OSError as error:
            raise cannot_write(folder / file, error) from None
        return Report(file, "", tuple(written), dict(source.read_hashes))

    return do


def plan_export(
    load: Path, config: Path, overrides: Sequence[str], name: str, shard: int = SHARD, with_tokenizer: bool = True
) -> Export:
    """Look at everything that a conversion to the form of Hugging Face needs.

    Args:
        load: a checkpoint, see `open_checkpoint`.
        config: that it was trained with.
        overrides: as in `config.load`.
        name: of the model, for its card.
        shard: bytes of values in a file.
        with_tokenizer: take the configuration's tokenizer along.

    Raises:
        CherryError: if something does not fit, naming the tensor or the key.
    """
    wanted = outline(config, overrides)
    source = open_checkpoint(load)
    form, stored = _model(source, config, wanted)
    found = rows(form)
    _check(source, found, stored)
    jobs: list[Job] = [
        Recut(tuple(_step(source, row, stored[row.ours]) for row in group), joins=False)
        for _, group in groupby(found, key=lambda row: row.group)
    ]
    dtype = source.tensors[stored[found[0].ours]].dtype
    tokenizer, fingerprint = _tokenizer(source, config, wanted) if with_tokenizer else ({}, tokenizer_of(source))
    special = special_tokens(tokenizer)
    description = config_json(form, dtype, special)
    generation = {f"{token}_token_id": number for token, number in special.items() if number is not None}
    files = {
        CONFIG: _json(description),
        "generation_config.json": _json(generation),
        **{name: (Path(huggingface.__file__).parent / name).read_bytes() for name in CODE[form.kind]},
        **tokenizer,
    }
    files["README.md"] = card(name, form, dtype, sum(math.prod(row.shape) for row in found), source).encode()
    details = {
        **configuration(config, wanted), "form": form.kind, **({"tokenizer": fingerprint} if fingerprint else {}),
    }  # fmt: skip
    lines = [
        f"source      {source.folder}",
        f"form        {description['architectures'][0]}"
        + ("" if form.kind == "llama" else ", whose code is written beside the weights"),
        f"tokenizer   {fingerprint if tokenizer else 'none is written'}",
        "optimizer   its state is left out",
    ]
    return Export({"": source}, jobs, {}, "export-hf", details, lines, files, shard)


def _model(source: Checkpoint, config: Path, wanted: Outline) -> tuple[Form, dict[str, str]]:
    """What a checkpoint is, and for each tensor that the model needs the stored one."""
    mixture = wanted.moee
    if mixture is None and source.experts:
        raise CherryError(f"{source.folder} is a mixture of models, and {config} has no section moee; name its own")
    if mixture is None:
        stored = tensors_of(source, wanted.recurrence, config, wanted.megatron, wanted.depths)
        return form_of(config, wanted, source, _layers(source)), stored
    if source.experts != {*range(mixture.experts)}:
        raise CherryError(
            f"{config}: moee.experts is {mixture.experts}, but {source.folder} holds {len(source.experts)}; set it "
            "so"
        )
    found: dict[str, str] = {}
    for number in range(mixture.experts):
        start = expert_prefix(number)
        expert = source.under(start)
        stored = tensors_of(expert, wanted.recurrence, config, wanted.megatron, wanted.depths)
        found |= {start + ours: start + theirs for ours, theirs in stored.items()}
    found |= {name: name for name in source.model if name.startswith("router.")}
    first = source.under(expert_prefix(0))
    return form_of(config, wanted, first, _layers(first)), found


def _layers(source: Checkpoint) -> Source:
    return source_layers(source, looped=True, experts=True)


def _check(source: Checkpoint, found: Sequence[Row], stored: Mapping[str, str]) -> None:
    """What is stored is what the form has, tensor by tensor."""
    names = {row.ours for row in found}
    for name in sorted(names ^ stored.keys()):
        if name in names:
            raise CherryError(f"{source.folder}: the tensor {name} is missing")
        raise CherryError(f"{source.folder}: the tensor {stored[name]} has no place in the form of Hugging Face")
    for row in found:
        shape = source.tensors[stored[row.ours]].shape
        if shape != row.shape:
            raise CherryError(f"{source.folder}: {stored[row.ours]} is {list(shape)}, not {list(row.shape)}")
    source.check([*stored.values()])


def _step(source: Checkpoint, row: Row, stored: str) -> Step:
    dtype = source.tensors[stored].dtype
    specs = (Spec(n, dtype, s) for n, s in zip(row.theirs, row.cut.shapes(row.shape), strict=True))
    return Step((stored,), tuple(specs), row.cut)


def _tokenizer(source: Checkpoint, config: Path, wanted: Outline) -> tuple[dict[str, bytes], str]:
    """The files of the configuration's tokenizer, which is the checkpoint's, and its fingerprint."""
    folder = wanted.megatron.get("tokenizer-model")
    if folder is None:
        raise CherryError(
            f"{config}: set megatron.tokenizer-model to the tokenizer's folder, or add --no-tokenizer"
        )
    files, fingerprint = tokenizer_files(Path(str(folder)))
    known = tokenizer_of(source)
    if known not in (None, fingerprint):
        raise CherryError(
            f"{config}: megatron.tokenizer-model is {folder} ({fingerprint}), but {source.folder} was trained with "
            f"{told_tokenizer(source)}; set it to that or a copy of it"
        )
    return files, fingerprint


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
