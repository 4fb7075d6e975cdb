"""Which pipeline stage walks which effective layers, and so which stored layers it holds.

A stage holds one copy of every stored layer that it walks, so a boundary may fall inside a loop:
the core is then replicated on several stages and its copies are kept equal (see tying.py).
Megatron numbers the copies through all stages; here they map back to the stored layers, whose
numbers are the ones in checkpoints, whatever the layout.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from cherry_megatron.errors import CherryError
from cherry_megatron.model.options import Recurrence
from cherry_megatron.model.pattern import AHEAD, Pattern, Visit, balance, unroll
from cherry_megatron.model.shape import EMBEDDING_COST, Shape


@dataclass(frozen=True)
class Plan:
    """The unrolled model over pipeline stages.

    Attributes:
        pattern: the stored layers.
        stages: for each stage the effective layers that it walks, in order.
        depths: of multi-token prediction, whose layers are on the last stage.
    """

    pattern: Pattern
    stages: tuple[tuple[Visit, ...], ...]
    depths: int = 0

    @property
    def visits(self) -> tuple[Visit, ...]:
        return tuple(visit for stage in self.stages for visit in stage)

    @cached_property
    def held(self) -> tuple[tuple[int, ...], ...]:
        """For each stage the stored layers that it holds, ascending."""
        return tuple(tuple(sorted({visit.layer for visit in stage})) for stage in self.stages)

    def holders(self, layer: int) -> tuple[int, ...]:
        """The stages that hold a copy of a stored layer."""
        return tuple(stage for stage, held in enumerate(self.held) if layer in held)

    @property
    def megatron_pattern(self) -> str:
        """The pattern for HybridModel: the symbols held by each stage, divided by '|', and after '/' a depth's."""
        layers = self.pattern.layers
        return "|".join("".join(layers[layer] for layer in held) for held in self.held) + f"/{AHEAD}" * self.depths

    @cached_property
    def stored_index(self) -> tuple[int, ...]:
        """For each sublayer in Megatron's numbering through all stages, its number among the stored."""
        indices: list[int] = []
        for held in self.held:
            for layer in held:
                first = self.pattern.first_symbol(layer)
                indices.extend(range(first, first + len(self.pattern.layers[layer])))
        return tuple(indices)

    def carries_injection(self, stage: int) -> bool:
        """Whether the prelude's output must travel from a stage to the next for injection.

        It must when the core has begun at or before the stage and a later loop begins after it.
        """
        start = len(self.pattern.prelude)
        sent = [v for visits in self.stages[: stage + 1] for v in visits]
        later = [v for visits in self.stages[stage + 1 :] for v in visits]
        begun = any(v == Visit(start, 0) for v in sent)
        return begun and any(v.layer == start and v.loop for v in later)

    def is_core_symbol(self, stored: int) -> bool:
        """Whether a stored sublayer belongs to the core."""
        first = self.pattern.first_symbol(len(self.pattern.prelude))
        return first <= stored < first + len("".join(self.pattern.core))


def make_plan(recurrence: Recurrence, shape: Shape, sequence: int, pipeline_size: int, depths: int = 0) -> Plan:
    """Divide the unrolled model over pipeline stages, by cost unless `recurrence.stages` says how.

    Args:
        recurrence: what is walked.
        shape: what it costs.
        sequence: tokens of a sequence.
        pipeline_size: number of stages.
        depths: of multi-token prediction.

    Raises:
        CherryError: if there are fewer effective layers than stages, or `stages` does not add up.
    """
    check_stages(recurrence, pipeline_size)
    pattern = recurrence.parsed
    visits = unroll(pattern, recurrence.loops, recurrence.order)
    lengths = recurrence.stages
    if lengths is None:
        costs = [shape.forward_flops(pattern.layers[visit.layer], sequence) for visit in visits]
        costs[0] += EMBEDDING_COST * costs[0]
        costs[-1] += shape.head_flops + depths * shape.depth_flops(sequence)
        lengths = tuple(balance(costs, pipeline_size))
    cuts = [sum(lengths[:k]) for k in range(pipeline_size + 1)]
    return Plan(pattern, tuple(visits[a:b] for a, b in pairwise(cuts)), depths)


def check_stages(recurrence: Recurrence, pipeline_size: int) -> None:
    """See that every pipeline stage has a layer to walk.

    Raises:
        CherryError: if there are fewer effective layers than stages, or `stages` does not add up.
    """
    layers = len(unroll(recurrence.parsed, recurrence.loops, recurrence.order))
    lengths = recurrence.stages
    if layers < pipeline_size:
        raise CherryError(
            f"pipeline-model-parallel-size {pipeline_size} is more than the {layers} effective layers "
            "of recurrence.pattern; use fewer stages or more loops"
        )
    if lengths is not None and (len(lengths) != pipeline_size or sum(lengths) != layers or min(lengths) < 1):
        raise CherryError(
            f"recurrence.stages {list(lengths)} must be {pipeline_size} positive numbers "
            f"(pipeline-model-parallel-size) that add up to {layers} effective layers"
        )
