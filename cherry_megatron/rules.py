"""What a configuration may say: flags that are fixed, refused or derived, defaults, and contradictions."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cherry_megatron.errors import CherryError, naming
from cherry_megatron.expert_rules import EXPERT_DEFAULTS
from cherry_megatron.flags import check_name, names_of, nearest
from cherry_megatron.model.options import Recurrence
from cherry_megatron.model.plan import check_stages
from cherry_megatron.section_rules import check_sections
from cherry_megatron.storage.trained import CHANGEABLE

if TYPE_CHECKING:
    from cherry_megatron.config import Config

# What the results rest on; a configuration may not turn it off.
_FIXED: dict[str, tuple[Any, str]] = {
    "calculate-per-token-loss": (True, "the loss must not depend on the split into micro-batches and ranks"),
    "use-cpu-initialization": (True, "initial weights must not depend on the layout"),
    "dist-ckpt-optim-fully-reshardable": (True, "a checkpoint must resume under any layout"),
    "use-distributed-optimizer": (
        True,
        "its state resumes under any layout, that of Megatron's other optimizers does not; to replicate the "
        "state, set num-distributed-optimizer-instances to the data-parallel size",
    ),
    "tensorboard-log-interval": (1, "steps.jsonl and throughput are taken from it"),
    "ckpt-format": ("torch_dist", "a checkpoint must resume under any layout"),
    "verify-integrity": (True, "damage must be noticed, and a checkpoint's record is written with its hashes"),
    "position-embedding-type": ("rope", "it is what the recurrent stack is built with"),
    "disable-bias-linear": (True, "it is what the recurrent stack is built with"),
    "normalization": ("RMSNorm", "it is what the recurrent stack is built with"),
    "override-opt-param-scheduler": (True, "the learning rate of a resume is the configuration's"),
    "optimizer": ("adam", "it is the one whose state is known to resume under any layout"),
}
# What would be accepted and not done, or fail deep inside.
_UNSUPPORTED = {
    "reset-attention-mask": "attention is causal over the whole packed sequence",
    "reset-position-ids": "rotary positions count through the whole packed sequence",
    "qk-layernorm": "the attention is built without norms on queries and keys",
    "fp4-format": "the stack has no FP4 context",
    "use-mup": "it would treat copies of the core as embeddings",
    "rotary-percent": "the rotary embedding takes rotary-base alone",
    "use-rope-scaling": "the rotary embedding takes rotary-base alone",
    "rotary-seq-len-interpolation-factor": "the rotary embedding takes rotary-base alone",
    "mtp-detach-heads": "what is predicted ahead trains the whole model",
    "mtp-use-repeated-layer": "each depth of multi-token prediction has a layer of its own",
    "mtp-hybrid-override-pattern": "a depth of multi-token prediction is one attention and one MLP",
    "attention-output-gate": "the attention is built without a gate",
    "add-qkv-bias": "the attention is built without biases",
    "experimental-attention-variant": "the attention is the full one, or that of window-size",
    "multi-latent-attention": "the attention is built with queries, keys and values of their own",
    "apply-layernorm-1p": "the norms are built with plain weights",
    "quick-geglu": "the MLP is built with swiglu or without a gate",
    "init-method-xavier-uniform": "initial weights are drawn with init-method-std",
    "full-validation": "the held-out loss is taken from eval-iters batches",
    "enable-cuda-graph": "it is an older name; use cuda-graph-impl full_iteration",
    "external-cuda-graph": "it is an older name; use cuda-graph-impl full_iteration",
    "use-checkpoint-opt-param-scheduler": "the learning rate of a resume is the configuration's",
    "iterations-to-skip": "nothing is evaluated or saved at these steps; use guards.leave_out",
    "optimizer-cuda-graph": "the guards decide on each update, which a graph replays",
    "mock-data": "training reads the files of `cherry data` alone",
    "per-split-data-args-path": "what it names is not looked at before a run; use train-data-path and its kin",
    "use-persistent-ckpt-worker": "async-save alone writes beside the training, in a thread of each rank",
    "async-strategy": "async-save writes in a thread of each rank",
    "save-retain-interval": "which checkpoints stay is set by checkpoints.keep and keep_every",
    "non-persistent-save-interval": "there is one kind of checkpoint, saved at each save-interval",
    "pretrained-checkpoint": "what a run starts from is set by load, with finetune",
    "ckpt-step": "it would undo every resume; to go back, write the step into latest_checkpointed_iteration.txt",
    "yaml-cfg": "a configuration is a YAML file of this project's own form",
}
_UNSUPPORTED_DEFAULTS = {
    "rotary-percent": 1.0,
    "async-strategy": "nvrx",
}  # of the others Megatron's default is None or False
_POSITIVE = (
    "tensor-model-parallel-size", "pipeline-model-parallel-size", "micro-batch-size", "max-position-embeddings",
    "log-interval", "eval-interval", "eval-iters", "save-interval", "num-distributed-optimizer-instances",
)  # fmt: skip
_NOT_NEGATIVE = ("lr", "min-lr", "clip-grad", "weight-decay", "lr-warmup-iters")
# What follows from other keys.
_DERIVED = {
    "hybrid-layer-pattern": "recurrence.pattern",
    "num-layers": "recurrence.pattern",
    "spec": "recurrence.pattern",
    "num-layers-per-virtual-pipeline-stage": "recurrence.stages",
    "num-virtual-stages-per-pipeline-rank": "recurrence.stages",
    "pipeline-model-parallel-layout": "recurrence.stages",
    "mtp-num-layers": "mtp.depths",
    "mtp-loss-scaling-factor": "mtp.weight",
    "save": "run",
    "tensorboard-dir": "run",
}
# They hold until the run has a checkpoint of its own, which is loaded whole.
_AT_THE_START = ("load", "finetune", "no-load-optim", "no-load-rng")
# Defaults that differ from Megatron's.
_DEFAULTS: dict[str, Any] = {
    "attention-dropout": 0.0,
    "hidden-dropout": 0.0,
    "tokenizer-type": "HuggingFaceTokenizer",
    "no-create-attention-mask-in-dataloader": True,
    "exit-signal-handler": True,
    "log-interval": 10,
    "eval-interval": 1000,
    "eval-iters": 10,
    "dist-ckpt-strictness": "raise_unexpected",
    "no-check-for-nan-in-loss-and-grad": True,  # the guards look at every step's loss and gradient norm
    "rerun-mode": "disabled",  # without that check nothing asks for it, and every step would wait to hear so
}


def fill_in(path: Path, values: Any, flags: Sequence[str] = ()) -> dict[str, Any]:
    """A file's `megatron` section with this project's defaults; refuses unknown and contradictory keys.

    Args:
        path: the file.
        values: the section.
        flags: given beside it, as on Megatron's command line.
    """
    given = by_flag(path, values)
    for key, value in given.items():
        if key in _DERIVED:
            raise CherryError(f"{path}: megatron.{key} follows from `{_DERIVED[key]}`; set that instead")
        if key in _FIXED and value != _FIXED[key][0]:
            wanted, why = _FIXED[key]
            raise CherryError(f"{path}: megatron.{key} must be {wanted}: {why}")
        check_name(key, path)
    fixed = {key: value for key, (value, _) in _FIXED.items()}
    has_experts = given.get("num-experts") is not None or "num-experts" in names_of(flags)
    experts = EXPERT_DEFAULTS if has_experts else {}
    return {**_DEFAULTS, **experts, **given, **fixed}


def changed_keys(path: Path, values: Any) -> tuple[str, ...]:
    """A file's `changed`: what a run may have otherwise than the checkpoint that it starts from.

    Args:
        path: the file.
        values: what it says.

    Raises:
        CherryError: naming a key that it cannot name.
    """
    if not isinstance(values, list) or not all(isinstance(key, str) for key in values):
        raise CherryError(f"{path}: `changed` must be a list of keys, e.g. changed: [megatron.rotary-base]")
    for key in values:
        if key not in CHANGEABLE:
            raise CherryError(f"{path}: `changed` cannot name {key}{nearest(key, CHANGEABLE)}")
        if values.count(key) > 1:
            raise CherryError(f"{path}: `changed` names {key} twice; keep one")
    return tuple(values)


def by_flag(path: Path, values: Any) -> dict[str, Any]:
    """A file's `megatron` section by the flags' own names; a file may also write them with underscores."""
    if not isinstance(values, dict):
        raise CherryError(f"{path}: megatron must hold Megatron's flags and their values")
    found: dict[str, Any] = {}
    for key, value in values.items():
        flag = str(key).replace("_", "-")
        if flag in found:
            raise CherryError(f"{path}: megatron.{flag} is set twice, with - and with _; keep one")
        found[flag] = value
    return found


def check(config: "Config", world: int | None = None) -> None:
    """Refuse contradictions between keys that would otherwise surface deep inside Megatron.

    Args:
        config: it.
        world: number of ranks; by default this job's.
    """
    megatron_keys = names_of(config.flags)
    for key in megatron_keys & set(_DERIVED):
        raise CherryError(f"--{key} follows from `{_DERIVED[key]}`; set that instead")
    for key in megatron_keys & set(_AT_THE_START):
        raise CherryError(f"--{key} would undo every resume; set megatron.{key}, which holds for the first start")
    with naming(config.source):
        for flag, (wanted, why) in _FIXED.items():
            if not config.holds(flag, wanted):
                raise CherryError(f"--{flag} must be {wanted}: {why}")
        _check_numbers(config)
        check_outline(config.recurrence, config.all_flags)
        check_stages(config.recurrence, config.value("pipeline-model-parallel-size"))
        _check_sizes(config)
        _check_split(config)
        _check_tensor_parallel(config)
        _check_loops(config)
        check_sections(config)
        _check_batch(config, int(os.environ.get("WORLD_SIZE", "1")) if world is None else world)
        _check_schedule(config)


def _check_numbers(config: "Config") -> None:
    """Megatron's own checks of them say nothing but that there was one."""
    length = "train-iters" if config.value("train-samples") is None else "train-samples"
    batch = () if config.value("global-batch-size") is None else ("global-batch-size",)
    for flag in (*_POSITIVE, *batch, length):
        config.positive(flag)
    for flag in _NOT_NEGATIVE:
        value = config.value(flag)
        if value is None or not 0 <= value < math.inf:
            raise CherryError(f"set megatron.{flag} to a finite number that is not negative (it is {value})")
    if config.value("min-lr") > config.value("lr"):
        raise CherryError(f"megatron.min-lr {config.value('min-lr')} is more than lr {config.value('lr')}")


def check_outline(recurrence: Recurrence, given: dict[str, Any]) -> None:
    """Refuse what neither a training nor surgery for one takes.

    Args:
        recurrence: of the configuration.
        given: what its `megatron` and `flags` set, by flag.
    """
    for flag, why in _UNSUPPORTED.items():
        if given.get(flag) not in (None, False, _UNSUPPORTED_DEFAULTS.get(flag)):
            raise CherryError(f"megatron.{flag}: {why}; take it out")
    groups, hidden = given.get("num-query-groups"), given.get("hidden-size")
    if groups is not None and not given.get("group-query-attention"):  # Megatron would pass over them
        raise CherryError(
            f"megatron.num-query-groups {groups} does nothing without group-query-attention; set that to true, or "
            "take num-query-groups out"
        )
    if hidden is not None and recurrence.loop_rank > max(hidden, 0):
        raise CherryError(
            f"recurrence.loop_rank {recurrence.loop_rank} is more than megatron.hidden-size {hidden}, the rank of "
            "whole weights; use less"
        )


def _check_sizes(config: "Config") -> None:
    longest = config.value("max-position-embeddings")
    if config.positive("seq-length") > longest:
        raise CherryError(
            f"megatron.seq-length {config.value('seq-length')} is more than max-position-embeddings {longest}"
        )
    if config.value("kv-channels") is not None:
        config.positive("kv-channels")
    if config.shape.head_size % 2:
        raise CherryError(
            f"heads of size {config.shape.head_size} (megatron.kv-channels, or hidden-size / num-attention-heads) "
            "cannot be rotated; use an even number"
        )
    if config.value("squared-relu") and config.value("swiglu"):
        raise CherryError("megatron.squared-relu and megatron.swiglu exclude each other; take one out")


def _check_split(config: "Config") -> None:
    split = config.value("split")
    if split is None:
        return
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= share < math.inf for share in shares):
        raise CherryError(
            f"megatron.split {split!r} must be three shares, of training, validation and test: e.g. 990,8,2"
        )
    if not shares[0] or not shares[1]:
        raise CherryError(f"megatron.split {split} leaves nothing to train on or to validate on; e.g. 990,8,2")


def _check_tensor_parallel(config: "Config") -> None:
    shape, tensor = config.shape, config.value("tensor-model-parallel-size")
    for name, size in (
        ("num-attention-heads", shape.heads),
        ("num-query-groups", shape.groups),
        ("ffn-hidden-size", shape.ffn),
        ("padded-vocab-size", shape.vocabulary),
    ):
        if size % tensor:
            raise CherryError(f"megatron.{name} {size} is not a multiple of tensor-model-parallel-size {tensor}")
    if config.value("sequence-parallel") and config.value("seq-length") % tensor:
        raise CherryError(
            f"megatron.seq-length {config.value('seq-length')} is not a multiple of "
            f"tensor-model-parallel-size {tensor}, which sequence-parallel needs"
        )
    if config.value("context-parallel-size") > 1:
        raise CherryError(
            f"megatron.context-parallel-size {config.value('context-parallel-size')}: the recurrent stack does "
            "not split sequences over ranks; use 1"
        )


def _check_loops(config: "Config") -> None:
    recurrence = config.recurrence
    if max(config.evaluation.loops, default=0) > recurrence.loops:
        raise CherryError(
            f"evaluation.loops {max(config.evaluation.loops)} is more than the model's {recurrence.loops}; "
            "`cherry evaluate --loops` walks more loops than were trained"
        )
    recomputes = config.value("recompute-granularity") == "full"
    if recomputes and (config.value("recompute-method"), config.value("recompute-num-layers")) != ("uniform", 1):
        raise CherryError(
            "megatron.recompute-granularity full recomputes a loop at a time: set recompute-method uniform and "
            "recompute-num-layers 1"
        )
    looped = recurrence.loop_scales or recurrence.loop_rank or config.has_experts
    again = set(config.value("recompute-modules") or ()) - {"core_attn"}
    selective = config.value("recompute-granularity") == "selective"
    if selective and "layernorm" in again:
        raise CherryError(
            "megatron.recompute-modules layernorm: a norm's output goes with the residual stream, which cannot be "
            "recomputed; leave layernorm out"
        )
    if looped and again and selective:
        raise CherryError(
            f"megatron.recompute-modules {', '.join(sorted(again))}: recomputed one by one, modules would use the "
            "last loop's vectors, corrections and routers; use core_attn, or recompute-granularity full, a loop at "
            "a time"
        )
    # Megatron starts a bucket's reduction after as many gradients as the first step had.
    varies = recomputes or config.value("pipeline-model-parallel-size") > 1
    if recurrence.random_loops and config.value("overlap-grad-reduce") and varies:
        raise CherryError(
            "recurrence.random_loops: with recomputation or pipeline stages the number of gradients changes from "
            "step to step; set megatron.overlap-grad-reduce and megatron.overlap-param-gather to false"
        )


def _check_batch(config: "Config", world: int) -> None:
    ranks = config.value("tensor-model-parallel-size") * config.value("pipeline-model-parallel-size")
    if world % ranks and world > 1:
        raise CherryError(
            f"{world} ranks cannot hold models of {ranks} ranks each (tensor-model-parallel-size x "
            "pipeline-model-parallel-size); start a multiple of it"
        )
    instances = config.value("num-distributed-optimizer-instances")
    if world > 1 and world // ranks % instances:
        raise CherryError(
            f"megatron.num-distributed-optimizer-instances {instances} does not divide the {world // ranks} "
            "data-parallel ranks; use a number that does"
        )
    micro, whole = config.value("micro-batch-size"), config.value("global-batch-size")
    share = micro * max(world // ranks, 1) if micro else 0
    if whole is not None and share and whole % share:
        raise CherryError(
            f"megatron.global-batch-size {whole} is not a multiple of micro-batch-size {micro} x {share // micro} "
            "data-parallel ranks"
        )


def _check_schedule(config: "Config") -> None:
    iterations = config.value("lr-decay-iters") or config.value("train-iters")
    if iterations and config.value("lr-warmup-iters") >= iterations:
        raise CherryError(
            f"megatron.lr-warmup-iters {config.value('lr-warmup-iters')} must be less than the {iterations} "
            "iterations of the learning rate's schedule"
        )
