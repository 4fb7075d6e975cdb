"""Copies of one layer on several pipeline stages, kept one weight.

Every copy starts from equal values (see seeding.py) and sees the sum of all copies' gradients, so
all take equal optimizer steps. For that each copy has

- `shared_embedding`: its own gradient bucket, so that the distributed optimizer's shards of a copy
  line up over the stages (Megatron does the same for tied embeddings), and
- `shared` on all but the first holder, so that it counts once in norms.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads as megatron_finalize_model_grads
from torch.distributed import ProcessGroup

from cherry_megatron.model.plan import Plan
from cherry_megatron.model.stack import RecurrentStack


def tie_copies(stack: RecurrentStack) -> Callable[..., None] | None:
    """Mark this stage's tied parameters. Every rank must call it: it makes process groups.

    Returns:
        What to use as `finalize_model_grads_func`, or None if no layer has copies.
    """
    groups = _holder_groups(stack.plan, stack.pp_group)
    if not groups:
        return None
    stage = stack.pp_group.rank()
    tied: list[tuple[torch.nn.Parameter, ProcessGroup]] = []
    for layer, parameters in stack.layer_parameters():
        holders = stack.plan.holders(layer)
        if len(holders) == 1:
            continue
        for parameter in parameters:
            parameter.shared_embedding = True  # type: ignore[attr-defined]
            parameter.shared = stage != holders[0]  # type: ignore[attr-defined]
            tied.append((parameter, groups[holders]))

    def finalize_model_grads(*args: Any, **kwargs: Any) -> None:
        """Megatron's own reductions, then the sum over the copies."""
        megatron_finalize_model_grads(*args, **kwargs)
        for parameter, group in tied:
            torch.distributed.all_reduce(parameter.main_grad, group=group)  # type: ignore[attr-defined]

    return finalize_model_grads


def _holder_groups(plan: Plan, pp_group: ProcessGroup) -> dict[tuple[int, ...], ProcessGroup]:
    """For every set of stages that hold copies of one layer, the group of this rank's pipeline."""
    sets = {plan.holders(layer) for layer in range(len(plan.pattern.layers))}
    wanted = sorted(stages for stages in sets if len(stages) > 1)
    if not wanted:
        return {}
    pipelines: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(pipelines, torch.distributed.get_process_group_ranks(pp_group))
    mine: dict[tuple[int, ...], ProcessGroup] = {}
    for stages in wanted:
        # Making a group is collective over the world, so every rank makes every pipeline's.
        for ranks in sorted({tuple(p) for p in pipelines}):
            group = torch.distributed.new_group([ranks[stage] for stage in stages])
            if torch.distributed.get_rank() in ranks:
                mine[stages] = group
    return mine
