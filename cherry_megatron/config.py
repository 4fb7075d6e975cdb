"""One YAML file -> typed dataclasses and Megatron's own flags::

    extends: base_1b.yaml        # optional: another file of the same folder, overridden key by key
    run: runs/cherry_227m        # the run's folder: checkpoints, TensorBoard, resolved configuration
    recurrence: {pattern: "*-[(*-)x4]x8*-", order: cycle}
    evaluation: {loops: [1, 2, 4, 8]}
    megatron:                    # Megatron's flag names
      hidden-size: 1280
    flags: ["--seed", "7"]       # optional: as after `--`, which is how a run's config.yaml keeps them
    changed: [megatron.rotary-base]  # optional: what differs on purpose from what megatron.load names

A value may name environment variables as ${NAME} or ${NAME:-default}. Command-line values override
the file: `--set recurrence.loops=4`, and any Megatron flag after `--`.
"""

import argparse
import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from cherry_megatron import rules
from cherry_megatron.data.shuffle import Shuffle
from cherry_megatron.errors import CherryError, naming
from cherry_megatron.flags import action_of, megatron_arguments, nearest, outline_values, parse_flags
from cherry_megatron.inference.options import Generation
from cherry_megatron.model.options import Mixture, MultiToken, Recurrence
from cherry_megatron.model.pattern import MOE
from cherry_megatron.model.plan import Plan, make_plan
from cherry_megatron.model.shape import Shape, heads_of
from cherry_megatron.monitor.options import Guards
from cherry_megatron.sections import plain, section_of
from cherry_megatron.sgt.options import Selective
from cherry_megatron.storage.options import Checkpoints
from cherry_megatron.yaml_files import read_file, set_value

Loader = Literal["torch", "dali"]
# The mean over so many global batches is surer than the digits that are printed of it. Their samples are laid out
# before the first step, and every evaluation reads them all: more would seem to hang.
MOST_BATCHES = 10_000


@dataclass(frozen=True)
class Evaluation:
    """What evaluation measures besides the held-out loss.

    Attributes:
        loops: report the loss at these numbers of loops besides the model's own; by default 1, 2, 4, ...
        batches: global batches of the validation split that are used for it.
        at_start: evaluate before the first step too.
    """

    loops: tuple[int, ...] = ()
    batches: int = 4
    at_start: bool = False

    def __post_init__(self) -> None:
        if self.batches < 1 or any(n < 1 for n in self.loops):
            raise CherryError("evaluation.loops and evaluation.batches must be positive")
        if self.batches > MOST_BATCHES:
            raise CherryError(f"evaluation.batches {self.batches} is more than {MOST_BATCHES}; use fewer")

    def loop_counts(self, trained: int) -> list[int]:
        """The numbers of loops to evaluate, ascending."""
        if self.loops:
            return sorted({*self.loops, trained})
        return sorted({2**k for k in range(trained.bit_length()) if 2**k <= trained} | {trained})


@dataclass(frozen=True)
class Distillation:
    """A teacher to learn from, see distillation.py.

    Attributes:
        config: the teacher's configuration.
        load: a run of its, or a folder of checkpoints.
        weight: of the divergence from the teacher; cross-entropy has the rest.
        temperature: at which both distributions are compared.
    """

    config: str
    load: str
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise CherryError(f"distillation.weight {self.weight} is not from 0 to 1")
        if not 0 < self.temperature < float("inf"):
            raise CherryError(f"distillation.temperature {self.temperature} must be positive")


@dataclass(frozen=True)
class Data:
    """How text is read.

    Attributes:
        shuffle: a control: `tokens` or `words` of every document in a random order, the same at every reading.
        prefix: targets among the first so many tokens of a sequence carry no loss, as where experts are chosen by
            them: for a model that is compared with such a mixture.
        loader: `torch` or `dali`, which read the same.
    """

    shuffle: Shuffle = "none"
    prefix: int = 0
    loader: Loader = "torch"

    def __post_init__(self) -> None:
        if self.shuffle not in (choices := get_args(Shuffle)):
            raise CherryError(f"data.shuffle {self.shuffle!r} is not one of {', '.join(choices)}")
        if self.prefix < 0:
            raise CherryError(f"data.prefix {self.prefix} is negative; 0 is none")
        if self.loader not in (choices := get_args(Loader)):
            raise CherryError(f"data.loader {self.loader!r} is not one of {', '.join(choices)}")


@dataclass(frozen=True)
class Config:
    """A resolved configuration.

    Attributes:
        source: the file it came from.
        run: the run's folder.
        recurrence, mtp, evaluation, generation, distillation, data, checkpoints, guards, sgt, moee: sections of it.
        megatron: flag name without dashes in front -> value, defaults of this project filled in.
        flags: Megatron flags of the file's `flags`, then those given after `--`; they come last and win.
        changed: keys that are meant to differ from what the checkpoint of `megatron.load` was trained with.
    """

    source: Path
    run: Path
    recurrence: Recurrence
    mtp: MultiToken = field(default_factory=MultiToken)
    evaluation: Evaluation = field(default_factory=Evaluation)
    generation: Generation | None = None
    distillation: Distillation | None = None
    data: Data = field(default_factory=Data)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    guards: Guards = field(default_factory=Guards)
    sgt: Selective | None = None
    moee: Mixture | None = None
    megatron: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in the order of the YAML format."""
        kept = {"checkpoints": dataclasses.asdict(self.checkpoints)} if self.checkpoints != Checkpoints() else {}
        return {
            "run": str(self.run),
            "recurrence": plain(dataclasses.asdict(self.recurrence)),
            "evaluation": plain(dataclasses.asdict(self.evaluation)),
            **({"generation": dataclasses.asdict(self.generation)} if self.generation else {}),
            **({"distillation": dataclasses.asdict(self.distillation)} if self.distillation else {}),
            **({"mtp": dataclasses.asdict(self.mtp)} if self.mtp != MultiToken() else {}),
            **({"data": dataclasses.asdict(self.data)} if self.data != Data() else {}),
            **kept,
            **({"guards": plain(dataclasses.asdict(self.guards))} if self.guards != Guards() else {}),
            **({"sgt": dataclasses.asdict(self.sgt)} if self.sgt else {}),
            **({"moee": dataclasses.asdict(self.moee)} if self.moee else {}),
            "megatron": dict(sorted(self.megatron.items())),
            "flags": list(self.flags),
            **({"changed": list(self.changed)} if self.changed else {}),
        }

    def hash(self) -> str:
        """Twelve hex digits that differ when any setting but the run's folder does."""
        settings = {k: v for k, v in self.as_dict().items() if k != "run"}
        return hashlib.sha256(yaml.safe_dump(settings, sort_keys=True).encode()).hexdigest()[:12]

    def value(self, flag: str, default: Any = None) -> Any:
        """A Megatron flag's value: from the flags after `--`, else from the file, else `default`."""
        found = getattr(self._arguments, action_of(flag).dest)
        return default if found is None else found

    @property
    def all_flags(self) -> dict[str, Any]:
        """What `megatron` and `flags` set, by flag; of a flag that none sets `value` knows Megatron's default."""
        return outline_values(self.megatron, self.flags)

    @cached_property
    def _arguments(self) -> argparse.Namespace:
        """All flags, as Megatron's parser reads them."""
        return parse_flags(megatron_arguments(self.megatron) + list(self.flags))

    def holds(self, flag: str, wanted: Any) -> bool:
        """Whether a flag has a value; of a switch, whether it is given."""
        action = action_of(flag)
        return self.value(flag) == (action.const if action.nargs == 0 and wanted is True else wanted)

    @property
    def shape(self) -> Shape:
        """The model's sizes."""
        hidden = self.positive("hidden-size")
        flags = ("num-attention-heads", "group-query-attention", "num-query-groups", "kv-channels")
        heads, groups, head_size = heads_of(self.source, {flag: self.value(flag) for flag in flags}, hidden)
        return Shape(
            hidden=hidden,
            ffn=self.positive("ffn-hidden-size"),
            heads=heads,
            groups=groups,
            head_size=head_size,
            vocabulary=self.positive("padded-vocab-size"),
            gated=bool(self.value("swiglu")),
            tied=not self.value("untie-embeddings-and-output-weights"),
            **self._experts,
        )

    @property
    def has_experts(self) -> bool:
        """Whether there are experts inside layers."""
        return MOE in self.recurrence.parsed.symbols

    @property
    def balance(self) -> float:
        """Coefficient of the load-balancing loss of experts inside layers."""
        (found,) = self.value("moe-aux-loss-coeff")
        return float(found)

    @property
    def _experts(self) -> dict[str, int]:
        if not self.has_experts:
            return {}
        return {
            "experts": self.positive("num-experts"),
            "top_k": self.positive("moe-router-topk"),
            "expert_ffn": self.value("moe-ffn-hidden-size") or self.positive("ffn-hidden-size"),
        }

    def positive(self, flag: str) -> int:
        """The value of a flag that must be a positive whole number."""
        value = self.value(flag)
        if not isinstance(value, int) or value < 1:
            raise CherryError(f"{self.source}: set megatron.{flag} to a positive number (it is {value})")
        return value

    @property
    def prefix(self) -> int:
        """Tokens at a sequence's beginning that carry no loss as targets."""
        return max(self.data.prefix, self.moee.prefix if self.moee else 0)

    def require_one_model(self, what: str) -> None:
        """Refuse a mixture.

        Args:
            what: does not take one, such as `cherry calibrate`.

        Raises:
            CherryError: if this is one.
        """
        if self.moee is not None:
            raise CherryError(f"{self.source}: {what} takes one model, and moee makes a mixture; take moee out")

    def require_no_experts(self, what: str) -> None:
        """Refuse a model with experts inside layers.

        Args:
            what: does not take one.

        Raises:
            CherryError: if this is one.
        """
        if self.has_experts:
            raise CherryError(f"{self.source}: {what} takes layers '*' and '-', and recurrence.pattern has an 'E'")

    def plan(self) -> Plan:
        """The unrolled model over the configured pipeline stages."""
        stages = self.value("pipeline-model-parallel-size")
        return make_plan(self.recurrence, self.shape, self.positive("seq-length"), stages, self.mtp.depths)


_SECTIONS = {
    "recurrence": Recurrence, "mtp": MultiToken, "evaluation": Evaluation, "generation": Generation,
    "distillation": Distillation, "data": Data, "checkpoints": Checkpoints, "guards": Guards, "sgt": Selective,
    "moee": Mixture,
}  # fmt: skip
_OPTIONAL = ("generation", "distillation", "sgt", "moee")
_TOP_KEYS = ("extends", "run", *_SECTIONS, "megatron", "flags", "changed")


def load(path: Path, overrides: Sequence[str] = (), flags: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: the YAML file.
        overrides: `section.key=value` with a YAML value.
        flags: Megatron flags as on its own command line.

    Raises:
        CherryError: one sentence that names file and key, with the nearest valid name.
    """
    data = read_with(path, overrides)
    run = data.get("run")
    if not isinstance(run, str) or not run:
        said = "" if run is None else f", as text (it is {run!r})"
        raise CherryError(f"{path}: `run` must name the run's folder{said}, e.g. run: runs/{path.stem}")
    flags = (*_flags(path, data), *flags)
    megatron = rules.fill_in(path, data.get("megatron", {}), flags)
    changed = rules.changed_keys(path, data.get("changed", []))
    if changed and megatron.get("load") is None:
        raise CherryError(f"{path}: `changed` is of what megatron.load names; set that, or take `changed` out")
    config = Config(path, Path(run), megatron=megatron, flags=flags, changed=changed, **_sections(path, data))
    rules.check(config)
    return config


def _flags(path: Path, data: dict[str, Any]) -> list[str]:
    """A file's `flags`."""
    given = data.get("flags", [])
    if not isinstance(given, list) or not all(isinstance(flag, str) for flag in given):
        raise CherryError(f'{path}: `flags` must be a list of texts, e.g. flags: ["--seed", "7"]')
    return given


def _sections(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """All sections but `megatron`; an optional one that is not set is left out."""
    return {
        name: section_of(path, name, cls, data.get(name, {}))
        for name, cls in _SECTIONS.items()
        if name not in _OPTIONAL or data.get(name) is not None
    }


@dataclass(frozen=True)
class Outline:
    """What checkpoint surgery reads of a configuration.

    Attributes:
        recurrence: its section.
        depths: of multi-token prediction.
        moee: the mixture of models, if it is one.
        megatron: what `megatron`, with the defaults of this project, and `flags` set, by flag.
        changed: as in `Config`.
        settings: all sections as they stand, for the record.
    """

    recurrence: Recurrence
    depths: int
    moee: Mixture | None
    megatron: dict[str, Any]
    changed: tuple[str, ...]
    settings: dict[str, Any]


def outline(path: Path, overrides: Sequence[str] = ()) -> Outline:
    """Read a configuration for checkpoint surgery.

    It does without Megatron, whose import takes longer than the work.

    Raises:
        CherryError: as `load`, but of Megatron's flags hardly more than names and types are looked at.
    """
    settings = read_with(path, overrides)
    flags = _flags(path, settings)
    megatron = rules.fill_in(path, settings.get("megatron", {}), flags)
    changed = rules.changed_keys(path, settings.get("changed", []))
    sections = _sections(path, settings)
    recurrence, depths, moee = sections["recurrence"], sections["mtp"].depths, sections.get("moee")
    with naming(path):
        megatron = outline_values(megatron, flags)
        rules.check_outline(recurrence, megatron)
    return Outline(recurrence, depths, moee, megatron, changed, settings)


def read_with(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """A configuration's sections as they stand in the file and what it extends, with overrides.

    Raises:
        CherryError: if it cannot be read, or a top-level key is unknown.
    """
    data = read_file(path)
    for override in overrides:
        set_value(data, override)
    for key in data:
        if key not in _TOP_KEYS:
            raise CherryError(f"{path}: unknown key {key!r}{nearest(key, _TOP_KEYS)}")
    return data
