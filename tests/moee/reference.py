"""A second implementation of the mixture in plain PyTorch: no Megatron, one process, every row by itself."""

import math

import torch
from torch.nn import functional as F

from tests.model import reference


def router(weights, tokens):
    """Gates [s, experts] of one row, token by token; tokens: [s]."""
    gates = []
    for t in range(len(tokens)):
        seen = weights["embedding"][tokens[: t + 1]]
        inner = weights["inner"] @ torch.cat((seen[-1], seen.sum(0) / (t + 1)))
        gates.append((weights["outer"] @ (inner * inner.sigmoid()) - weights["centre"]).softmax(0))
    return torch.stack(gates)


def share_out(scores, k, capacity):
    """The experts of each row, as sets: the best pair that is still allowed, again and again."""
    rows, experts = len(scores), len(scores[0])
    limit = math.ceil(capacity * k * rows / experts)
    found = [set() for _ in range(rows)]
    load = [0] * experts
    while True:
        allowed = [
            (-scores[r][e], r, e)
            for r in range(rows)
            for e in range(experts)
            if len(found[r]) < k and e not in found[r] and load[e] < limit
        ]
        if not allowed:
            return found
        _, row, expert = min(allowed)
        found[row].add(expert)
        load[expert] += 1


def step(state, batch, options, model):
    """Loss and gradients of a training step.

    Args:
        state: name -> tensor of the mixture's checkpoint.
        batch: tokens, labels, loss_mask, [rows, s] of the global batch.
        options: experts, top_k, prefix, balance, capacity.
        model: walk, heads, groups, size of an expert.

    Returns:
        Mean loss without the balance, the gradient by name of the whole, the experts of each row.
    """
    state = {name: value.double() for name, value in state.items()}
    trained = {name: value.requires_grad_() for name, value in state.items() if name != "router.centre"}
    of_router = {name.removeprefix("router."): value for name, value in state.items() if "router." in name}
    experts = options["experts"]
    models = [
        {
            reference.local_name(name.removeprefix(f"experts.{e}.")): value
            for name, value in state.items()
            if name.startswith(f"experts.{e}.")
        }
        for e in range(experts)
    ]
    gates = [router(of_router, row) for row in batch["tokens"]]
    scores = torch.stack([g[: options["prefix"]].mean(0) for g in gates])
    chosen = [set(range(experts))] * len(gates)
    if options["top_k"] < experts:
        chosen = share_out(scores.tolist(), options["top_k"], options["capacity"])
    wanted = [set(sorted(range(experts), key=lambda e: -row[e])[: options["top_k"]]) for row in scores.tolist()]
    load = torch.tensor([sum(e in row for row in wanted) for e in range(experts)], dtype=torch.float64)
    load /= load.sum()  # of what the router wants, whether there is room or not
    total = added = 0.0
    for row, mask in enumerate(batch["loss_mask"].double()):
        likelihood = weight = 0.0
        for e in sorted(chosen[row]):
            logits = reference.forward(models[e], batch["tokens"][row : row + 1], **model)[0]
            p = F.softmax(logits, -1).gather(1, batch["labels"][row][:, None])[:, 0]
            likelihood = likelihood + gates[row][:, e] * p
            weight = weight + gates[row][:, e]
        total = total - (mask * (likelihood / weight).log()).sum()
        if options["top_k"] < experts:
            added = added + options["balance"] * experts * (load * scores[row]).sum() * mask.sum()
    tokens = batch["loss_mask"].sum()
    ((total + added) / tokens).backward()
    return float(total / tokens), {name: value.grad for name, value in trained.items()}, chosen
