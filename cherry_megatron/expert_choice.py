"""Before a training step of a mixture: a fresh router is centred, and sequences are shared out over the experts.

The router reads the beginnings of all sequences, ranks exchange their scores, and every rank comes to the same
choice (model/choice.py), whatever the split. It costs the router's pass over the prefixes, and no expert's.
"""

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args
from torch import Tensor

from cherry_megatron.data.batches import EXPERTS, Rows
from cherry_megatron.model.choice import assign, evenly, top
from cherry_megatron.model.mixture import MixtureModel


@torch.no_grad()
def centre_router(mixture: MixtureModel, rows: Rows) -> None:
    """Centre a fresh router on the prefixes of a global batch. All ranks call it, before a run's first step.

    With any `top_k`: a router that has learned without a centre would lose what it has learned to a later one.
    One that has a centre, from a mixture that this run starts from, keeps it.

    Args:
        mixture: on this rank.
        rows: the micro-batches of the step, on ranks that read data.
    """
    if mixture.router.centre.any():
        return
    prefixes = _prefixes(rows, mixture.options.prefix)  # [m, b, prefix]
    found = mixture.router(prefixes.flatten(0, 1)).mean(1)  # [m * b, experts]
    mixture.router.centre_on(_everyones(found.view(*prefixes.shape[:2], -1)).flatten(0, 2))


@torch.no_grad()
def choose_experts(mixture: MixtureModel, rows: Rows) -> None:
    """Give each micro-batch of a step its `experts`, and the mixture their load. All ranks call it.

    Args:
        mixture: on this rank, which routes.
        rows: the micro-batches of the step, on ranks that read data.
    """
    options = mixture.options
    prefixes = _prefixes(rows, options.prefix)  # [m, b, prefix]
    scores = mixture.scores(mixture.router(prefixes.flatten(0, 1)))
    together = _everyones(scores.view(*prefixes.shape[:2], -1))
    wanted = top(together.flatten(0, 2), options.top_k).float().mean(0)
    # After capacity the load is nearly even however uneven the router: its loss would teach nothing.
    mixture.load.copy_(wanted / wanted.sum())
    if get_args().moe_router_force_load_balancing:
        chosen = evenly(together[..., 0].numel(), options.experts, options.top_k).to(together.device)
    else:
        chosen = assign(together.flatten(0, 2), options.top_k, options.capacity)
    if rows is not None:
        ours = chosen.view_as(together)[:, mpu.get_data_parallel_rank()].float()
        for row, experts in zip(rows, ours, strict=True):
            row[EXPERTS] = experts


def _prefixes(rows: Rows, prefix: int) -> Tensor:
    """The first tokens of this rank's sequences on all tensor-parallel ranks, [m, b, prefix]."""
    args = get_args()
    shape = (get_num_microbatches(), args.micro_batch_size, prefix)
    found = torch.empty(shape, dtype=torch.int64, device=torch.cuda.current_device())
    if rows is not None:
        found.copy_(torch.stack([row["tokens"][:, :prefix] for row in rows]))
    _from_first(found)
    return found


def _everyones(ours: Tensor) -> Tensor:
    """What all data-parallel ranks have, in the order of the data: [m, b, n] to [m, ranks, b, n]."""
    ours = ours.contiguous()
    _from_first(ours)  # routers of tensor-parallel ranks may differ in the last bit
    group = mpu.get_data_parallel_group()
    everyone = [torch.empty_like(ours) for _ in range(group.size())]
    torch.distributed.all_gather(everyone, ours, group=group)
    return torch.stack(everyone, dim=1)


def _from_first(found: Tensor) -> None:
    """Give all tensor-parallel ranks what the first one has."""
    torch.distributed.broadcast(found, group=mpu.get_tensor_model_parallel_group(), group_src=0)
