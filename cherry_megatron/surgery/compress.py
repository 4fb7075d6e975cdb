"""`cherry compress-depth`: a deep checkpoint becomes one with few layers, or a recurrent one a dense one."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from cherry_megatron.config import Outline, outline
from cherry_megatron.errors import CherryError, naming
from cherry_megatron.files import new_folder
from cherry_megatron.model.options import Recurrence
from cherry_megatron.model.pattern import Pattern
from cherry_megatron.model.shape import heads_of
from cherry_megatron.storage.checkpoint import Checkpoint, open_checkpoint, together
from cherry_megatron.storage.fits import check_fit
from cherry_megatron.storage.layers import EMBEDDING, Source, source_layers
from cherry_megatron.storage.lineage import Manifest, parent, record
from cherry_megatron.storage.trained import check_trained, other_function, recorded_recurrence
from cherry_megatron.surgery.activations import open_calibration
from cherry_megatron.surgery.align import Alignment
from cherry_megatron.surgery.depth import compression, expansion, objects, peak_bytes, written_bytes
from cherry_megatron.surgery.depths import new_depths
from cherry_megatron.surgery.grouping import METHODS, Method, Mix, make_groups, mix
from cherry_megatron.surgery.jobs import Drawn
from cherry_megatron.surgery.search import Found
from cherry_megatron.surgery.writing import CHECKPOINT, Job, publish, run_jobs, write_flushed

SPARE = 1 << 20  # for what is no tensor
# Megatron's defaults.
INIT_STD = 0.02


@dataclass(frozen=True)
class Options:
    """How to compress; see grouping.py and align.py.

    Attributes:
        groups: `adjacent`, `slots`, or the groups written out.
        method: `average`, `weighted`, `select`, `random`.
        weights: of the members of a group, for `weighted`.
        keep: which member of a group to take, for `select`.
        align: `none`, `weights` or `activations`.
        optimizer: `drop` or `average` its moments.
        seed: of `random`.
        calibration: a folder made by `cherry calibrate`, for `activations`.
    """

    groups: str = "adjacent"
    method: Method = "average"
    weights: tuple[float, ...] = ()
    keep: int | None = None
    align: Literal["none", "weights", "activations"] = "none"
    optimizer: Literal["drop", "average"] = "drop"
    seed: int = 0
    calibration: Path | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise CherryError(f"--method {self.method} is not one of {', '.join(METHODS)}")
        if self.align != "none" and self.method in ("select", "random"):
            raise CherryError(
                f"--align matches layers before their mean, which {self.method} does not take; use --align none"
            )
        if self.method == "random" and self.optimizer == "average":
            raise CherryError("--optimizer average: layers drawn anew have no moments; use drop")
        if self.align != "none" and self.optimizer == "average":
            raise CherryError("--optimizer average: moments of layers that were aligned are not carried; use drop")
        if self.weights and self.method != "weighted":
            raise CherryError("--weights is that of --method weighted; add it, or take --weights out")
        if self.keep is not None and self.method != "select":
            raise CherryError(f"--keep {self.keep} is that of --method select; add it, or take --keep out")
        if self.seed < 0:
            raise CherryError(f"--seed {self.seed} is negative; use 0 or more")
        if self.align == "activations" and self.calibration is None:
            raise CherryError("--align activations needs --calibration, a folder made by `cherry calibrate`")
        if self.align != "activations" and self.calibration is not None:
            raise CherryError(f"--calibration {self.calibration} is for --align activations alone; take it out")


@dataclass(frozen=True)
class Surgery:
    """What is going to be done, before anything is written.

    Attributes:
        parts: the checkpoints that it reads, see `together`; of several each is a parent by its part's name.
        jobs: what the workers do.
        objects: what is no tensor in the new checkpoint.
        operation: for the lineage.
        details: likewise.
        lines: what `--dry-run` prints.
        beside: files to be written beside the checkpoint, by name.
    """

    parts: dict[str, Checkpoint]
    jobs: list[Job]
    objects: dict[str, Any]
    operation: str
    details: dict[str, Any]
    lines: list[str]
    beside: Mapping[str, bytes] = field(default_factory=dict)

    @cached_property
    def source(self) -> Checkpoint:
        """What the jobs read."""
        return together(self.parts)

    def run(self, save: Path, workers: int) -> Path:
        """Do it; returns the new checkpoint's folder.

        Raises:
            CherryError: if the source is damaged, or the target cannot be written.
        """
        count = workers or len(os.sched_getaffinity(0))
        with new_folder(save, written_bytes(self.jobs) + SPARE) as partial:
            (partial / CHECKPOINT).mkdir()
            for name, content in self.beside.items():
                write_flushed(partial / name, content)
            reports = run_jobs(self.source, partial / CHECKPOINT, self.jobs, count)
            read = {name: chunks for report in reports for name, chunks in report.read.items()}

            def lineage(manifest: Manifest) -> dict[str, Any]:
                return record(self.operation, manifest, self._parents(read), **self.details)

            return publish(partial, save, reports, self.objects, lineage)

    def _parents(self, read: Manifest) -> list[dict[str, Any]]:
        """The records of what was read."""
        found = []
        for start, part in self.parts.items():
            own = {name.removeprefix(start): hashes for name, hashes in read.items() if name.startswith(start)}
            role = {"role": start.removesuffix(".")} if start else {}
            found.append({**parent(part.folder, part.manifest, own), **role})
        return found


def plan_compression(
    load: Path, config: Path, overrides: Sequence[str], options: Options, found: Found | None = None
) -> Surgery:
    """Look at everything that a compression needs.

    Args:
        load: the source, see `open_checkpoint`.
        config: of the compressed model.
        overrides: as in `config.load`.
        options: how.
        found: by the search that gave `options.groups`, for the lineage.

    Raises:
        CherryError: if something does not fit.
    """
    wanted = _one_model(config, overrides)
    recurrence, megatron, depths = wanted.recurrence, wanted.megatron, wanted.depths
    source = open_checkpoint(load)
    layers = source_layers(source)
    _check_dense(source)
    check_fit(source, layers, config, megatron)
    check_trained(source, recurrence, config, megatron, (), wanted.changed)
    _check_depths(source, layers, config, depths, layers.depths <= depths)
    with naming(config):
        _check_moments(options, recurrence, depths if layers.depths < depths else 0)
        groups = make_groups(options.groups, len(layers.layers), recurrence)
    mixes = mix(groups, options.method, options.weights, options.keep)
    alignment = _alignment(source, layers, config, megatron, options)
    with naming(config):
        jobs = _jobs(source, layers, config, wanted, mixes, alignment, options)
    moments = options.optimizer == "average"
    source.check([name for job in jobs for name in job.reads])
    calibration = alignment and alignment.calibration
    details: dict[str, Any] = {
        **configuration(config, wanted),
        "options": {**asdict(options), "calibration": calibration and calibration.record()},
        "plan": [{"layers": mixed.members, "weights": mixed.weights} for mixed in mixes],
        **({"search": asdict(found)} if found else {}),
    }
    pattern = recurrence.parsed
    lines = [
        f"source      {source.folder}: {len(layers.layers)} layers",
        *(_describe(pattern, layer, mixed) for layer, mixed in enumerate(mixes)),
        *_uncommon(len(layers.layers), groups),
        *_changed(source, wanted),
        f"method      {options.method}, corrections of rank {recurrence.loop_rank}, alignment {options.align}"
        + (f" of {calibration.tokens:,} tokens, {calibration.folder}" if calibration else ""),
        *([_tell(found)] if found else []),
        *([f"prediction  {layers.depths} depths taken over, {depths - layers.depths} drawn"] if depths else []),
        f"optimizer   {'its moments are averaged' if moments else 'its state is dropped; training starts it anew'}",
    ]
    made = objects(source, pattern, moments, depths)
    return Surgery({"": source}, jobs, made, "compress-depth", details, lines)


def _one_model(config: Path, overrides: Sequence[str]) -> Outline:
    """The outline of a configuration that is not of a mixture."""
    wanted = outline(config, overrides)
    if wanted.moee is not None:
        raise CherryError(
            f"{config}: cherry compress-depth writes one model, and moee makes a mixture; take moee out (cherry "
            "assemble-moee makes one of single models)"
        )
    return wanted


def _check_dense(source: Checkpoint) -> None:
    """Without vectors of each loop no tensor shows that a source has loops."""
    walked = recorded_recurrence(source)
    if walked is not None and walked.loops > 1:
        raise CherryError(
            f"{source.folder} is a recurrent model already (recurrence.pattern {walked.pattern}, {walked.loops} "
            "loops, by its record); name one without loops, such as --expand makes of it"
        )


def _check_moments(options: Options, recurrence: Recurrence, more_depths: int) -> None:
    if options.method == "random" and recurrence.loop_rank:
        raise CherryError("--method random keeps nothing that recurrence.loop_rank could correct; set it to 0")
    if options.optimizer == "average" and recurrence.loop_rank:
        raise CherryError("--optimizer average: there are no moments for recurrence.loop_rank; use drop")
    if options.optimizer == "average" and more_depths:
        raise CherryError(
            f"--optimizer average: there are no moments for new layers of mtp.depths {more_depths}; use drop"
        )


def _alignment(
    source: Checkpoint, layers: Source, config: Path, megatron: dict[str, Any], options: Options
) -> Alignment | None:
    if options.align == "none":
        return None
    calibration = None
    if options.calibration is not None:
        calibration = open_calibration(options.calibration)
        calibration.check(source, layers)
    hidden = source.tensors[layers.top[EMBEDDING]].shape[1]
    heads, groups, _ = heads_of(config, megatron, hidden)
    return Alignment(heads, groups, bool(megatron.get("swiglu")), calibration)


def _jobs(
    source: Checkpoint,
    layers: Source,
    config: Path,
    wanted: Outline,
    mixes: Sequence[Mix],
    alignment: Alignment | None,
    options: Options,
) -> list[Job]:
    std = initial_std(config, wanted.megatron)
    output_std = std * wanted.recurrence.output_scale
    draw = partial(Drawn, std=std, output_std=output_std, seed=options.seed) if options.method == "random" else None
    moments, gated = options.optimizer == "average", bool(wanted.megatron.get("swiglu"))
    jobs = compression(source, layers, wanted.recurrence, mixes, alignment, moments, gated, draw)
    return jobs + new_depths(source, layers, wanted.depths, std, output_std, options.seed)


def initial_std(config: Path, megatron: dict[str, Any]) -> float:
    """The standard deviation of initial weights.

    Raises:
        CherryError: if it is none.
    """
    std = megatron.get("init-method-std", INIT_STD)
    if not isinstance(std, int | float) or not 0 < std < 1e3:
        raise CherryError(f"{config}: megatron.init-method-std must be a positive number (it is {std})")
    return std


def configuration(config: Path, wanted: Outline) -> dict[str, Any]:
    """What a record keeps of a configuration, overrides included, because its file may change."""
    return {"config": str(config), "settings": wanted.settings, "recurrence": asdict(wanted.recurrence)}


def plan_expansion(load: Path, config: Path, overrides: Sequence[str]) -> Surgery:
    """Look at everything that the expansion of a recurrent checkpoint into a dense one needs.

    Args:
        load: the recurrent checkpoint.
        config: that it was trained with.
        overrides: as in `config.load`.
    """
    wanted = _one_model(config, overrides)
    recurrence, megatron, depths = wanted.recurrence, wanted.megatron, wanted.depths
    source = open_checkpoint(load)
    layers = source_layers(source, looped=True, pattern=recurrence.parsed)
    check_fit(source, layers, config, megatron)
    _check_depths(source, layers, config, depths, layers.depths == depths)
    dense, jobs = expansion(source, layers, recurrence, config)
    check_trained(source, recurrence, config, megatron)
    source.check([name for job in jobs for name in job.reads])
    lines = [
        f"source      {source.folder}: {len(layers.layers)} stored layers",
        f"target      {len(dense.layers)} layers, pattern {dense.symbols}",
        *([f"note        {further}"] if (further := recurrence.further_loops) else []),
        "optimizer   its state is dropped",
    ]
    details = {**configuration(config, wanted), "pattern": dense.symbols}
    return Surgery({"": source}, jobs, objects(source, dense, False, depths), "expand", details, lines)


def summary(surgery: Surgery, workers: int) -> str:
    """What `--dry-run` prints."""
    tensors = {name for job in surgery.jobs for name in job.reads}
    read = sum(surgery.source.tensors[name].nbytes for name in tensors)
    count = workers or len(os.sched_getaffinity(0))
    return "\n".join(
        [
            *surgery.lines,
            f"reads       {read / 1e9:,.3f} GB in {len(tensors)} tensors"
            + ("" if surgery.source.manifest else " (no manifest: hashed while read, not verified)"),
            f"writes      {written_bytes(surgery.jobs) / 1e9:,.3f} GB",
            f"memory      about {peak_bytes(surgery.jobs, count) / 1e9:,.3f} GB of tensors in {count} processes",
        ]
    )


def _describe(pattern: Pattern, layer: int, mixed: Mix) -> str:
    first, last = len(pattern.prelude), len(pattern.prelude) + len(pattern.core)
    part = "prelude" if layer < first else "core" if layer < last else "coda"
    return f"layer {layer:<5} {part:<8} from {', '.join(map(str, mixed.members))}"


def _uncommon(layers: int, groups: Sequence[tuple[int, ...]]) -> list[str]:
    """The source layers that are not in one group."""
    times = Counter(layer for group in groups for layer in group)
    none = [layer for layer in range(layers) if not times[layer]]
    several = [layer for layer in range(layers) if times[layer] > 1]
    return [
        f"{name:<11} {', '.join(map(str, found))}"
        for name, found in (("in none", none), ("in several", several))
        if found
    ]


def _changed(source: Checkpoint, wanted: Outline) -> list[str]:
    """What training will have otherwise than the source; the weights are the same."""
    found = other_function(source, wanted.megatron)
    return [f"changed     {key} {found[key][0]} for {found[key][1]}" for key in wanted.changed if key in found]


def _tell(found: Found) -> str:
    return (
        f"search      loss {found.loss:.6f} of {found.scored} groupings, seed {found.seed} (adjacent "
        f"{found.adjacent:.6f}, slots {found.slots:.6f}): --groups {found.groups}"
    )


def _check_depths(source: Checkpoint, layers: Source, config: Path, depths: int, fits: bool) -> None:
    if not fits:
        raise CherryError(
            f"{config}: mtp.depths is {depths}, but {source.folder} has {layers.depths}, which are taken over; set "
            "it so"
        )
