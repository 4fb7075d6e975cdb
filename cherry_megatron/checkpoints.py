"""What a run loads: where it starts, and whether that fits."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cherry_megatron.config import Config, Data
from cherry_megatron.data.tokenizer import fingerprint
from cherry_megatron.errors import CherryError
from cherry_megatron.model.options import MultiToken, Recurrence
from cherry_megatron.model.pattern import parse
from cherry_megatron.runs import checkpoint_to_load, own_checkpoints
from cherry_megatron.storage.checkpoint import OPTIMIZER, Checkpoint
from cherry_megatron.storage.fallback import whole
from cherry_megatron.storage.fits import check_model
from cherry_megatron.storage.integrity import INTEGRITY
from cherry_megatron.storage.layers import LOOP_A
from cherry_megatron.storage.lineage import LINEAGE, read_lineage
from cherry_megatron.storage.tracker import newest, way_back
from cherry_megatron.storage.trained import (
    FUNCTION,
    TOKENIZER,
    WALK,
    Differences,
    check_changes,
    other_function,
    other_walk,
    tokenizer_of,
    told_tokenizer,
)

# What a run may not change once it has a checkpoint.
_SHAPE = {
    "hidden": "megatron.hidden-size", "ffn": "megatron.ffn-hidden-size", "heads": "megatron.num-attention-heads",
    "groups": "megatron.num-query-groups", "head_size": "megatron.kv-channels", "gated": "megatron.swiglu",
    "vocabulary": "megatron.padded-vocab-size", "tied": "tied embedding and output",
    "experts": "megatron.num-experts", "expert_ffn": "megatron.moe-ffn-hidden-size",
}  # fmt: skip
# What a run is trained for.
_OBJECTIVE = {
    "data": ("shuffle",), "mtp": ("weight",), "sgt": ("marks", "top_loss", "alpha", "alpha_start", "alpha_steps"),
    "moee": ("top_k", "prefix"),
}  # fmt: skip
# What the record of every training has of its recurrence.
_RECORDED = {"pattern", "order", "injection", "loop_scales"}
# The same of experts inside layers.
_ROUTED = ("moe-router-topk", "moe-router-pre-softmax")
# What decides which text is held out.
_HELD_OUT = (
    "global-batch-size", "eval-global-batch-size", "seq-length", "split", "data-path", "train-data-path",
    "valid-data-path", "data-args-path",
)  # fmt: skip
# What decides which text comes in which order.
_ORDER = ("seed", *(flag for flag in _HELD_OUT if not flag.startswith(("eval", "valid"))))
# What else decides what an evaluation finds.
_EVALUATED = (
    ("evaluation", "batches"), ("data", "shuffle"), ("sgt", "marks"), ("moee", "top_k"), ("moee", "prefix"),
)  # fmt: skip


def unloadable(config: Config, training: bool = True) -> list[str]:
    """Why the checkpoint to start from cannot be loaded, one sentence each.

    Args:
        config: of the run.
        training: see `checkpoint_to_load`.

    Raises:
        CherryError: if there should be a checkpoint and is none, or it is not one of this model.
    """
    folder = checkpoint_to_load(config, training)
    if folder is None:
        return []
    own = own_checkpoints(config) is not None
    try:
        checkpoint = whole(folder, own)
    except CherryError as error:
        raise CherryError(f"{error}{way_back(folder)}") from None
    if own:
        return _changes(config, checkpoint)
    if other := _other_kind(config, checkpoint):
        return [f"megatron.load {folder} {other}"]
    if foreign := _foreign(checkpoint):
        return [
            f"megatron.load {folder} is not one of this project: {foreign}; make one of it by `cherry "
            "compress-depth` with this configuration, which takes each layer as it is where there are as many"
        ]
    _check_model(config, checkpoint)
    found = _missing_depths(config, checkpoint) + _unchanged(config, checkpoint)
    if config.value("finetune") or config.value("no-load-optim"):
        return found
    if any(name.startswith(OPTIMIZER) for name in checkpoint.tensors):
        return found
    return [
        f"megatron.load {folder} holds no optimizer state; set megatron.finetune: true to start from its weights"
    ]


def _foreign(checkpoint: Checkpoint) -> str | None:
    """What Megatron would stumble over in a checkpoint that Megatron-LM has saved; None if there is nothing."""
    if not (checkpoint.folder / INTEGRITY).is_file():
        return f"it has no {INTEGRITY}"
    if "decoder.final_layernorm.weight" in checkpoint.model:
        return "its layers have the names of Megatron's GPTModel"
    return None


def _check_model(config: Config, checkpoint: Checkpoint) -> None:
    """Weights of another run go on as the function that they were; Megatron looks at their sizes alone."""
    one, walk = _one_model(checkpoint), _walk(checkpoint)
    check_model(one, config.recurrence, config.source, config.all_flags, walk, config.changed)
    check_changes(checkpoint, config.source, _other_tokenizer(config, checkpoint), config.changed)


def _one_model(checkpoint: Checkpoint) -> Checkpoint:
    """A mixture's experts are alike."""
    return checkpoint.under(f"experts.{min(checkpoint.experts)}.") if checkpoint.experts else checkpoint


def _walk(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What of the recurrence is held: what compression has made was never walked, but corrections have an order."""
    compressed = (read_lineage(checkpoint.folder) or {}).get("operation") == "compress-depth"
    corrected = any(name.endswith(LOOP_A) for name in checkpoint.model)
    return ("pattern",) if compressed and not corrected else WALK


def _other_tokenizer(config: Config, checkpoint: Checkpoint) -> Differences:
    ours, theirs = tokenizer_of_run(config).get("tokenizer"), tokenizer_of(checkpoint)
    if None in (ours, theirs) or ours == theirs:
        return {}
    return {TOKENIZER: (f"{config.value('tokenizer-model')} ({ours})", told_tokenizer(checkpoint))}


def _differences(config: Config, checkpoint: Checkpoint) -> Differences:
    """What a start has otherwise than the checkpoint, see `changed`."""
    one = _one_model(checkpoint)
    return {
        **other_walk(one, config.recurrence, _walk(checkpoint)),
        **other_function(one, config.all_flags),
        **_other_tokenizer(config, checkpoint),
    }


def _unchanged(config: Config, checkpoint: Checkpoint) -> list[str]:
    """What is named in `changed` and is not."""
    found = _differences(config, checkpoint)
    return [
        f"`changed` names {key}, of which {checkpoint.folder} is not known to have another; take it out"
        for key in config.changed
        if key not in found
    ]


def _missing_depths(config: Config, checkpoint: Checkpoint) -> list[str]:
    """Megatron's own sentence is a list of tensors."""
    start = f"experts.{min(checkpoint.experts)}.mtp." if checkpoint.experts else "mtp."
    held = sum(name.startswith(start) and name.endswith("eh_proj.weight") for name in checkpoint.model)
    if held >= config.mtp.depths:
        return []
    return [
        f"megatron.load {checkpoint.folder} holds {held} of mtp.depths {config.mtp.depths}; only a compression of "
        "depth (`cherry compress-depth`) adds some, and a mixture has its experts' (`cherry assemble-moee`)"
    ]


def _other_kind(config: Config, checkpoint: Checkpoint) -> str | None:
    """What a checkpoint is instead of what the configuration describes, and the way out; None if it is that."""
    stored, wanted = len(checkpoint.experts), config.moee.experts if config.moee else 0
    if stored == wanted:
        return _other_layers(config, checkpoint)
    if not stored:
        return (
            f"is a single model, and moee.experts is {wanted}: make a mixture of {wanted} by `cherry assemble-moee`"
        )
    extract = "take single models out of it by `cherry assemble-moee --extract`"
    if not wanted:
        return f"is a mixture of {stored} models, and the configuration has no section moee: {extract}"
    return f"is a mixture of {stored} models, and moee.experts is {wanted}: {extract}, and assemble those anew"


def _other_layers(config: Config, checkpoint: Checkpoint) -> str | None:
    """The same of experts inside layers."""
    stored, wanted = checkpoint.experts_inside, config.shape.experts
    if stored == wanted:
        return None
    if not stored:
        return (
            f"has no experts inside layers, and megatron.num-experts is {wanted}: `cherry assemble-moee` makes "
            f"them of {wanted} such models"
        )
    return f"has {stored} experts in each layer 'E', and the configuration {wanted or 'none'}; name another"


def _changes(config: Config, checkpoint: Checkpoint) -> list[str]:
    """What differs from the model that a run's own checkpoint was trained as."""
    before = _record(checkpoint.folder)
    if before is None:
        return []
    # Runs of before there were corrections, or routers, of each loop have no word of them.
    ours, theirs = asdict(config.recurrence), {"loop_rank": 0, "loop_routers": False, **before["recurrence"]}
    found = [
        (f"recurrence.{key}", theirs[key], ours[key])
        for key in ("loop_scales", "loop_rank", "loop_routers", "pattern", "order", "injection")
        if _meaning(theirs, key) != _meaning(ours, key)
    ]
    trained = replace(_flags_of(config, before), recurrence=Recurrence(before["recurrence"]["pattern"]))
    found += [(name, getattr(trained.shape, key), getattr(config.shape, key)) for key, name in _SHAPE.items()]
    found += [(f"megatron.{flag}", trained.value(flag), config.value(flag)) for flag in FUNCTION]
    found += [("mtp.depths", _setting(before, "mtp", "depths"), config.mtp.depths)]
    found += [(f"moee.{key}", old, new) for key, old, new in _mixture_changes(config, before.get("moee"))]
    tokenizer = _other_tokenizer(config, checkpoint)
    found += [(key, theirs, ours) for key, (ours, theirs) in tokenizer.items()]
    return [
        f"the run {config.run} was trained with {key} {old!r}, not {new!r}; choose another run, whose "
        "megatron.load may name this one"
        for key, old, new in found
        if old != new or key.startswith("recurrence.")
    ]


def _mixture_changes(config: Config, before: dict[str, Any] | None) -> list[tuple[str, Any, Any]]:
    """What decides which weights a mixture has; a single model has none of it."""
    ours = {} if config.moee is None else asdict(config.moee)
    keys = ("experts", "router_hidden")
    return [(key, (before or {}).get(key), ours.get(key)) for key in keys]


def _meaning(recurrence: dict[str, Any], key: str) -> Any:
    """A value as far as stored weights depend on it: without weights of each loop their number is free."""
    if key != "pattern":
        return recurrence[key]
    pattern = parse(recurrence[key])
    of_loops = any(recurrence[kind] for kind in ("loop_scales", "loop_rank", "loop_routers"))
    return pattern if of_loops else replace(pattern, loops=1)


def _record(folder: Path) -> dict[str, Any] | None:
    """The configuration that a checkpoint was trained with, if its record has it."""
    found = (read_lineage(folder) or {}).get("config")
    if not isinstance(found, dict):
        return None
    kinds = {"recurrence": dict, "megatron": dict, "flags": list}
    whole = all(isinstance(found.get(name), kind) for name, kind in kinds.items())
    whole = whole and all(isinstance(found.get(name, {}), dict) for name in ("data", "evaluation", *_OBJECTIVE))
    whole = whole and all(isinstance(flag, str) for flag in found["flags"])
    if not whole or not {*found["recurrence"]} >= _RECORDED or not isinstance(found["recurrence"]["pattern"], str):
        raise CherryError(f"{folder / LINEAGE}: its `config` is not that of a training; restore the checkpoint")
    return found


def _flags_of(config: Config, before: dict[str, Any]) -> Config:
    """A configuration with Megatron's flags as they were recorded."""
    return replace(config, megatron=before["megatron"], flags=tuple(before["flags"]))


def other_losses(config: Config) -> list[str]:
    """The keys whose values differ from training's, so that losses do not compare."""
    folder = checkpoint_to_load(config)
    before = None if folder is None else _record(folder)
    if before is None:
        return []
    trained = _flags_of(config, before)
    found = [flag for flag in (*_HELD_OUT, *_ROUTED) if trained.value(flag) != config.value(flag)]
    ours, theirs = config.as_dict(), before
    found += [
        f"{section}.{key}"
        for section, key in _EVALUATED
        if _setting(ours, section, key) != _setting(theirs, section, key)
    ]
    if _masked_prefix(before) != config.prefix and "moee.prefix" not in found:
        found.append("data.prefix or moee.prefix")
    return found


def _setting(settings: dict[str, Any], section: str, key: str) -> Any:
    """A value of a recorded configuration, from which sections of defaults may be left out."""
    defaults: dict[str, Any] = {"data": Data(), "mtp": MultiToken()}
    return {**(asdict(defaults[section]) if section in defaults else {}), **settings.get(section, {})}.get(key)


def _masked_prefix(before: dict[str, Any]) -> int:
    """The tokens at a sequence's beginning that carried no loss, by a recorded configuration."""
    return max(before.get(section, {}).get("prefix", 0) for section in ("data", "moee"))


def start_from(config: Config) -> dict[str, Any]:
    """Megatron's flags for where to start: the run's own checkpoint with all its state, or `megatron.load`."""
    checkpoint = checkpoint_to_load(config, training=True)
    if checkpoint is None:
        return {"load": None}
    own = {"finetune": False, "no-load-optim": False, "no-load-rng": False} if own_checkpoints(config) else {}
    return {"load": str(checkpoint.parent), **own}


def where_from(config: Config, args: Any) -> str:
    """The first line of a training: what it starts from."""
    further = f"; {config.recurrence.further_loops}" if config.recurrence.further_loops else ""
    if args.load is None:
        steps = config.run / "steps.jsonl"  # made before the first step
        lost = steps.exists() and steps.stat().st_size > 0  # killed before the first save
        return f"starts from new weights{'; the steps before left no checkpoint' if lost else ''}{further}"
    checkpoint = Checkpoint(newest(Path(args.load)))
    if own_checkpoints(config) is None:
        found = _differences(config, checkpoint) if config.changed else {}
        start = f"starts from {checkpoint.folder}{' (weights only)' if args.finetune else ''}"
    elif args.train_iters is not None and args.iteration >= args.train_iters:
        return f"is at step {args.iteration} of {args.train_iters} already (megatron.train-iters): nothing to train"
    else:
        found = _other_learning(config, checkpoint)
        start = f"goes on from step {args.iteration}, {checkpoint.folder}"
    found |= other_walk(checkpoint, config.recurrence, ("loops",))
    changes = "".join(f", with {key} {ours} for {theirs}" for key, (ours, theirs) in found.items())
    return f"{start}{changes}{further}"


def _other_learning(config: Config, checkpoint: Checkpoint) -> Differences:
    """What makes a run go on with other text than it would have seen, or learn from another teacher."""
    before = _record(checkpoint.folder)
    if before is None:
        return {}
    trained = _flags_of(config, before)
    found = {f"megatron.{flag}": (config.value(flag), trained.value(flag)) for flag in _ORDER}
    section = "distillation"
    ours, theirs = ((settings.get(section) or {}) for settings in (config.as_dict(), before))
    found |= {f"{section}.{key}": (ours.get(key), theirs.get(key)) for key in (*ours, *theirs)}
    return {key: (str(ours), str(theirs)) for key, (ours, theirs) in found.items() if ours != theirs}


def unchanged_start(config: Config, args: Any) -> None:
    """See that the run, whose lock is held now, is still what this start was planned for.

    Raises:
        CherryError: if another training has saved a checkpoint there meanwhile, or the run was trained for
            something else.
    """
    now = checkpoint_to_load(config, training=True)
    if (None if now is None else str(now.parent)) != args.load:
        raise CherryError(f"the run {config.run} got a checkpoint while this training started; start it again")
    before = _record(now) if now is not None and own_checkpoints(config) else None
    if before is not None:
        _same_objective(config, before)


def _same_objective(config: Config, before: dict[str, Any]) -> None:
    """What a run is compared for must be one thing from its first step to its last."""
    ours, trained = config.as_dict(), _flags_of(config, before)
    found = [
        (f"{section}.{key}", _setting(before, section, key), _setting(ours, section, key))
        for section, keys in _OBJECTIVE.items()
        for key in keys
    ]
    found += [(f"megatron.{flag}", trained.value(flag), config.value(flag)) for flag in _ROUTED]
    for key, old, new in found:
        if old != new:
            raise CherryError(
                f"the run {config.run} was trained with {key} {old!r}, not {new!r}; choose another run, whose "
                "megatron.load can start from this one"
            )
    if _masked_prefix(before) != config.prefix:
        raise CherryError(
            f"the run {config.run} was trained without a loss of the first {_masked_prefix(before)} tokens of a "
            f"sequence (data.prefix or moee.prefix), not of {config.prefix}; choose another run, whose "
            "megatron.load can start from this one"
        )


def tokenizer_of_run(config: Config) -> dict[str, str]:
    """For the record: its fingerprint, because its folder may hold another one later."""
    folder = config.value("tokenizer-model")
    if config.value("tokenizer-type") != "HuggingFaceTokenizer" or folder is None:
        return {}
    return {"tokenizer": fingerprint(Path(folder))}
