"""Models of every kind, made and saved by Megatron, with what they say about some tokens."""

import argparse
from pathlib import Path
from typing import Any

import yaml

LENGTH, VOCABULARY = 16, 64
MIXED_VOCABULARY = 32
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
# Sections of `recurrence`, and what else a model has.
CASES: dict[str, dict[str, Any]] = {
    "dense": {"pattern": "(*-)x4"},
    "dense-tied": {"pattern": "(*-)x3", "tied": True, "groups": 1},
    "dense-ahead": {"pattern": "(*-)x3", "depths": 2},
    "all": {"pattern": "*-[*-*-]x4*-", "loop_scales": True, "loop_rank": 3, "injection": "add", "depths": 1},
    "sequence": {
        "pattern": "*-[*-*-]x3*-", "order": "sequence", "loop_scales": True, "loop_rank": 2, "tied": True,
        "groups": 4,
    },
    "other-layers": {"pattern": "*--[*-*--]x2*", "loop_rank": 2},
    "experts": {"pattern": "*-[*E*-]x3*E", "loop_routers": True, "loop_scales": True, "experts": True},
    "experts-shared": {"pattern": "*-[*E]x2*-", "experts": True, "pre_softmax": True, "depths": 1},
    "begins-with-mlp": {"pattern": "*-[-*-]x2-", "loop_scales": True},
    "plain-mlp": {"pattern": "*-[*-]x2*-", "gated": False},
    "squared": {"pattern": "*-[*-]x2*-", "gated": False, "squared": True},
}  # fmt: skip
RECURRENCE = ("pattern", "order", "loop_scales", "loop_rank", "loop_routers", "injection")


def recurrence_of(case: dict[str, Any]) -> dict[str, Any]:
    return {key: case[key] for key in RECURRENCE if key in case}


def write_config(folder: Path, case: dict[str, Any], **more: Any) -> Path:
    """The configuration that such a model would have been trained with."""
    groups = case.get("groups", 2)
    megatron: dict[str, Any] = {
        "hidden-size": 32, "ffn-hidden-size": 48, "num-attention-heads": 4, "kv-channels": 8,
        "swiglu": case.get("gated", True), "padded-vocab-size": VOCABULARY, "seq-length": LENGTH,
        "max-position-embeddings": LENGTH, "untie-embeddings-and-output-weights": not case.get("tied", False),
    }  # fmt: skip
    if groups != 4:
        megatron |= {"group-query-attention": True, "num-query-groups": groups}
    if case.get("experts"):
        megatron |= {"num-experts": 4, "moe-router-topk": 2, "moe-ffn-hidden-size": 24}
        megatron |= {"moe-router-pre-softmax": case.get("pre_softmax", False)}
    if case.get("squared"):
        megatron["squared-relu"] = True
    content = {"run": str(folder / "run"), "recurrence": recurrence_of(case), "megatron": megatron}
    if case.get("depths"):
        content["mtp"] = {"depths": case["depths"]}
    for section, values in more.items():
        content[section] = {**content.get(section, {}), **values}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def make(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Save each of these models under its name; gives what each says. On one rank."""
    return {name: _make(folder / name / "run", CASES[name]) for name in names}


def _make(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    import torch

    from cherry_megatron.model.options import Recurrence
    from tests.model.test_stack import build

    recurrence = Recurrence(**recurrence_of(case))
    # One more loop than has weights of its own.
    walks = Recurrence(**recurrence_of(case), loops=recurrence.loops + 1) if recurrence.loops > 1 else recurrence
    further: dict[str, Any] = {}
    if case.get("experts"):
        further |= {**EXPERTS, "moe_router_pre_softmax": case.get("pre_softmax", False)}
    if not case.get("gated", True):
        from megatron.core.activations import squared_relu

        activation = squared_relu if case.get("squared") else torch.nn.functional.gelu
        further |= {"gated_linear_unit": False, "activation_func": activation}
    model, plan, tokens = build(
        walks,
        groups=case.get("groups", 2),
        depths=case.get("depths", 0),
        further=further,
        tied=case.get("tied", False),
    )
    save(folder, model, recurrence.parsed.symbols, squared_relu=case.get("squared", False), **further)
    model.eval()
    logits, texts = {}, {}
    with torch.no_grad():
        for loops in sorted({1, recurrence.loops, walks.loops}):
            model.decoder.loops = loops
            logits[loops] = _logits(model, tokens).numpy()
            text = tokens[:, :6]
            for _ in range(LENGTH - 6):
                text = torch.cat((text, _logits(model, text)[:, -1:].argmax(-1)), 1)
            texts[loops] = text.numpy()
        ahead = _ahead(model, plan, tokens, recurrence, case) if case.get("depths") else []
    return {"tokens": tokens.numpy(), "logits": logits, "texts": texts, "ahead": ahead}


def _logits(model: Any, tokens: Any) -> Any:
    import torch

    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None).float()


def _ahead(model: Any, plan: Any, tokens: Any, recurrence: Any, case: dict[str, Any]) -> list[Any]:
    """What is predicted ahead with the trained number of loops, by plain PyTorch; of layers without experts."""
    from tests.model import reference

    if case.get("experts"):
        return []
    state = {reference.local_name(name): p.detach() for name, p in model.named_parameters()}
    walk = [(v.layer, v.loop) for v in plan.visits if v.loop is None or v.loop < recurrence.loops]
    sizes = {"heads": 4, "groups": case.get("groups", 2), "size": 8}
    prelude = len(recurrence.parsed.prelude)
    x = reference.states(state, tokens, walk, injection=recurrence.injection, prelude=prelude, **sizes)
    found = reference.predicted_ahead(state, tokens, x, case["depths"], **sizes)
    return [logits.numpy() for logits in found]


def make_mixture(folder: Path, top_k: int, depths: int = 0) -> dict[str, Any]:
    """The same of a mixture of three models; its losses by token, not logits. On one rank."""
    import torch

    from cherry_megatron.model.options import Mixture
    from tests.model.test_mixture import build

    model = build(Mixture(experts=3, top_k=top_k, prefix=4, router_hidden=8), depths=depths).eval()
    model.router.centre += torch.tensor([0.5, -0.5, 0.0])
    save(folder / "run", model, "*-*-", num_attention_heads=2)
    tokens = torch.randint(0, MIXED_VOCABULARY, (6, LENGTH), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        positions = torch.arange(LENGTH - 1).expand(6, -1)
        losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
        ahead = [] if model.ahead is None else [of.numpy() for of in model.ahead.losses]
    return {"tokens": tokens.numpy(), "losses": losses.numpy(), "chosen": model.seen.chosen.numpy(), "ahead": ahead}


def mixture_config(folder: Path, top_k: int, depths: int = 0) -> Path:
    sizes = {
        "hidden-size": 16, "ffn-hidden-size": 24, "num-attention-heads": 2, "kv-channels": None,
        "padded-vocab-size": MIXED_VOCABULARY,
    }  # fmt: skip
    case = {"pattern": "*-[*-]x2", "groups": 4, "depths": depths}
    moee = {"experts": 3, "top_k": top_k, "prefix": 4, "router_hidden": 8}
    return write_config(folder, case, megatron=sizes, moee=moee)


def save(folder: Path, model: Any, pattern: str, **arguments: Any) -> None:
    """Write a checkpoint as Megatron does."""
    from megatron.core import dist_checkpointing

    known = {
        "num_layers": len(pattern), "hybrid_layer_pattern": pattern, "rotary_base": 10000,
        "layernorm_epsilon": 1e-5, "num_attention_heads": 4, "squared_relu": False,
        **{key: value for key, value in arguments.items() if not callable(value)},
    }  # fmt: skip
    common = {"args": argparse.Namespace(**known), "checkpoint_version": 3.0, "iteration": 3}
    (folder / "iter_0000003").mkdir(parents=True)
    dist_checkpointing.save({**common, **model.sharded_state_dict()}, folder / "iter_0000003")
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
