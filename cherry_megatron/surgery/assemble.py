"""`cherry assemble-moee`: single models become the experts of one mixture, and an expert a single model again.

Tensors are taken over as they are, under other names; the router is new. All of it is the granularity `model`; the
granularity `layer` is assemble_layers.py.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cherry_megatron.config import outline
from cherry_megatron.errors import CherryError
from cherry_megatron.model.options import Mixture, Recurrence
from cherry_megatron.storage.checkpoint import Checkpoint, open_checkpoint
from cherry_megatron.storage.fits import check_model
from cherry_megatron.storage.layers import DEPTHS, EMBEDDING, sublayer_prefixes
from cherry_megatron.storage.trained import WALK, tokenizer_of, told_tokenizer
from cherry_megatron.surgery.compress import Surgery, configuration
from cherry_megatron.surgery.depth import objects
from cherry_megatron.surgery.jobs import Constant, Copy, Normal
from cherry_megatron.surgery.writing import Job, Spec


def expert_prefix(number: int) -> str:
    """What the names of an expert's tensors begin with."""
    return f"experts.{number}."


def plan_assembly(loads: Sequence[Path], config: Path, overrides: Sequence[str], seed: int) -> Surgery:
    """Look at everything that assembling a mixture needs.

    Args:
        loads: the experts in order, see `open_checkpoint`; one may be named several times.
        config: of the mixture.
        overrides: as in `config.load`.
        seed: of the router's first weights.

    Raises:
        CherryError: if something does not fit, naming the difference.
    """
    wanted = outline(config, overrides)
    recurrence, megatron, depths, mixture = wanted.recurrence, wanted.megatron, wanted.depths, wanted.moee
    if mixture is None:
        raise CherryError(
            f"{config} has no section moee, and recurrence.pattern no 'E'; name the configuration of the mixture"
        )
    if len(loads) != mixture.experts:
        raise CherryError(f"--load names {len(loads)} checkpoints, but {config} has moee.experts {mixture.experts}")
    parts = {expert_prefix(number): open_checkpoint(load) for number, load in enumerate(loads)}
    tensors = {start: tensors_of(part, recurrence, config, megatron, depths) for start, part in parts.items()}
    check_alike(list(parts.values()), list(tensors.values()))
    check_tokenizer(first := parts[expert_prefix(0)], config, megatron)
    jobs: list[Job] = []
    for start, part in parts.items():
        for name, stored in tensors[start].items():
            found = part.tensors[stored]
            jobs.append(Copy((start + stored,), (Spec(start + name, found.dtype, found.shape),)))
    jobs += _router(mixture, first, tensors[expert_prefix(0)][EMBEDDING], seed)
    ahead = not depths and any(name.startswith(DEPTHS) for part in parts.values() for name in part.model)
    lines = [
        *(f"expert {number:<4} {part.folder}" for number, part in enumerate(parts.values())),
        f"router      new, from seed {seed}",
        *(["prediction  of tokens behind the next one is left out: mtp.depths is 0"] if ahead else []),
        "optimizer   its state is dropped; training starts it anew",
    ]
    details = {**configuration(config, wanted), "moee": asdict(mixture), "seed": seed}
    made = mixture_objects(first, recurrence, list(parts), depths)
    return Surgery(parts, jobs, made, "assemble-moee", details, lines)


def plan_extraction(load: Path, config: Path, overrides: Sequence[str], number: int) -> Surgery:
    """Look at everything that taking an expert out of a mixture needs.

    Args:
        load: the mixture's checkpoint.
        config: of the mixture.
        overrides: as in `config.load`.
        number: of the expert, counted from 0.

    Raises:
        CherryError: if there is no such expert, or it is not a model of the configuration.
    """
    wanted = outline(config, overrides)
    recurrence, megatron, depths = wanted.recurrence, wanted.megatron, wanted.depths
    source, start = open_checkpoint(load), expert_prefix(number)
    if source.experts_inside:
        raise CherryError(
            f"{source.folder} has experts inside layers, which share all else, so that none can be taken out as a "
            "model; --extract is for mixtures of whole models (moee)"
        )
    if not source.experts:
        raise CherryError(f"{source.folder} is a single model; name a mixture, or leave --extract out")
    if number not in source.experts:
        raise CherryError(f"{source.folder} holds no expert {number}; name one from 0 to {max(source.experts)}")
    expert = source.under(start)
    jobs: list[Job] = []
    for name, stored in tensors_of(expert, recurrence, config, megatron, depths).items():
        found = expert.tensors[stored]
        jobs.append(Copy((start + stored,), (Spec(name, found.dtype, found.shape),)))
    lines = [f"source      {source.folder}: expert {number}", "optimizer   its state is dropped"]
    details = {**configuration(config, wanted), "expert": number}
    made = objects(source, recurrence.parsed, False, depths)
    return Surgery({"": source}, jobs, made, "extract-expert", details, lines)


def tensors_of(
    source: Checkpoint, recurrence: Recurrence, config: Path, megatron: dict[str, Any], depths: int
) -> dict[str, str]:
    """An expert's tensors, with so many depths: the name that it needs -> the one that the checkpoint has.

    Raises:
        CherryError: if it is not a model of this configuration.
    """
    if source.experts:
        raise CherryError(f"{source.folder} is a mixture; name single models, such as --extract makes of it")
    layers = check_model(source, recurrence, config, megatron, (*WALK, "loops"))
    if depths not in (0, layers.depths):
        raise CherryError(
            f"{config}: mtp.depths is {depths}, but {source.folder} has {layers.depths}; set it so, or to 0 to go "
            "without"
        )
    found = {name: stored for name, stored in layers.top.items() if depths or not name.startswith(DEPTHS)}
    for layer, sublayers in enumerate(sublayer_prefixes(recurrence.parsed)):
        for place, (_, prefix) in enumerate(sublayers):
            found |= {prefix + role: name for role, name in layers.layers[layer][place].names.items()}
    source.check(list(found.values()))
    return found


def check_alike(parts: list[Checkpoint], tensors: list[dict[str, str]]) -> None:
    """Experts have one shape, one type and one tokenizer.

    Raises:
        CherryError: naming the first that differs.
    """
    first = parts[0]
    for part, names in zip(parts, tensors, strict=True):
        for name, stored in names.items():
            ours, theirs = part.tensors[stored], first.tensors[tensors[0][name]]
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
                raise CherryError(
                    f"{part.folder}: {name} is {ours.dtype} {list(ours.shape)}, but {theirs.dtype} "
                    f"{list(theirs.shape)} in {first.folder}; experts are alike"
                )
    tokenizers = [(part, found) for part in parts if (found := tokenizer_of(part)) is not None]
    for part, found in tokenizers[1:]:
        known, wanted = tokenizers[0]
        if found != wanted:
            raise CherryError(
                f"{part.folder} was trained with the tokenizer {told_tokenizer(part)}, {known.folder} with "
                f"{told_tokenizer(known)}; experts predict the same tokens"
            )


def check_tokenizer(source: Checkpoint, config: Path, megatron: dict[str, Any]) -> None:
    """The configuration's tokenizer, if it is there, is that of what is assembled.

    Raises:
        CherryError: if it is another.
    """
    known, folder = tokenizer_of(source), megatron.get("tokenizer-model")
    if known is None or folder is None or not (Path(folder) / "tokenizer.json").is_file():
        return
    from cherry_megatron.data.tokenizer import fingerprint  # a library that surgery mostly does without

    if (found := fingerprint(Path(folder))) != known:
        raise CherryError(
            f"{config}: megatron.tokenizer-model is {folder} ({found}), but {source.folder} was trained with "
            f"{told_tokenizer(source)}; set it to that or a copy of it"
        )


def _router(mixture: Mixture, source: Checkpoint, embedding: str, seed: int) -> list[Job]:
    """A router as training draws one, of the experts' type; it is centred before the first step."""
    dtype, vocabulary = source.tensors[embedding].dtype, source.tensors[embedding].shape[0]
    weights = mixture.router(vocabulary)
    specs = tuple(Spec(f"router.{name}", dtype, shape) for name, (shape, _) in weights.items())
    return [
        Normal(specs, tuple(std for _, std in weights.values()), seed),
        Constant((Spec("router.centre", dtype, (mixture.experts,)),), 0.0),
    ]


def mixture_objects(
    source: Checkpoint, recurrence: Recurrence, starts: Sequence[str], depths: int
) -> dict[str, Any]:
    """What a mixture's checkpoint holds besides tensors: one common state, and what each expert has."""
    one: dict[str, Any] = objects(source, recurrence.parsed, False, depths)
    common = {name: value for name, value in one.items() if name.startswith("common_state")}
    for (state,) in common.values():
        state["args"].state["hybrid_layer_pattern"] = None  # as training leaves it for a mixture
    extra = {start + name: value for start in starts for name, value in one.items() if name not in common}
    return extra | common
