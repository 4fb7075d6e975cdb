"""What a configuration asks for, whatever its layout, and one way to lay it out."""

from dataclasses import dataclass, replace
from typing import Any

from cherry_megatron import rules
from cherry_megatron.config import Config
from cherry_megatron.expert_rules import FORCED
from cherry_megatron.flags import names_of
from cherry_megatron.model.options import Mixture, Recurrence
from cherry_megatron.model.plan import Plan, make_plan
from cherry_megatron.model.shape import Shape
from cherry_megatron.monitor.accounting import Layout
from cherry_megatron.section_rules import GRAPH

# Megatron's flags that a plan sets.
_RECOMPUTE = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
PLANNED = (
    "tensor-model-parallel-size", "pipeline-model-parallel-size", "expert-model-parallel-size",
    "expert-tensor-parallel-size", "sequence-parallel", "micro-batch-size", "cuda-graph-impl", *_RECOMPUTE,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One way to lay a training out.

    Attributes:
        tensor, pipeline, expert, data: parallel sizes; the ranks of `expert` are of the data-parallel ones.
        micro_batch: sequences.
        recompute: activations recomputed a loop at a time.
        graph: forward and backward pass of a step as one CUDA graph.
        expert_tensor: tensor-parallel size of an expert inside a layer.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    data: int = 1
    micro_batch: int = 1
    recompute: bool = False
    graph: bool = False
    expert_tensor: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def sizes(self) -> str:
        """The parallel sizes, in words."""
        return f"TP={self.tensor} PP={self.pipeline} EP={self.expert} DP={self.data}"

    def __str__(self) -> str:
        recompute = ", recomputation" if self.recompute else ""
        graph = ", one CUDA graph" if self.graph else ""
        return f"{self.sizes}, micro-batch {self.micro_batch}{recompute}{graph}"


@dataclass(frozen=True)
class Job:
    """What of a configuration its time and memory depend on.

    Attributes:
        config: it.
        recurrence, shape, mixture, depths: the model.
        sequence: tokens of a sequence.
        batch: sequences of a step.
        half: BF16 or FP16, not FP32.
        fp8: recipe of the layers' products, if they are in FP8.
        overlap: gradients and weights are exchanged beside the passes.
        instances: how often the optimizer's state is there among the data-parallel ranks.
        first_pass: a step begins with a forward pass over all its micro-batches: online selection does so, and the
            load of experts inside layers where there are several.
        balanced: all experts are forced to see as much.
    """

    config: Config
    recurrence: Recurrence
    shape: Shape
    mixture: Mixture | None
    depths: int
    sequence: int
    batch: int
    half: bool
    fp8: str | None
    overlap: bool
    instances: int
    first_pass: bool
    balanced: bool

    @property
    def width(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.half else 4

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.sequence

    def micro_batches(self, setting: Setting) -> int:
        """Of a step, on a rank."""
        return self.batch // (setting.micro_batch * setting.data)

    def plan(self, pipeline: int) -> Plan:
        """The model over so many stages, divided as the configuration says if it does for this number."""
        recurrence = _stages(self.recurrence, pipeline)
        return make_plan(recurrence, self.shape, self.sequence, pipeline, self.depths)

    def layout(self, setting: Setting) -> Layout:
        """A setting, as far as memory is concerned."""
        return Layout(
            setting.tensor, setting.data, setting.micro_batch, self.sequence, self.half,
            instances=self.instances, sequence_parallel=setting.tensor > 1,
            recompute=setting.recompute, expert=setting.expert, expert_tensor=setting.expert_tensor,
            micro_batches=self.micro_batches(setting), fp8=self.fp8,
        )  # fmt: skip

    def fixed(self, flag: str) -> Any:
        """The value of a flag that is given after `--`, which no plan changes; None if it is not."""
        return self.config.value(flag) if flag in names_of(self.config.flags) else None

    @property
    def not_counted(self) -> list[str]:
        """What of the configuration costs time or memory that the model knows nothing of."""
        parts = {
            "the teacher of `distillation`": self.config.distillation is not None,
            "gradient-coupling probes": bool(self.config.sgt and self.config.sgt.probe_interval),
            "what `sgt.skip_head` saves": bool(self.config.sgt and self.config.sgt.skip_head),
        }
        return [name for name, there in parts.items() if there]


def job_of(config: Config, batch: int | None = None) -> Job:
    """Read a configuration.

    Args:
        config: it.
        batch: sequences of a step, if others than it says.
    """
    half = bool(config.value("bf16") or config.value("fp16"))
    return Job(
        config=config,
        recurrence=config.recurrence,
        shape=config.shape,
        mixture=config.moee,
        depths=config.mtp.depths,
        sequence=config.positive("seq-length"),
        batch=batch or config.positive("global-batch-size"),
        half=half,
        fp8=config.value("fp8-recipe") if config.value("fp8-format") else None,
        overlap=bool(config.value("overlap-grad-reduce")),
        instances=config.value("num-distributed-optimizer-instances"),
        first_pass=bool(config.sgt and config.sgt.top_loss is not None),
        balanced=bool(config.value(FORCED)),
    )


def settled(job: Job, setting: Setting) -> dict[str, Any]:
    """What a setting changes of a configuration, as `--set` has it: only what is otherwise there."""
    values: dict[str, Any] = {
        "tensor-model-parallel-size": setting.tensor,
        "pipeline-model-parallel-size": setting.pipeline,
        "micro-batch-size": setting.micro_batch,
        "sequence-parallel": setting.tensor > 1,
        "cuda-graph-impl": GRAPH if setting.graph else "none",
        "global-batch-size": job.batch,
    }
    if job.mixture is not None or job.config.has_experts:
        values["expert-model-parallel-size"] = setting.expert
    within = job.config.value("expert-tensor-parallel-size")
    if job.config.has_experts and setting.expert_tensor != (within or setting.tensor):
        values["expert-tensor-parallel-size"] = setting.expert_tensor
    if job.mixture is not None and within not in (None, setting.tensor):
        values["expert-tensor-parallel-size"] = None
    recomputes = job.config.value("recompute-granularity") == "full"
    if setting.recompute:
        values |= _RECOMPUTE
    elif recomputes:
        values |= dict.fromkeys(_RECOMPUTE)
    changed = {f"megatron.{flag}": v for flag, v in values.items() if _otherwise(job.config, flag, v)}
    if _stages(job.recurrence, setting.pipeline) is not job.recurrence:
        changed["recurrence.stages"] = None
    return changed


def _otherwise(config: Config, flag: str, value: Any) -> bool:
    return bool(config.value(flag) != value) if value is not False else bool(config.value(flag))


def _stages(recurrence: Recurrence, pipeline: int) -> Recurrence:
    """With stages balanced by cost where `recurrence.stages` is of another number."""
    other = recurrence.stages is not None and len(recurrence.stages) != pipeline
    return replace(recurrence, stages=None) if other else recurrence


def configured(job: Job, setting: Setting) -> Config:
    """The configuration with a setting.

    Raises:
        CherryError: what its own rules say against it, on so many ranks.
    """
    changes = settled(job, setting)
    megatron = dict(job.config.megatron)
    for key, value in changes.items():
        if key.startswith("megatron."):
            megatron[key.removeprefix("megatron.")] = value
    recurrence = _stages(job.recurrence, setting.pipeline)
    config = replace(job.config, megatron=megatron, recurrence=recurrence)
    rules.check(config, setting.gpus)
    return config


def setting_of(config: Config, gpus: int) -> Setting:
    """The setting that a configuration has on so many GPUs."""
    tensor, pipeline = config.value("tensor-model-parallel-size"), config.value("pipeline-model-parallel-size")
    within = config.value("expert-tensor-parallel-size") if config.has_experts else tensor
    return Setting(
        tensor, pipeline, config.value("expert-model-parallel-size"), max(gpus // (tensor * pipeline), 1),
        config.value("micro-batch-size"), config.value("recompute-granularity") == "full",
        config.value("cuda-graph-impl") == GRAPH, within or tensor,
    )  # fmt: skip
