"""Which experts see a sequence: its top k by the router's mean gate over the prefix, as far as there is room.

Training chooses for a whole global batch before its step, in the order of the data, so that no split into ranks
and micro-batches changes a choice. Evaluation knows no capacity: there a sequence's experts depend on it alone.
"""

import torch
from torch import Tensor

from cherry_megatron.model.options import room


def top(scores: Tensor, top_k: int) -> Tensor:
    """The experts with the highest scores; of equal ones the first.

    Args:
        scores: [rows, experts].
        top_k: how many.

    Returns:
        [rows, experts], true for a row's own choice.
    """
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def evenly(rows: int, experts: int, top_k: int) -> Tensor:
    """Row i to expert i and to others as far apart as k of them can be, counted round.

    As many rows in succession as there are experts load all of them alike. Neighbours lie on one rank: far apart,
    the ranks have as much to do in a micro-batch of few rows too.

    Args:
        rows: of a global batch.
        experts: of the mixture.
        top_k: how many experts a row is to have.

    Returns:
        [rows, experts], true where the expert sees the row; on the CPU.
    """
    distance = experts // top_k
    steps_from_row = (torch.arange(experts) - torch.arange(rows).unsqueeze(1)) % experts
    return (steps_from_row % distance == 0) & (steps_from_row < top_k * distance)


def assign(scores: Tensor, top_k: int, capacity: float) -> Tensor:
    """Share rows out over the experts.

    The pairs of row and expert are gone through from the highest score down; a pair counts if the row has fewer
    than k experts and the expert has room. So who finds an expert full takes its next best one. Every row gets at
    least one; it gets fewer than k only if all that it lacks are full.

    Args:
        scores: [rows, experts] of a global batch, in the order of the data.
        top_k: how many experts a row is to have.
        capacity: of an expert, as a multiple of its even share.

    Returns:
        [rows, experts], true where the expert sees the row.
    """
    rows, experts = scores.shape
    limit = room(rows, experts, top_k, capacity)
    chosen = top(scores, top_k)
    if int(chosen.sum(0).max()) <= limit:
        return chosen
    chosen = torch.zeros(rows, experts, dtype=torch.bool)
    wanted, free = [top_k] * rows, [limit] * experts
    for pair in scores.flatten().argsort(descending=True, stable=True).tolist():
        row, expert = divmod(pair, experts)
        if wanted[row] and free[expert]:
            chosen[row, expert] = True
            wanted[row] -= 1
            free[expert] -= 1
    return chosen.to(scores.device)
