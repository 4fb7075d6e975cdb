"""What a model is, by a configuration here and by a config.json there."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from cherry_megatron.config import Outline
from cherry_megatron.errors import CherryError, naming
from cherry_megatron.model.options import Mixture, Recurrence
from cherry_megatron.model.pattern import AHEAD, Pattern
from cherry_megatron.model.shape import Shape, heads_of
from cherry_megatron.storage.checkpoint import Checkpoint
from cherry_megatron.storage.fits import first_names
from cherry_megatron.storage.layers import EMBEDDING, EXPERT_FC2, FC2, Source
from cherry_megatron.storage.trained import FUNCTION
from cherry_megatron.storage.weights import CONFIG

Kind = Literal["llama", "cherry", "cherry_mixture"]
# What of FUNCTION the forms have; the rest must be as Megatron has it by default.
_HAVE = ("rotary-base", "norm-epsilon", "squared-relu")
_ROUTER_TYPES = {"fp32": "float32", "fp64": "float64", None: None}
# Of a kind the class, and where transformers finds configuration and model in the code beside the weights.
_CLASSES = {
    "llama": ("LlamaForCausalLM", None),
    "cherry": ("CherryForCausalLM", ("configuration_cherry.CherryConfig", "modeling_cherry")),
    "cherry_mixture": (
        "CherryMixtureForCausalLM",
        ("modeling_cherry_mixture.CherryMixtureConfig", "modeling_cherry_mixture"),
    ),
}


@dataclass(frozen=True)
class Form:
    """A model, as far as its forward pass depends on it.

    Attributes:
        recurrence: the stack.
        shape: sizes.
        words: rows of the vocabulary there; here there may be more, for padding.
        longest: positions that it was made for.
        rotary_base: of the rotary embedding.
        epsilon: of the norms.
        activation: silu, gelu or relu2.
        depths: of multi-token prediction.
        moee: the mixture of models, if it is one.
        pre_softmax: gates of experts inside layers are a softmax over all of them.
        router_dtype: in which these are computed, torch's name; None: that of the weights.
    """

    recurrence: Recurrence
    shape: Shape
    words: int
    longest: int
    rotary_base: int
    epsilon: float
    activation: str = "silu"
    depths: int = 0
    moee: Mixture | None = None
    pre_softmax: bool = False
    router_dtype: str | None = "float32"

    @property
    def kind(self) -> Kind:
        """The plainest form that computes the same."""
        if self.moee is not None:
            return "cherry_mixture"
        recurrence, shape = self.recurrence, self.shape
        once = recurrence.loops == recurrence.parsed.loops == 1
        plain = once and shape.gated and {*recurrence.parsed.layers} == {AHEAD} and not shape.hidden % shape.heads
        further = recurrence.loop_scales or recurrence.loop_rank or self.depths
        return "llama" if plain and not further else "cherry"


def form_of(config: Path, wanted: Outline, source: Checkpoint, layers: Source) -> Form:
    """The model of a checkpoint.

    Args:
        config: the configuration's file, for messages.
        wanted: the configuration.
        source: the checkpoint; of a mixture that of one model.
        layers: its layers.

    Raises:
        CherryError: naming a key that the form of Hugging Face has not, or that is missing.
    """
    megatron = wanted.megatron
    for flag, (_, default) in FUNCTION.items():
        value = megatron.get(flag)
        if flag not in _HAVE and value not in (None, default):
            raise CherryError(
                f"{config}: megatron.{flag} is {value}, which the models that `cherry convert-hf` writes have not"
            )
    vocabulary, hidden = source.tensors[layers.top[EMBEDDING]].shape
    heads, groups, size = heads_of(config, megatron, hidden)
    names = first_names(layers)

    def width(role: str) -> int:
        return source.tensors[names[role]].shape[-1] if role in names else 0

    experts = source.experts_inside
    shape = Shape(
        hidden=hidden, ffn=width(f"{FC2}.weight") or width(f"{EXPERT_FC2}.weight"), heads=heads, groups=groups,
        head_size=size, vocabulary=vocabulary, gated=bool(megatron.get("swiglu")),
        tied=not megatron.get("untie-embeddings-and-output-weights"), experts=experts,
        top_k=_whole(config, megatron, "moe-router-topk", 2) if experts else 0,
        expert_ffn=width(f"{EXPERT_FC2}.weight"),
    )  # fmt: skip
    longest = "max-position-embeddings" if megatron.get("max-position-embeddings") else "seq-length"
    return Form(
        recurrence=wanted.recurrence, shape=shape, words=vocabulary, longest=_whole(config, megatron, longest),
        rotary_base=_whole(config, megatron, "rotary-base", 10000),
        epsilon=float(megatron.get("norm-epsilon") or 1e-5),
        activation="silu" if shape.gated else "relu2" if megatron.get("squared-relu") else "gelu",
        depths=wanted.depths, moee=wanted.moee, pre_softmax=bool(megatron.get("moe-router-pre-softmax")),
        router_dtype=_router_type(config, megatron.get("moe-router-dtype")),
    )  # fmt: skip


def _router_type(config: Path, value: Any) -> str | None:
    if value not in _ROUTER_TYPES:
        raise CherryError(f"{config}: megatron.moe-router-dtype is {value}; it is fp32, fp64 or null")
    return _ROUTER_TYPES[value]


def _whole(config: Path, megatron: Mapping[str, Any], flag: str, default: int | None = None) -> int:
    value = megatron.get(flag)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise CherryError(f"{config}: set megatron.{flag} to a positive number (it is {value})")
    return value


def config_json(form: Form, dtype: str, special: Mapping[str, int | None]) -> dict[str, Any]:
    """The content of config.json.

    Args:
        form: the model.
        dtype: torch's name of the weights' type.
        special: ids of special tokens: bos, eos, pad.
    """
    name, places = _CLASSES[form.kind]
    code = {} if places is None else {
        "auto_map": {"AutoConfig": places[0], "AutoModelForCausalLM": f"{places[1]}.{name}"}
    }  # fmt: skip
    shape, sizes = form.shape, _sizes(form)
    found = {
        "architectures": [name], "model_type": form.kind, **code, **sizes, "dtype": dtype,
        "initializer_range": 0.02, "use_cache": True,
        **{f"{token}_token_id": special.get(token) for token in ("bos", "eos", "pad")},
    }  # fmt: skip
    if form.kind == "llama":
        # Programs that know release 4 of transformers read the first of these.
        rope = {"rope_type": "default", "rope_theta": float(form.rotary_base)}
        return found | {
            "rope_theta": float(form.rotary_base), "rope_parameters": rope, "num_hidden_layers": _layers(form),
            "attention_bias": False, "mlp_bias": False,
        }  # fmt: skip
    recurrence, pattern = form.recurrence, form.recurrence.parsed
    found |= {
        "rope_theta": float(form.rotary_base), "prelude": list(pattern.prelude), "core": list(pattern.core),
        "coda": list(pattern.coda), "loops": recurrence.loops, "stored_loops": pattern.loops,
        "order": recurrence.order, "injection": recurrence.injection, "loop_scales": recurrence.loop_scales,
        "loop_rank": recurrence.loop_rank, "loop_routers": recurrence.loop_routers, "gated": shape.gated,
        "num_experts": shape.experts, "num_experts_per_tok": shape.top_k, "moe_intermediate_size": shape.expert_ffn,
        "router_pre_softmax": form.pre_softmax, "router_dtype": form.router_dtype, "mtp_depths": form.depths,
    }  # fmt: skip
    if form.moee is not None:
        found |= {
            "mixture_experts": form.moee.experts, "mixture_top_k": form.moee.top_k,
            "mixture_prefix": form.moee.prefix, "router_hidden": form.moee.router_hidden,
        }  # fmt: skip
    return found


def _sizes(form: Form) -> dict[str, Any]:
    shape = form.shape
    return {
        "vocab_size": form.words, "hidden_size": shape.hidden, "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.groups, "head_dim": shape.head_size,
        "hidden_act": form.activation, "max_position_embeddings": form.longest, "rms_norm_eps": form.epsilon,
        "tie_word_embeddings": shape.tied,
    }  # fmt: skip


def _layers(form: Form) -> int:
    return len(form.recurrence.parsed.layers)


class _Keys:
    """The keys of a config.json, by type."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CONFIG
        try:
            self.values = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CherryError(f"cannot read {self.path}: {error}; restore it") from None
        if not isinstance(self.values, dict):
            raise CherryError(f"{self.path} holds no keys and values; restore it")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of a type; null and what is missing are the default, if there is one."""
        value = self.values.get(key)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CherryError(f"{self.path}: {key} is {value!r}, not {_SAID[kind]}")
        return value

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        value: int = self.get(key, int, default)
        if value < least:
            raise CherryError(f"{self.path}: {key} is {value}; it must be {least} or more")
        return value

    def refuse(self, key: str, why: str) -> None:
        raise CherryError(f"{self.path}: {key} is {self.values.get(key)!r}: {why}")


_SAID: dict[type, str] = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list",
}  # fmt: skip


def read_form(folder: Path) -> Form:
    """The model of a config.json.

    Raises:
        CherryError: naming the key of what is not supported.
    """
    keys = _Keys(folder)
    kind = keys.get("model_type", str, "")
    if kind not in _CLASSES:
        raise CherryError(
            f"{keys.path}: model_type is {kind!r}; llama, cherry and cherry_mixture can be read, other "
            "architectures cannot"
        )
    if keys.values.get("quantization_config") is not None:
        keys.refuse("quantization_config", "only weights that are not quantized can be read")
    return _llama(keys) if kind == "llama" else _cherry(keys, kind == "cherry_mixture")


def _common(keys: _Keys, epsilon: float) -> dict[str, Any]:
    """What both forms say alike."""
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    groups = keys.size("num_key_value_heads", heads)
    words, ffn = keys.size("vocab_size"), keys.size("intermediate_size")
    tied = keys.get("tie_word_embeddings", bool, False)
    size = keys.size("head_dim", hidden // heads)
    if size % 2:
        keys.refuse("head_dim", f"heads of {size} channels cannot be rotated")
    with naming(keys.path):
        shape = Shape(hidden, ffn, heads, groups, size, words, keys.get("gated", bool, True), tied)
    return {
        "shape": shape, "words": words, "longest": keys.size("max_position_embeddings", 2048),
        "epsilon": keys.get("rms_norm_eps", float, epsilon), "rotary_base": _base(keys),
    }  # fmt: skip


def _base(keys: _Keys) -> int:
    """The base of the rotary embedding, which nothing may scale."""
    base = keys.values.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        rope = keys.get(key, dict, {})
        if rope.get("rope_type", rope.get("type", "default")) != "default" or "factor" in rope:
            keys.refuse(key, "the rotary embedding is not scaled here")
        if rope.get("partial_rotary_factor", 1) != 1:
            keys.refuse(key, "heads are rotated whole here")
        base = rope.get("rope_theta", base)
    if keys.get("partial_rotary_factor", float, 1.0) != 1:
        keys.refuse("partial_rotary_factor", "heads are rotated whole here")
    base = 10000 if base is None else base
    if not isinstance(base, int | float) or base != int(base) or base < 1:
        raise CherryError(f"{keys.path}: rope_theta is {base!r}; Megatron takes a whole number")
    return int(base)


_SAID[dict] = "keys and values"


def _llama(keys: _Keys) -> Form:
    for key, wanted in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if keys.get(key, type(wanted), wanted) != wanted:
            keys.refuse(key, f"layers here have {wanted!r}")
    recurrence = Recurrence(f"({AHEAD})x{keys.size('num_hidden_layers')}")
    return Form(recurrence=recurrence, **_common(keys, 1e-6))


def _cherry(keys: _Keys, mixture: bool) -> Form:
    common = _common(keys, 1e-5)
    shape: Shape = common.pop("shape")
    experts = {
        "experts": keys.size("num_experts", 0, 0), "top_k": keys.size("num_experts_per_tok", 0, 0),
        "expert_ffn": keys.size("moe_intermediate_size", 0, 0),
    }  # fmt: skip
    with naming(keys.path):
        prelude, core, coda = (tuple(keys.get(part, list)) for part in ("prelude", "core", "coda"))
        pattern = Pattern(prelude, core, coda, keys.size("stored_loops"))
        recurrence = Recurrence(
            written(pattern), loops=keys.size("loops"), order=keys.get("order", str),
            injection=keys.get("injection", str), loop_scales=keys.get("loop_scales", bool),
            loop_rank=keys.size("loop_rank", 0, 0), loop_routers=keys.get("loop_routers", bool),
        )  # fmt: skip
        moee = Mixture(
            keys.size("mixture_experts"), keys.size("mixture_top_k"), keys.size("mixture_prefix"),
            keys.size("router_hidden"),
        ) if mixture else None  # fmt: skip
    activation, router = keys.get("hidden_act", str), keys.values.get("router_dtype")
    if activation not in (("silu",) if shape.gated else ("gelu", "relu2")):
        keys.refuse("hidden_act", f"with gated {str(shape.gated).lower()} layers here have another one")
    if router not in _ROUTER_TYPES.values():
        keys.refuse("router_dtype", "it is float32, float64 or null")
    return Form(
        recurrence=recurrence, shape=Shape(**{**asdict(shape), **experts}), **common, activation=activation,
        depths=keys.size("mtp_depths", 0, 0), moee=moee, pre_softmax=keys.get("router_pre_softmax", bool),
        router_dtype=router,
    )  # fmt: skip


def written(pattern: Pattern) -> str:
    """A pattern as text."""

    def layers(part: tuple[str, ...]) -> str:
        runs = [(layer, len(list(run))) for layer, run in groupby(part)]
        return "".join(layer * count if count < 3 else f"({layer})x{count}" for layer, count in runs)

    core = layers(pattern.core)
    if pattern.loops > 1 or pattern.prelude or pattern.coda:
        core = f"[{core}]x{pattern.loops}"
    return layers(pattern.prelude) + core + layers(pattern.coda)


def settings_of(form: Form, dtype: str, run: str, load: Path, tokenizer: Path | None) -> dict[str, Any]:
    """The sections of a configuration for a model.

    Args:
        form: it.
        dtype: torch's name of its weights' type.
        run: the run's folder.
        load: the folder of its checkpoint.
        tokenizer: the folder of its tokenizer, if it has one.
    """
    shape, recurrence = form.shape, asdict(form.recurrence)
    defaults = asdict(Recurrence(form.recurrence.pattern))
    sections: dict[str, Any] = {
        "run": run,
        "recurrence": {k: v for k, v in recurrence.items() if k == "pattern" or v != defaults[k]},
    }
    if form.depths:
        sections["mtp"] = {"depths": form.depths}
    if form.moee is not None:
        wanted = ("experts", "top_k", "prefix", "router_hidden")
        sections["moee"] = {key: getattr(form.moee, key) for key in wanted}
    grouped = (
        {"group-query-attention": True, "num-query-groups": shape.groups} if shape.groups != shape.heads else {}
    )
    kv = {"kv-channels": shape.head_size} if shape.head_size * shape.heads != shape.hidden else {}
    experts = {
        "num-experts": shape.experts, "moe-router-topk": shape.top_k, "moe-ffn-hidden-size": shape.expert_ffn,
        "moe-router-pre-softmax": form.pre_softmax,
        "moe-router-dtype": next(name for name, theirs in _ROUTER_TYPES.items() if theirs == form.router_dtype),
    } if shape.experts else {}  # fmt: skip
    types = {"bfloat16": {"bf16": True}, "float16": {"fp16": True}}
    sections["megatron"] = {
        "hidden-size": shape.hidden, "ffn-hidden-size": shape.ffn, "num-attention-heads": shape.heads, **grouped,
        **kv,
        "swiglu": shape.gated, **({"squared-relu": True} if form.activation == "relu2" else {}),
        "untie-embeddings-and-output-weights": not shape.tied, "padded-vocab-size": shape.vocabulary,
        "rotary-base": form.rotary_base, "norm-epsilon": form.epsilon, **experts,
        "seq-length": form.longest, "max-position-embeddings": form.longest, **types.get(dtype, {}),
        **({"tokenizer-model": str(tokenizer)} if tokenizer else {}), "load": str(load), "finetune": True,
    }  # fmt: skip
    return sections


def arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments of a training with such sections, as far as a checkpoint of it is asked for them."""
    megatron: Mapping[str, Any] = settings["megatron"]
    fixed = {
        "position_embedding_type": "rope", "normalization": "RMSNorm", "num_query_groups": 1,
        "group_query_attention": False, "squared_relu": False, "num_experts": None,
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
    }  # fmt: skip
    found = {
        FUNCTION[flag][0] if flag in FUNCTION else flag.replace("-", "_"): value
        for flag, value in megatron.items()
        if flag not in ("load", "finetune")
    }
    return fixed | found
