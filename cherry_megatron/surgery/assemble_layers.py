"""`cherry assemble-moee`, granularity `layer`: the FFNs of several models become experts inside one model's layers.

Where the configuration's pattern has an `E`, each model's MLP becomes one expert, as it is. All else (embedding,
attention, norms, other MLPs, vectors of each loop, output layer) is averaged over the models, heads and neurons
matched to the first one's before; the residual stream keeps its order, so an expert reads and writes what its MLP
did. Means of what has grown apart from different beginnings are worth nothing, so the models must have a common
ancestor, and the same layers since: two compressions of one model have none in common.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cherry_megatron.config import Outline, outline
from cherry_megatron.errors import CherryError
from cherry_megatron.model.options import Recurrence
from cherry_megatron.model.pattern import AHEAD, MLP, MOE
from cherry_megatron.model.shape import heads_of
from cherry_megatron.storage.checkpoint import Checkpoint, open_checkpoint
from cherry_megatron.storage.layers import (
    DEPTH_NORMS,
    DEPTHS,
    EMBEDDING,
    EXPERT_FC1,
    EXPERT_FC2,
    EXPERT_NORM,
    FC1,
    FC2,
    JOIN,
    LOOP_SCALES,
    ROLES,
    ROUTER,
    inner_prefix,
    sublayer_prefixes,
)
from cherry_megatron.storage.lineage import ancestors, read_lineage
from cherry_megatron.surgery.align import Alignment
from cherry_megatron.surgery.assemble import check_alike, check_tokenizer, expert_prefix, tensors_of
from cherry_megatron.surgery.compress import Surgery, configuration, initial_std
from cherry_megatron.surgery.depth import objects
from cherry_megatron.surgery.jobs import Average, Merge, Router, Stack
from cherry_megatron.surgery.writing import Job, Spec


def plan_layers(loads: Sequence[Path], config: Path, overrides: Sequence[str], seed: int) -> Surgery:
    """Look at everything that making experts inside layers needs.

    Args:
        loads: the models in order, the first of which the others are matched to; see `open_checkpoint`. One may be
            named several times.
        config: of the model with layers `E`.
        overrides: as in `config.load`.
        seed: of the routers' first weights.

    Raises:
        CherryError: if something does not fit, naming the difference.
    """
    wanted = outline(config, overrides)
    _check_configuration(config, wanted, len(loads))
    recurrence, megatron, depths = wanted.recurrence, wanted.megatron, wanted.depths
    parts = {expert_prefix(number): open_checkpoint(load) for number, load in enumerate(loads)}
    # What each model is: the same layers, with one MLP where there will be experts.
    single = replace(recurrence, pattern=recurrence.pattern.replace(MOE, MLP), loop_routers=False)
    tensors = {start: tensors_of(part, single, config, megatron, depths) for start, part in parts.items()}
    check_alike(list(parts.values()), list(tensors.values()))
    first, names = parts[expert_prefix(0)], tensors[expert_prefix(0)]
    check_tokenizer(first, config, megatron)
    ancestor = _common_ancestor(list(parts.values()))
    _check_width(first, names, recurrence, config, megatron)
    heads, groups, _ = heads_of(config, megatron, first.tensors[names[EMBEDDING]].shape[1])
    alignment = Alignment(heads, groups, bool(megatron.get("swiglu")), to_first=True)
    models = _Models(parts, tensors, alignment)
    jobs = list(_jobs(models, recurrence, depths, initial_std(config, megatron), seed))
    predicts = any(name.startswith(DEPTHS) for part in parts.values() for name in part.model)
    ahead = "averaged" if depths else "left out, as mtp.depths is 0"
    lines = [
        *(f"expert {number:<4} {part.folder}" for number, part in enumerate(parts.values())),
        f"ancestor    {ancestor['identity'][:12]}, {ancestor['operation']}",
        f"layers 'E'  {recurrence.parsed.symbols.count(MOE)}, of {len(parts)} experts each; all else is averaged, "
        "matched to expert 0",
        f"routers     new, from seed {seed}",
        *([f"prediction  of tokens behind the next one is {ahead}"] if predicts else []),
        "optimizer   its state is dropped; training starts it anew",
    ]
    details = {
        **configuration(config, wanted), "experts": len(parts), "seed": seed,
        "ancestor": ancestor["identity"],
    }  # fmt: skip
    made = objects(first, recurrence.parsed, False, depths, len(parts))
    return Surgery(parts, jobs, made, "assemble-moee", details, lines)


def _check_configuration(config: Path, wanted: Outline, loads: int) -> None:
    if wanted.moee is not None:
        raise CherryError(
            f"{config}: moee.experts are whole models, and a layer 'E' has experts too; take one of them out"
        )
    experts, rank = wanted.megatron.get("num-experts"), wanted.recurrence.loop_rank
    if experts != loads:
        raise CherryError(f"--load names {loads} checkpoints, but {config} has megatron.num-experts {experts}")
    if rank:
        raise CherryError(
            f"{config}: recurrence.loop_rank {rank}: the mean of corrections does not correct the mean; use 0"
        )


def _check_width(
    first: Checkpoint, names: Mapping[str, str], recurrence: Recurrence, config: Path, megatron: dict[str, Any]
) -> None:
    """An expert is as wide as the MLP that it was."""
    prefix = next(_sublayers(recurrence, MOE))
    found = first.tensors[names[f"{prefix}{FC2}.weight"]].shape[1]
    wanted = megatron.get("moe-ffn-hidden-size", found)
    if wanted != found:
        raise CherryError(f"{config}: megatron.moe-ffn-hidden-size is {wanted}, but {first.folder} has {found}")


def _sublayers(recurrence: Recurrence, wanted: str) -> Iterator[str]:
    """What the names of such sublayers begin with."""
    for sublayers in sublayer_prefixes(recurrence.parsed):
        yield from (prefix for symbol, prefix in sublayers if symbol == wanted)


def _common_ancestor(parts: Sequence[Checkpoint]) -> dict[str, Any]:
    """The nearest record that the weights of all models come from; that of a model itself if all are it.

    Raises:
        CherryError: naming the models that share none with the first one.
    """
    lines: list[dict[str, dict[str, Any]]] = []
    for part in parts:
        record = read_lineage(part.folder)
        if record is None:
            raise CherryError(
                f"{part.folder} has no record of what it was made from (lineage.json), so a common ancestor cannot "
                "be seen; name models that this project has saved"
            )
        lines.append({entry["identity"]: entry for entry in ancestors(record)})
    shared = set(lines[0]).intersection(*lines[1:])
    if not shared:
        strangers = [part for part, line in zip(parts, lines, strict=True) if not set(lines[0]) & set(line)]
        raise CherryError(
            f"{', '.join(str(part.folder) for part in strangers or parts[1:])} and {parts[0].folder} have no "
            "common ancestor since their layers were made (`cherry lineage`), and the mean of their attention "
            "would be worth nothing; name models that branch from one, or make a mixture of whole models (moee)"
        )
    return next(entry for name, entry in lines[0].items() if name in shared)


@dataclass(frozen=True)
class _Models:
    """The checkpoints by their parts' names, the stored names of their tensors, and how they are matched."""

    parts: dict[str, Checkpoint]
    tensors: dict[str, dict[str, str]]
    alignment: Alignment

    def stored(self, name: str) -> tuple[str, ...]:
        """A tensor's name in each model, among all."""
        return tuple(start + names[name] for start, names in self.tensors.items())

    def spec(self, name: str, new: str | None = None, experts: int | None = None) -> Spec:
        """A tensor that is to be, like one of the models', or one of each of several experts."""
        start, part = next(iter(self.parts.items()))
        found = part.tensors[self.tensors[start][name]]
        return Spec(new or name, found.dtype, found.shape if experts is None else (experts, *found.shape))

    def holds(self, name: str) -> bool:
        return name in next(iter(self.tensors.values()))

    def average(self, names: Mapping[str, str]) -> Average:
        """The job that takes plain means: stored name -> new name."""
        return Average(
            tuple(self.stored(name) for name in names), tuple(self.spec(name, new) for name, new in names.items())
        )

    def merge(self, symbol: str, prefix: str) -> Merge:
        """The job that averages an attention or an MLP, matched to the first model's."""
        members = tuple(
            {role: start + names[prefix + role] for role in ROLES[symbol]} for start, names in self.tensors.items()
        )
        writes = tuple(self.spec(prefix + role) for role in ROLES[symbol])
        return Merge(symbol, members, (1.0,) * len(members), writes, self.alignment)


def _jobs(models: _Models, recurrence: Recurrence, depths: int, std: float, seed: int) -> Iterator[Job]:
    pattern, names = recurrence.parsed, next(iter(models.tensors.values()))
    # One job, so that no two of the large matrices are in work at once.
    yield models.average({name: name for name in names if not name.startswith(("decoder.layers.", DEPTHS))})
    for layer, sublayers in enumerate(sublayer_prefixes(pattern)):
        looped = len(pattern.prelude) <= layer < len(pattern.prelude) + len(pattern.core)
        loops = pattern.loops if looped and recurrence.loop_routers else 1
        for symbol, prefix in sublayers:
            if symbol == MOE:
                yield from _experts(models, prefix, loops, std, seed)
                continue
            yield models.merge(symbol, prefix)
            scales = {prefix + role: prefix + role for role in LOOP_SCALES[symbol] if models.holds(prefix + role)}
            if scales:
                yield models.average(scales)
    for number in range(depths):
        start = f"{DEPTHS}{number}."
        yield models.average({start + role: start + role for role in (JOIN, *DEPTH_NORMS)})
        for place, symbol in enumerate(AHEAD):
            yield models.merge(symbol, start + inner_prefix(place))


def _experts(models: _Models, prefix: str, loops: int, std: float, seed: int) -> Iterator[Job]:
    """The jobs of one sublayer `E`."""
    count = len(models.parts)
    roles = (role for role in (f"{FC1}.layer_norm_weight", *LOOP_SCALES[MLP]) if models.holds(prefix + role))
    averaged = {prefix + role: prefix + role.replace(f"{FC1}.layer_norm_", f"{EXPERT_NORM}.") for role in roles}
    yield models.average(averaged)
    for old, new in ((FC1, EXPERT_FC1), (FC2, EXPERT_FC2)):
        name = f"{prefix}{old}.weight"
        yield Stack(models.stored(name), (models.spec(name, f"{prefix}{new}.weight", count),))
    embedding = models.spec(EMBEDDING)
    shape = (count, embedding.shape[1])
    router = Spec(prefix + ROUTER, embedding.dtype, shape if loops == 1 else (loops, *shape))
    yield Router((router,), std, seed)
