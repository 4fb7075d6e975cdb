"""The looped stack equals a tied model unrolled by hand: outputs and every gradient, in float32."""

import itertools
from pathlib import Path

import pytest

from tests.conftest import run_ranks

TOLERANCE = 1e-6


def build(
    recurrence, recompute=False, implementation="local", groups=2, seed=3, depths=0, further=None, tied=False
):
    """A tiny model on this rank with perturbed norms and loop parameters, its plan, and a batch."""
    from cherry_megatron.platform.machine import prepare

    prepare()
    import torch
    from megatron.core import mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from cherry_megatron.model.build import build_model, prepare_config
    from cherry_megatron.model.plan import make_plan
    from cherry_megatron.model.shape import Shape

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        mpu.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
    shape = Shape(hidden=32, ffn=48, heads=4, groups=groups, head_size=8, vocabulary=64, tied=tied)
    extra = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = TransformerConfig(
        num_layers=len(recurrence.parsed.symbols), hidden_size=32, ffn_hidden_size=48, num_attention_heads=4,
        num_query_groups=groups, kv_channels=8,
        normalization="RMSNorm", add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, transformer_impl=implementation,
        masked_softmax_fusion=False, bias_dropout_fusion=False, is_hybrid_model=True, init_method_std=0.1,
        mtp_num_layers=depths or None, **(extra if recompute else {}),
        **({"gated_linear_unit": True, "activation_func": torch.nn.functional.silu} | (further or {})),
    )  # fmt: skip
    config = prepare_config(config, recurrence)
    plan = make_plan(recurrence, shape, 16, 1, depths)
    model = build_model(
        config, recurrence, shape, plan, ProcessGroupCollection.use_mpu_process_groups(),
        sequence_length=16, rotary_base=10000, seed=seed, pre_process=True, post_process=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 64, (2, 16), generator=generator)
    for name, parameter in model.named_parameters():
        if "norm" in name or "loop_" in name or "router" in name:
            size = 0.3 if parameter.dim() == 1 else 0.05  # of corrections: about as large as the weights
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model.cuda(), plan, tokens


def compare(recurrence, recompute, loops=None, implementation="local"):
    """Relative errors of logits and gradients against the reference."""
    import torch

    from tests.model import reference

    model, plan, tokens = build(recurrence, recompute, implementation)
    if loops is not None:
        model.decoder.loops = loops
    target = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(9))
    logits = model(tokens.cuda(), torch.arange(16).expand(2, -1).cuda(), None).cpu()
    (logits * target).sum().backward()
    # The reference knows the names of the local layers, whose norms are modules of their own.
    names = {k: reference.local_name(k) for k, _ in model.named_parameters()}
    state = {names[k]: p.detach().cpu().clone().requires_grad_() for k, p in model.named_parameters()}
    walk = [(v.layer, v.loop) for v in plan.visits if v.loop is None or v.loop < model.decoder.loops]
    expected = reference.forward(
        state, tokens, walk, heads=4, groups=2, size=8, injection=recurrence.injection,
        prelude=len(plan.pattern.prelude),
    )  # fmt: skip
    (expected * target).sum().backward()

    def error(a, b):
        return float((a - b).norm() / b.norm())

    errors = {"logits": error(logits.detach(), expected.detach())}
    for name, parameter in model.named_parameters():
        ours, theirs = parameter.grad, state[names[name]].grad
        ours = None if ours is None else ours.cpu()
        if theirs is None or not theirs.any():
            errors[name] = 0.0 if ours is None or not ours.any() else float("inf")
        else:
            errors[name] = error(ours, theirs)
    return errors


CASES = [
    {"pattern": "*-[*-*-]x4*-", "order": order, "loop_scales": scales, "injection": injection}
    for order, scales, injection in itertools.product(("cycle", "sequence"), (True, False), ("none", "add"))
    if not (order == "sequence" and injection == "add")
] + [{"pattern": "*-[*-*-]x4*-", "loop_scales": scales, "loop_rank": 3} for scales in (True, False)]


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, list(c.values())[1:])))
def test_looped_equals_hand_unrolled(case, recompute, tmp_path: Path):
    from cherry_megatron.model.options import Recurrence

    (errors,) = run_ranks(tmp_path, 1, compare, Recurrence(**case), recompute)
    assert len(errors) > 20
    worst = max(errors, key=errors.get)
    assert errors[worst] <= TOLERANCE, (worst, errors[worst])


def test_fewer_and_more_loops_than_trained(tmp_path: Path):
    from cherry_megatron.model.options import Recurrence

    for loops in (1, 2):
        recurrence = Recurrence("*-[*-*-]x4*-", loop_scales=True, loop_rank=2)
        (errors,) = run_ranks(tmp_path, 1, compare, recurrence, False, loops)
        assert max(errors.values()) <= TOLERANCE


def one_loop_and_plain():
    """Logits of the stack at initialization with one loop, and of the plain stack of its layers."""
    import torch

    from cherry_megatron.model.options import Recurrence
    from cherry_megatron.platform.machine import prepare

    prepare()
    looped = Recurrence("*-[*-*-]x1*-", loop_scales=True, injection="add")
    plain = Recurrence("*-*-*-*-")
    out = []
    for recurrence in (looped, plain):
        model, _, tokens = build(recurrence)
        torch.nn.init.ones_(model.decoder.final_norm.weight)
        for name, parameter in model.named_parameters():
            if "norm" in name or "loop_" in name:
                torch.nn.init.ones_(parameter)
        out.append(model(tokens, torch.arange(16).expand(2, -1), None).detach())
    return torch.equal(*out)


def test_one_loop_is_the_plain_stack(tmp_path: Path):
    assert run_ranks(tmp_path, 1, one_loop_and_plain) == [True]


def truncated():
    """Gradient norms by loop vector when only the last two of four loops carry gradient."""
    import torch

    from cherry_megatron.model.options import Recurrence

    recurrence = Recurrence("*-[*-*-]x4*-", loop_scales=True, injection="add", backprop_loops=2)
    model, _, tokens = build(recurrence)
    model(tokens, torch.arange(16).expand(2, -1), None).square().sum().backward()
    scales = [p.grad.view(4, 32).norm(dim=1).tolist() for n, p in model.named_parameters() if "loop_scale" in n]
    embedding = model.embedding.word_embeddings.weight.grad
    return scales, float(embedding.norm())


def test_backprop_through_the_last_loops_only(tmp_path: Path):
    ((scales, embedding),) = run_ranks(tmp_path, 1, truncated)
    assert len(scales) == 8, "of norms, and of what sublayers add"
    for of_loops in scales:
        assert of_loops[0] == of_loops[1] == 0.0
        assert min(of_loops[2:]) > 0.0
    assert embedding > 0.0
