"""The recurrent stack: prelude, a core walked several times with the same weights, coda."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.utils import nested_values
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import WrappedTensor, make_viewless_tensor
from torch import Tensor

from cherry_megatron.errors import CherryError
from cherry_megatron.model.cache import Cache
from cherry_megatron.model.loops import PerLoop, RMSNorm
from cherry_megatron.model.options import Recurrence
from cherry_megatron.model.pattern import ATTENTION
from cherry_megatron.model.plan import Plan, Visit


class RecurrentStack(HybridStack):
    """A HybridStack whose stored layers are walked in the order of a plan.

    Attributes:
        loops: how often the core is walked in the next forward pass, at most the planned number.
            It may change from step to step; visits of later loops are skipped.
        observe: while set, called after each walk of the core with the loop, the state before (None
            if an earlier stage began the loop) and the state after, both [s, b, h].
        learning_loop: while set, the core's weights get a gradient from their use in this loop alone.

    Args:
        plan: the unrolled model and this stage's share of it.
        recurrence: order, injection and truncation of the loops.
        Others: as in HybridStack.
    """

    def __init__(self, config: Any, *, plan: Plan, recurrence: Recurrence, **kwargs: Any):
        super().__init__(config, post_layer_norm=False, **kwargs)
        stage = self.pp_group.rank()
        self.plan, self.recurrence = plan, recurrence
        self.visits = plan.stages[stage]
        self.loops = recurrence.loops
        self.observe: Callable[[int, Tensor | None, Tensor], None] | None = None
        self.learning_loop: int | None = None
        # Sublayers of each stored layer held here, and the per-loop modules inside.
        self._sublayers: dict[int, list[TransformerLayer]] = {}
        built = iter(self.layers)
        for layer in plan.held[stage]:
            self._sublayers[layer] = [next(built) for _ in plan.pattern.layers[layer]]
        self._per_loop = {
            layer: [m for sub in subs for m in sub.modules() if isinstance(m, PerLoop)]
            for layer, subs in self._sublayers.items()
        }
        # What of a stored layer looks into a cache.
        self._attention = {
            layer: [
                sub.self_attention.core_attention
                for symbol, sub in zip(plan.pattern.layers[layer], subs, strict=True)
                if symbol == ATTENTION
            ]
            for layer, subs in self._sublayers.items()
        }
        self._cache: Cache | None = None  # of the pass under way
        self._fuses_rotation = config.fused_single_qkv_rope
        self._carries_in = recurrence.injection == "add" and plan.carries_injection(stage - 1)
        self._carries_out = recurrence.injection == "add" and plan.carries_injection(stage)
        self._received_injection: Tensor | None = None
        if self.post_process:
            # Transformer Engine's norm has an extra state, which a checkpoint of the local layers lacks.
            self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        """Take what the previous stage sent; [2s, b, h] where the prelude's output rides along."""
        if self._carries_in and input_tensor is not None:
            # Megatron reads the sequence length for the rotary embedding off the input tensor.
            input_tensor, self._received_injection = input_tensor.chunk(2)
        super().set_input_tensor(input_tensor)

    def forward(
        self,
        hidden_states: Tensor | WrappedTensor | None,
        attention_mask: Tensor | None,
        inference_context: Cache | None = None,
        rotary_pos_emb: Tensor | None = None,
        *,
        inference_params: Any = None,
        packed_seq_params: Any = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Walk this stage's visits.

        Args:
            hidden_states: [s, b, h], or None on a later pipeline stage.
            inference_context: keys and values of earlier tokens, whose number of loops this pass walks.
            rotary_pos_emb: angles of this pass's positions; with a cache, of all its positions.
            Others: as in HybridStack.

        Returns:
            [s, b, h], or [2s, b, h] where the next stage needs the prelude's output.
        """
        if inference_params is not None or not isinstance(inference_context, Cache | None):
            raise CherryError("loops need a slot each: a recurrent stack takes the cache of model/cache.py alone")
        if inference_context is not None:
            assert rotary_pos_emb is not None and not self.training
            inference_context.take_angles(rotary_pos_emb)
            rotary_pos_emb = None  # the cache rotates
        self._cache = inference_context
        self.config.fused_single_qkv_rope = self._fuses_rotation and inference_context is None
        given: Any = hidden_states if self.pre_process else self.input_tensor
        hidden: Tensor = given.unwrap() if isinstance(given, WrappedTensor) else given
        injected = self._received_injection
        arguments = {
            "attention_mask": attention_mask,
            "rotary_pos_emb": rotary_pos_emb,
            "packed_seq_params": packed_seq_params,
            "padding_mask": padding_mask,
        }
        received = hidden
        delayed = bool(self.config.fp8) and self.config.fp8_recipe == Fp8Recipe.delayed
        with get_fp8_context(self.config) if delayed else nullcontext():
            for loop, visits in self._segments(self.loops if self._cache is None else self._cache.loops):
                if loop is not None and self._starts_core(visits[0]):
                    if loop == 0:
                        injected = hidden
                    elif self.recurrence.injection == "add":
                        assert injected is not None, "the plan says which stages receive the prelude's output"
                        hidden = hidden + injected
                before = hidden
                if self._is_cut(loop):
                    with torch.no_grad():
                        hidden = self._walk(visits, hidden, arguments)
                    hidden = hidden.detach()  # Megatron adds to the residual stream with gradients switched on
                else:
                    hidden = self._walk(visits, hidden, arguments)
                if loop is not None and self.observe is not None and self._ends_core(visits[-1]):
                    self.observe(loop, before if self._begins_walk(visits[0]) else None, hidden)
        if self.post_process:
            hidden = self.final_norm(hidden)
            if self._cache is not None and self._cache.keeps_states:
                self._cache.take_states(self._whole(hidden))
        if hidden is received:
            # All visits of this stage were skipped; the schedule needs an output of its own.
            hidden = hidden.clone()
        self._cache = None
        if self._carries_out:
            assert injected is not None
            hidden = torch.cat((hidden, injected))
        return make_viewless_tensor(inp=hidden, requires_grad=hidden.requires_grad, keep_graph=True)

    def _whole(self, hidden: Tensor) -> Tensor:
        """All of a sequence that sequence parallelism cuts, [s, b, h]."""
        if not self.config.sequence_parallel:
            return hidden
        whole: Tensor = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        return whole

    def _starts_core(self, visit: Visit) -> bool:
        return visit.layer == len(self.plan.pattern.prelude)

    def _begins_walk(self, visit: Visit) -> bool:
        return self.recurrence.order == "sequence" or self._starts_core(visit)

    def _ends_core(self, visit: Visit) -> bool:
        last = len(self.plan.pattern.prelude) + len(self.plan.pattern.core) - 1
        return self.recurrence.order == "sequence" or visit.layer == last

    def _segments(self, loops: int) -> Iterator[tuple[int | None, list[Visit]]]:
        """This stage's visits, those of further loops left out, cut where the loop changes (or layer by layer)."""
        visits = [v for v in self.visits if v.loop is None or v.loop < loops]
        by_part = groupby(visits, key=lambda v: (v.loop, v.layer < len(self.plan.pattern.prelude)))
        for (loop, _), grouped in by_part:
            segment = list(grouped)
            # Recomputation keeps one state a segment: a loop, or a layer where there are no loops.
            whole = loop is not None and self.plan.pattern.loops > 1
            for start in range(0, len(segment), len(segment) if whole else 1):
                yield loop, segment[start : start + (len(segment) if whole else 1)]

    def _is_cut(self, loop: int | None) -> bool:
        """Whether it is before the last `backprop_loops` loops, which alone carry the gradient."""
        last = self.recurrence.backprop_loops
        return last is not None and loop is not None and loop < self.loops - last and self.training

    def _walk(self, visits: list[Visit], hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Run one segment, recomputing its activations in the backward pass if asked to."""

        def run(hidden: Tensor) -> Tensor:
            for visit in visits:
                hidden = self._visit(visit, hidden, arguments)
            return hidden

        if self.config.recompute_granularity != "full" or not self.training or not torch.is_grad_enabled():
            return run(hidden)
        if self.config.fp8:
            from megatron.core.extensions.transformer_engine import te_checkpoint

            return te_checkpoint(
                run,
                self.config.distribute_saved_activations,
                tensor_parallel.random.get_cuda_rng_tracker,
                self.tp_group,
                hidden,
            )
        return tensor_parallel.checkpoint(run, self.config.distribute_saved_activations, hidden)

    def _visit(self, visit: Visit, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """One effective layer. hidden: [s, b, h]."""
        for module in self._per_loop[visit.layer]:
            module.loop = visit.loop or 0
        for attention in self._attention[visit.layer]:
            attention.lookup = self._cache and partial(self._cache.attend, visit, self.config)
        # The delayed recipe has one context around the whole pass, the others one a layer.
        each = bool(self.config.fp8) and self.config.fp8_recipe != Fp8Recipe.delayed
        with self._learning(visit):
            for sublayer in self._sublayers[visit.layer]:
                with get_fp8_context(self.config, sublayer.layer_number - 1) if each else nullcontext():
                    hidden, _ = sublayer(hidden_states=hidden, **arguments)
        for attention in self._attention[visit.layer]:
            attention.lookup = None  # or it would hold the cache's memory
        return hidden

    @contextmanager
    def _learning(self, visit: Visit) -> Iterator[None]:
        """Autograd notes in the forward pass which uses of a weight get a gradient."""
        if self.learning_loop in (None, visit.loop) or visit.loop is None:
            yield
            return
        parameters = [p for sublayer in self._sublayers[visit.layer] for p in sublayer.parameters()]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def core_parameters(self) -> set[torch.nn.Parameter]:
        """The weights held here that are walked in loops."""
        walked = {visit.layer for visit in self.visits if visit.loop is not None}
        return {p for layer, parameters in self.layer_parameters() if layer in walked for p in parameters}

    def stored_layers(self) -> Iterator[tuple[int, list[tuple[str, TransformerLayer]]]]:
        """The stored layers held here, each with the symbols of its sublayers and these themselves."""
        for layer, sublayers in self._sublayers.items():
            yield layer, list(zip(self.plan.pattern.layers[layer], sublayers, strict=True))

    def layer_parameters(self) -> Iterator[tuple[int, list[torch.nn.Parameter]]]:
        """The stored layers held here, each with its parameters."""
        for layer, sublayers in self._sublayers.items():
            yield layer, [p for sublayer in sublayers for p in sublayer.parameters()]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple | None = None, metadata: dict | None = None
    ) -> ShardedStateDict:
        """As HybridStack's; a copy of a tied layer is a replica of the first stage's."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        stage = self.pp_group.rank()
        copies = {
            f"{prefix}layers.{sublayer.layer_number - 1}.": self.plan.holders(layer).index(stage)
            for layer, sublayers in self._sublayers.items()
            for sublayer in sublayers
        }
        for value in nested_values(state):
            if isinstance(value, ShardedTensor | ShardedTensorFactory | ShardedObject):
                copy = next((c for start, c in copies.items() if value.key.startswith(start)), 0)
                if copy:
                    value.replica_id = (copy, *value.replica_id[1:])
        return state


def recurrent_stacks(model: torch.nn.Module) -> list[RecurrentStack]:
    """The stack of a model inside Megatron's wrappers; of a mixture, those of this rank's experts."""
    return [module for module in model.modules() if isinstance(module, RecurrentStack)]
