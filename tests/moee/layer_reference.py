"""A second implementation of experts inside layers, in plain PyTorch: one process, every token by itself."""

import torch
from torch.nn import functional as F

from tests.model import reference


def experts(x, w, loop, top_k, pre_softmax):
    """One sublayer of experts, and what its router did: the scores [tokens, experts] and the choices of each token.

    x: [b, s, h] already normed. Weights: fc1 [experts, 2 * width, h], fc2 [experts, h, width].
    """
    router = w["mlp.router.weight"]
    logits = x.flatten(0, 1) @ (router if router.dim() == 2 else router[loop or 0]).T
    scores = logits.softmax(-1)
    chosen = [sorted(range(len(row)), key=lambda e, row=row: -row[e])[:top_k] for row in logits.tolist()]
    out = []
    for token, row, score, own in zip(x.flatten(0, 1), logits, scores, chosen, strict=True):
        gates = score[own] if pre_softmax else row[own].softmax(0)
        each = []
        for e in own:
            gate, up = (w["mlp.experts.experts.linear_fc1.weight"][e] @ token).chunk(2)
            each.append(w["mlp.experts.experts.linear_fc2.weight"][e] @ (F.silu(gate) * up))
        out.append(sum(g * y for g, y in zip(gates, each, strict=True)))
    return torch.stack(out).view_as(x), scores, chosen


def step(
    state, batch, pattern, loops, *, coefficient, top_k, pre_softmax=False, depths=0, ahead=0.0, teacher=None,
    share=0.0, injection="none", backprop=None,
):  # fmt: skip
    """Loss, load-balancing loss, gradients and report of a training step on the whole global batch.

    Args:
        state: name -> tensor of the checkpoint.
        batch: tokens, labels, loss_mask, [rows, s].
        pattern: prelude, core and coda, lists of layers such as "*E".
        loops: of the core.
        coefficient: of the load-balancing loss.
        top_k, pre_softmax: of the router.
        depths, ahead: of multi-token prediction, and its weight.
        injection, backprop: of the recurrence; the loops that the gradient goes through, by default all.
        teacher, share: logits [rows, s, v], and the share of the divergence from them in the loss.
    """
    trained = {name: value.double().requires_grad_() for name, value in state.items()}
    state = {reference.local_name(name): value for name, value in trained.items()}
    prelude, core, coda = pattern
    walk = [(layer, None) for layer in range(len(prelude))]
    walk += [(len(prelude) + layer, loop) for loop in range(loops) for layer in range(len(core))]
    walk += [(len(prelude) + len(core) + layer, None) for layer in range(len(coda))]
    layers = [*prelude, *core, *coda]
    x = state["embedding.word_embeddings.weight"][batch["tokens"]]
    balance, report, walks = 0.0, {}, {}
    for layer, loop in walk:
        cut = backprop is not None and loop is not None and loop < loops - backprop
        if layer == len(prelude) and loop == 0:
            injected = x
        elif layer == len(prelude) and loop is not None and injection == "add":
            x = x + injected
        for place, symbol in enumerate(layers[layer]):
            start = f"decoder.layers.{sum(map(len, layers[:layer])) + place}."
            w = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            norm, add = ("input_layernorm", "self_attn_bda") if symbol == "*" else ("pre_mlp_layernorm", "mlp_bda")
            weight, out = w[f"{norm}.weight"], 1.0
            if f"{norm}.loop_scale" in w:
                weight = weight * w[f"{norm}.loop_scale"].view(loops, -1)[loop]
                out = w[f"{add}.loop_scale"].view(loops, -1)[loop]
            y = reference.rms(x, weight)
            if symbol == "E":
                y, scores, chosen = experts(y, w, loop, top_k, pre_softmax)
            if symbol == "E" and not cut:
                count = torch.zeros(scores.shape[1], dtype=torch.float64)
                for own in chosen:
                    count[own] += 1
                balance = balance + coefficient * len(count) * (count / count.sum() * scores.mean(0)).sum()
                gates = torch.stack([row[own] / row[own].sum() for row, own in zip(scores, chosen, strict=True)])
                seen = torch.cat((count / len(chosen), -(gates * gates.log()).sum(-1).mean().detach()[None]))
                walks.setdefault(f"layer-{layer + 1}", {})[f"loop-{(loop or 0) + 1}"] = seen
            elif symbol != "E":
                y = reference.attention(y, w, 4, 4, 8, 10000.0) if symbol == "*" else reference.mlp(y, w)
            x = x + y * out
            x = x.detach() if cut else x
    for layer, each in walks.items():
        names = {layer: sum(each.values()) / len(each), **{f"{layer}/{loop}": seen for loop, seen in each.items()}}
        for name, (*loads, entropy) in names.items():
            report |= {f"load/{name}/{e}": float(load) for e, load in enumerate(loads)}
            report[f"gate-entropy/{name}"] = float(entropy)
    x = reference.rms(x, state["decoder.final_norm.weight"])
    logits = x @ state["output_layer.weight"].T
    losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    mask = batch["loss_mask"].double()
    loss = (losses * mask).sum() / mask.sum()
    further = 0.0
    predicted = reference.predicted_ahead(state, batch["tokens"], x, depths, heads=4, groups=4, size=8)
    for depth, later in enumerate(predicted, start=1):
        missed = F.cross_entropy(later.transpose(1, 2), batch["labels"][:, depth:], reduction="none")
        further = further + ahead / depths * (missed * mask[:, depth:]).sum() / mask.sum()
    if teacher is not None:
        apart = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        further = share * ((apart * mask).sum() / mask.sum() - loss)
    (loss + further + balance).backward()
    return float(loss), float(balance), {name: value.grad for name, value in trained.items()}, report
