"""What a checkpoint was trained as, by what it says of itself, held against a configuration.

Tensors show sizes. What they compute also depends on how they are walked, on Megatron's arguments, and on the
tokens they were trained with: those stand in a checkpoint's lineage and in its common state.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cherry_megatron.errors import CherryError
from cherry_megatron.model.options import Recurrence
from cherry_megatron.sections import section_of
from cherry_megatron.storage.checkpoint import Checkpoint
from cherry_megatron.storage.lineage import LINEAGE, chain, read_lineage

# What of a recurrence decides what its weights compute; the number of loops may be meant to be another.
WALK = ("pattern", "order", "injection")
# Settings that no tensor shows and that decide what they compute: flag -> its name in the arguments, default.
FUNCTION: dict[str, tuple[str, Any]] = {
    "rotary-base": ("rotary_base", 10000),
    "norm-epsilon": ("layernorm_epsilon", 1e-5),
    "squared-relu": ("squared_relu", False),
    "rotary-interleaved": ("rotary_interleaved", False),
    "window-size": ("window_size", None),
    "window-attn-skip-freq": ("window_attn_skip_freq", None),
    "softmax-type": ("softmax_type", "vanilla"),
    "no-rope-freq": ("no_rope_freq", None),
    "glu-linear-offset": ("glu_linear_offset", 0.0),
    "activation-func-clamp-value": ("activation_func_clamp_value", None),
}
# The same of experts inside layers; how many of them a token goes to may be meant to be another.
_GATES = {"moe-router-pre-softmax": ("moe_router_pre_softmax", False)}
# What the stack's layers are built with, see rules.py.
_BUILT_WITH: dict[str, Any] = {
    "position_embedding_type": "rope", "normalization": "RMSNorm", "layernorm_zero_centered_gamma": False,
    "rotary_percent": 1.0, "use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None,
    "quick_geglu": False, "multi_latent_attention": False, "use_mup": False, "attention_output_gate": False,
    "qk_l2_norm": False, "apply_residual_connection_post_layernorm": False,
}  # fmt: skip


# What a run may change of the checkpoint that it starts from, if its configuration says so.
TOKENIZER = "megatron.tokenizer-model"
CHANGEABLE = (
    "recurrence.order", "recurrence.injection", TOKENIZER, *(f"megatron.{flag}" for flag in (*FUNCTION, *_GATES)),
)  # fmt: skip

Differences = dict[str, tuple[Any, Any]]  # key of a configuration -> its value, the checkpoint's


def check_trained(
    source: Checkpoint,
    recurrence: Recurrence,
    config: Path,
    megatron: Mapping[str, Any],
    keys: Collection[str] = WALK,
    changed: Collection[str] | None = None,
) -> None:
    """A checkpoint's weights are used as they were trained, as far as its record and its arguments tell.

    Args:
        source: the checkpoint.
        recurrence: of the configuration.
        config: its file, for the message.
        megatron: its `megatron` section by flags.
        keys: what of the recurrence must be the same.
        changed: keys of a run that starts from the checkpoint which may differ; None where nothing starts.

    Raises:
        CherryError: naming the first key of the configuration that differs.
    """
    found = {**other_walk(source, recurrence, keys), **other_function(source, megatron)}
    check_changes(source, config, found, changed)
    arguments = source.arguments()
    for name, wanted in _BUILT_WITH.items():
        if arguments.get(name, wanted) != wanted:
            raise CherryError(
                f"{source.folder} was trained with {name} {arguments[name]!r}; layers here have {wanted!r}"
            )


def check_changes(
    source: Checkpoint, config: Path, found: Differences, changed: Collection[str] | None = None
) -> None:
    """Whatever differs from a checkpoint is named in `changed`, see `check_trained`.

    Raises:
        CherryError: naming the first key that is not, and the way out.
    """
    for key, (ours, theirs) in found.items():
        if key in (changed or ()):
            continue
        ways = ["set it to that or a copy of it" if key == TOKENIZER else "set it so"]
        if changed is not None and key in CHANGEABLE:
            ways.append(f"or name {key} in `changed` to go on otherwise")
        before = recorded_recurrence(source)
        if changed is not None and key == "recurrence.pattern" and before is not None and before.loops == 1:
            ways.append("or make a model of other loops of it by `cherry compress-depth`")
        was = "made for" if key.startswith("recurrence.") and _untrained(source) else "trained with"
        raise CherryError(f"{config}: {key} is {ours}, but {source.folder} was {was} {theirs}; {', '.join(ways)}")


def _untrained(source: Checkpoint) -> bool:
    """Whether surgery has written a checkpoint, by its record."""
    return (read_lineage(source.folder) or {}).get("operation", "pretrain") != "pretrain"


def other_walk(source: Checkpoint, recurrence: Recurrence, keys: Collection[str]) -> Differences:
    """How the layers of a configuration are walked otherwise than a checkpoint's record says.

    Args:
        source: the checkpoint.
        recurrence: of the configuration.
        keys: what of it is compared.
    """
    before = recorded_recurrence(source)
    if before is None:
        return {}
    # Without a loop it does not matter where the core begins, or how it would be walked.
    once = before.loops == recurrence.loops == 1
    return {
        f"recurrence.{key}": (getattr(recurrence, key), getattr(before, key))
        for key in keys
        if _meaning(before, key, once) != _meaning(recurrence, key, once)
    }


def recorded_recurrence(source: Checkpoint) -> Recurrence | None:
    """How a checkpoint's layers are walked, by its record; None if it has none."""
    record = read_lineage(source.folder) or {}
    if record.get("operation") == "expand":  # whose record has the recurrence before it
        known = {"pattern": record.get("pattern")}
    else:
        trained = record["config"] if isinstance(record.get("config"), dict) else record
        known = {key: value for key, value in trained.get("recurrence", {}).items() if key in (*WALK, "loops")}
    if not known:
        return None
    walked: Recurrence = section_of(source.folder / LINEAGE, "recurrence", Recurrence, known)
    return walked


def _meaning(recurrence: Recurrence, key: str, once: bool) -> Any:
    """The loops that a pattern is written with are compared as `loops`."""
    if key == "pattern":
        return recurrence.parsed.layers if once else replace(recurrence.parsed, loops=1)
    return None if once and key in ("order", "injection") else getattr(recurrence, key)


def other_function(source: Checkpoint, megatron: Mapping[str, Any]) -> Differences:
    """Where no tensor shows it, what Megatron's arguments of a training say otherwise than a configuration.

    Args:
        source: the checkpoint.
        megatron: the configuration's `megatron` section by flags.
    """
    arguments, found = source.arguments(), {}
    for flag, (name, default) in (FUNCTION | _gates(source)).items():
        ours, theirs = megatron.get(flag), arguments.get(name, default)
        ours = default if ours is None else ours
        if _plain(ours) != _plain(theirs):
            found[f"megatron.{flag}"] = ours, theirs
    return found


def _gates(source: Checkpoint) -> dict[str, tuple[str, Any]]:
    """What decides the gates of experts inside layers, if such were trained.

    Those that were just assembled have the arguments of the models that they are made of.
    """
    assembled = (read_lineage(source.folder) or {}).get("operation") == "assemble-moee"
    return {} if assembled or not source.experts_inside else _GATES


def check_heads(source: Checkpoint, config: Path, heads: int, groups: int, size: int) -> None:
    """Megatron's arguments of the training name the heads of a configuration.

    Args:
        source: the checkpoint.
        config: the configuration's file, for the message.
        heads: its query heads.
        groups: its query groups.
        size: channels of a head.

    Raises:
        CherryError: naming the first that differs.
    """
    arguments = source.arguments()
    trained = arguments.get("num_attention_heads", heads)
    grouped = arguments.get("group_query_attention", groups != heads)
    theirs = {
        "num-attention-heads": (heads, trained),
        "num-query-groups": (groups, arguments.get("num_query_groups", groups) if grouped else trained),
        "kv-channels": (size, arguments.get("kv_channels", size)),
    }
    for key, (ours, found) in theirs.items():
        if found is not None and found != ours:
            raise CherryError(
                f"{config}: megatron.{key} is {ours}, but {source.folder} was trained with {found}; set it so"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def tokenizer_of(checkpoint: Checkpoint) -> str | None:
    """The fingerprint of the tokenizer that a checkpoint was trained with.

    By its record, or that of what it was made from; for checkpoints of before it was recorded by the folder that
    their arguments name, if it is still there.
    """
    recorded = next(
        (r["tokenizer"] for _, r in chain(read_lineage(checkpoint.folder) or {"parents": []}) if "tokenizer" in r),
        None,
    )
    if recorded is not None:
        return str(recorded)
    folder = checkpoint.arguments().get("tokenizer_model")
    if folder is None or not (Path(folder) / "tokenizer.json").is_file():
        return None
    from cherry_megatron.data.tokenizer import fingerprint  # a library that surgery mostly does without

    return fingerprint(Path(folder))


def told_tokenizer(checkpoint: Checkpoint) -> str:
    """The tokenizer that a checkpoint was trained with, for a message: folder, fingerprint, whether it is there.

    Args:
        checkpoint: one of which `tokenizer_of` knows.
    """
    recorded, folder = tokenizer_of(checkpoint), checkpoint.arguments().get("tokenizer_model")
    if folder is None:
        return str(recorded)
    from cherry_megatron.data.tokenizer import fingerprint  # see above

    if not (Path(folder) / "tokenizer.json").is_file():
        return f"{folder} ({recorded}, which is missing there now)"
    other = "" if fingerprint(Path(folder)) == recorded else ", where another one is now"
    return f"{folder} ({recorded}{other})"
