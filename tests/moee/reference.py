"""A second implementation of the mixture in plain PyTorch: no Megatron, one process, every row by itself."""

import math
from fractions import Fraction

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
    limit = math.ceil(Fraction(str(capacity)) * k * rows / experts)
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
    """Loss, gradients and report of a training step.

    Args:
        state: name -> tensor of the mixture's checkpoint.
        batch: tokens, labels, loss_mask, [rows, s] of the global batch.
        options: experts, top_k, prefix, balance, capacity; depths and weight of multi-token prediction;
            `teacher`: its weights and its own `model`, the share and the temperature of its divergence, or None;
            `sgt`: top_loss and alpha of selective supervision, or None.
        model: walk, heads, groups, size of an expert.

    Returns:
        Mean loss without the balance and what is predicted ahead, the gradient by name of the whole, what is
        reported of the mixture, the experts of each row, mean loss and acceptance of each depth, and the mean
        divergence.
    """
    state = {name: value.double() for name, value in state.items()}
    trained = {name: value.requires_grad_() for name, value in state.items() if name != "router.centre"}
    of_router = {name.removeprefix("router."): value for name, value in state.items() if "router." in name}
    experts, k, teacher = options["experts"], options["top_k"], options.get("teacher")
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
    if k < experts:
        chosen = share_out(scores.tolist(), k, options["capacity"])
    wanted = [set(sorted(range(experts), key=lambda e: -row[e])[:k]) for row in scores.tolist()]
    load = torch.tensor([sum(e in row for row in wanted) for e in range(experts)], dtype=torch.float64)
    load /= load.sum()  # of what the router wants, whether there is room or not
    mask = batch["loss_mask"].double()
    missed, apart, later = [], [], [[] for _ in range(options["depths"])]
    accepted = [[] for _ in later]
    added = 0.0
    seen = []  # the row, the gates over its experts, their losses, of each token with a loss
    for row in range(len(gates)):
        found = {e: _likelihoods(models[e], batch, row, len(later), model) for e in sorted(chosen[row])}
        likelihoods = {e: of_depths[0][0] for e, of_depths in found.items()}
        weight = sum(gates[row][:, e] for e in likelihoods)
        for depth in range(1, len(later) + 1):
            shares = {e: (gates[row][:, e] / weight)[:-depth] for e in found}
            later[depth - 1].append(-sum(share * found[e][depth][0] for e, share in shares.items()).log())
            accepted[depth - 1].append(sum(share.detach() * found[e][depth][1] for e, share in shares.items()))
        likelihood = sum(gates[row][:, e] / weight * p for e, p in likelihoods.items())
        missed.append(-likelihood.log())
        if teacher is not None:
            mixed = {e: gates[row][:, e] / weight for e in found}
            apart.append(_divergence(mixed, models, teacher, batch["tokens"][row], model))
        if k < experts:
            added = added + options["balance"] * experts * (load * scores[row]).sum() * mask[row].sum()
        for t in mask[row].nonzero().flatten().tolist():
            g = {e: float(gates[row][t, e] / weight[t]) for e in likelihoods}
            seen.append((row, g, {e: float(p[t]) for e, p in likelihoods.items()}))
    missed, later = torch.stack(missed), [torch.stack(of) for of in later]
    apart = torch.stack(apart) if apart else torch.zeros_like(missed)
    tokens, counted = mask.sum(), mask * _weights(missed.detach(), mask, options.get("sgt"))
    ahead = sum((of * counted[:, depth:]).sum() for depth, of in enumerate(later, start=1))
    ahead = ahead * options["weight"] / len(later) if later else 0.0
    share = 0.0 if teacher is None else teacher["share"]
    ((((1 - share) * missed + share * apart) * counted).sum() + added + ahead).div(tokens).backward()
    report = _report(seen, chosen, wanted, experts)
    gradient = {name: value.grad for name, value in trained.items()}

    def mean(values, depth=0):
        return float((values * mask[:, depth:]).sum() / mask[:, depth:].sum())

    of_depths = {f"loss/{d}": mean(of, d) for d, of in enumerate(later, start=1)}
    of_depths |= {f"acceptance/{d}": mean(torch.stack(of), d) for d, of in enumerate(accepted, start=1)}
    return mean(missed), gradient, report, chosen, of_depths, mean(apart)


def _weights(losses, mask, sgt):
    """How much each target counts, [rows, s]: those with the highest losses more, if any."""
    if sgt is None:
        return torch.ones_like(losses)
    eligible = sorted(losses[mask > 0].tolist(), reverse=True)
    count = round(sgt["top_loss"] * len(eligible))
    selected = (losses >= eligible[count - 1]).double()
    return 1 - sgt["alpha"] + sgt["alpha"] * selected * len(eligible) / count


def _likelihoods(weights, batch, row, depths, model):
    """What an expert and its depths give the targets of a row, and where it accepts these: [s - depth] of each."""
    tokens, labels = batch["tokens"][row : row + 1], batch["labels"][row]
    sizes = {key: value for key, value in model.items() if key != "walk"}
    x = reference.states(weights, tokens, **model)
    logits = [x @ weights["output_layer.weight"].T, *reference.predicted_ahead(weights, tokens, x, depths, **sizes)]
    likeliest = logits[0][0].argmax(-1)
    return [
        (F.softmax(each[0], -1).gather(1, labels[d:, None])[:, 0], (each[0].argmax(-1) == likeliest[d:]).double())
        for d, each in enumerate(logits)
    ]


def _divergence(gates, models, teacher, tokens, model):
    """The experts' divergences from the teacher mixed by their gates, [s], which bound the mixture's own."""
    degree = teacher["temperature"]
    theirs = F.log_softmax(reference.forward(teacher["state"], tokens[None], **teacher["model"])[0] / degree, -1)
    logits = {e: reference.forward(models[e], tokens[None], **model)[0] / degree for e in gates}
    apart = {e: (theirs.exp() * (theirs - F.log_softmax(of, -1))).sum(-1) for e, of in logits.items()}
    bound = sum(gates[e] * apart[e] for e in gates)
    together = sum(gates[e][:, None] * F.softmax(of, -1) for e, of in logits.items()).log()
    assert ((theirs.exp() * (theirs - together)).sum(-1) <= bound + 1e-12).all()
    return degree**2 * bound


def _report(seen, chosen, wanted, experts):
    """What steps.jsonl says of the step, but for the bytes."""
    rows, choices = len(chosen), sum(map(len, wanted))
    found = {
        "gate-entropy": -sum(g * math.log(g) for _, gates, _ in seen for g in gates.values()) / len(seen),
        "displaced": sum(len(own - given) for own, given in zip(wanted, chosen, strict=True)) / choices,
        "unplaced": 1 - sum(map(len, chosen)) / choices,
    }
    for e in range(experts):
        found[f"load/{e}"] = sum(e in row for row in chosen) / rows
        found[f"wanted/{e}"] = sum(e in row for row in wanted) / rows
        explained = [
            gates[e] * p[e] / sum(gates[other] * p[other] for other in p) for _, gates, p in seen if e in p
        ]
        found[f"responsibility/{e}"] = sum(explained) / len(seen)
        losses = [-math.log(p[e]) for _, _, p in seen if e in p]
        if losses:
            found[f"loss/{e}"] = sum(losses) / len(losses)
    return found
