"""The mixture of models: its bound, what a gate may see, who sees a sequence, what ranks exchange."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import run_ranks


def build(options, expert_parallel=1, tensor_parallel=1, depths=0):
    """A tiny mixture on this rank, its groups made."""
    from cherry_megatron.platform.machine import prepare

    prepare()
    import torch
    from megatron.core import mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    mpu.initialize_model_parallel(tensor_parallel, expert_model_parallel_size=expert_parallel)
    model_parallel_cuda_manual_seed(1)
    return make(options, tensor_parallel, depths=depths)


def make(options, tensor_parallel=1, seed=3, depths=0):
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    from cherry_megatron.model.build import build_mixture, prepare_config
    from cherry_megatron.model.options import Recurrence
    from cherry_megatron.model.plan import make_plan
    from cherry_megatron.model.shape import Shape

    recurrence = Recurrence("*-[*-]x2")
    shape = Shape(hidden=16, ffn=24, heads=2, groups=2, head_size=8, vocabulary=32)
    config = TransformerConfig(
        num_layers=4, hidden_size=16, ffn_hidden_size=24, num_attention_heads=2, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, normalization="RMSNorm", add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, transformer_impl="local", bias_dropout_fusion=False,
        is_hybrid_model=True, init_method_std=0.3, tensor_model_parallel_size=tensor_parallel,
        mtp_num_layers=depths or None,
    )  # fmt: skip
    model = build_mixture(
        options, prepare_config(config, recurrence), recurrence, shape, make_plan(recurrence, shape, 16, 1, depths),
        ProcessGroupCollection.use_mpu_process_groups(), sequence_length=16, rotary_base=10000, seed=seed,
        pre_process=True, post_process=True,
    )  # fmt: skip
    model.router.outer.data *= 30  # gates that differ
    return model.cuda()


def run(model, tokens, **more):
    import torch

    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None, labels=tokens.roll(-1, 1), **more)


def bounds():
    """Worst excess over the gate-weighted mean of the losses, and over the least of loss and its gate's -log."""
    import torch

    from cherry_megatron.model.options import Mixture

    model = build(Mixture(experts=2, prefix=4)).eval()
    draw = torch.Generator().manual_seed(1)
    above_mean, above_best, gap = [], [], []
    with torch.no_grad():
        for _ in range(8):
            loss = run(model, torch.randint(0, 32, (4, 16), generator=draw).cuda())
            gates, losses = model.seen.log_gates.exp(), model.seen.losses
            mean = (gates * losses).sum(-1)
            above_mean.append(float((loss - mean).max()))
            above_best.append(float((loss - (losses - gates.log()).min(-1).values).max()))
            gap.append(float((mean - loss).max()))
    return max(above_mean), max(above_best), max(gap)


def test_an_untrained_mixture_is_token_by_token_no_worse_than_its_experts_mean(tmp_path: Path):
    ((above_mean, above_best, gap),) = run_ranks(tmp_path, 1, bounds)
    assert above_mean <= 1e-6
    assert above_best <= 1e-6
    assert gap > 0.1, "the experts are too alike to show anything"


def accepted(options, ranks):
    """What a mixture accepts of two depths on this rank's rows, and what its experts do, weighted by its gates."""
    import torch

    model = build(options, ranks, depths=2).eval()
    every = torch.randint(0, 32, (6, 16), generator=torch.Generator().manual_seed(5)).cuda()
    tokens = every.chunk(ranks)[torch.distributed.get_rank()]
    alone = []
    with torch.no_grad():
        run(model, tokens)
        found, gates = model.ahead.agrees, model.seen.log_gates.exp()
        for expert in model.experts.values() if ranks == 1 else ():
            run(expert, tokens, agreement=True)
            alone.append(expert.ahead.agrees)
    expected = sum(gates[..., number] * agrees for number, agrees in enumerate(alone))
    return found.tolist(), expected.tolist() if alone else None


@pytest.mark.parametrize("top_k", [4, 2])
def test_a_mixture_accepts_what_its_experts_do_of_their_own(top_k, tmp_path: Path):
    import torch

    from cherry_megatron.model.options import Mixture

    options = Mixture(experts=4, top_k=top_k, prefix=4)
    ((found, expected),) = run_ranks(tmp_path / "one", 1, accepted, options, 1)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
    assert 0 < torch.tensor(found).mean() < 0.9
    halves = [torch.tensor(half) for half, _ in run_ranks(tmp_path / "two", 2, accepted, options, 2)]
    torch.testing.assert_close(torch.cat(halves, 1), torch.tensor(found))


@settings(deadline=None)  # the first one imports torch
@given(st.lists(st.tuples(st.floats(-20, 20), st.floats(0, 30)), min_size=1, max_size=8))
def test_jensen(pairs):
    """Of any gates and losses."""
    import torch

    from cherry_megatron.model.mixture import mixture_loss

    logits, losses = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    log_gates = logits.log_softmax(0)
    loss = float(mixture_loss(log_gates, losses))
    likelihood = sum(math.exp(g) * math.exp(-c) for g, c in zip(log_gates.tolist(), losses.tolist(), strict=True))
    assert loss == pytest.approx(-math.log(likelihood), abs=1e-9)
    assert loss <= float((log_gates.exp() * losses).sum()) + 1e-9
    assert loss <= float((losses - log_gates).min()) + 1e-9


def later_tokens():
    """What a changed token at position `t` changes before it: gates, losses; and after it."""
    import torch

    from cherry_megatron.model.options import Mixture

    model = build(Mixture(experts=3, top_k=2, prefix=4)).eval()
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 32, (1, 16), generator=draw).cuda()
    found = []
    with torch.no_grad():
        loss, gates = run(model, tokens), model.router(tokens)
        for t in range(4, 16):
            other = tokens.clone()
            other[0, t] = (other[0, t] + 7) % 32
            changed, changed_gates = run(model, other), model.router(other)
            # The loss at t - 1 is that of predicting the token itself.
            same = torch.equal(gates[:, :t], changed_gates[:, :t]) and torch.equal(
                loss[:, : t - 1], changed[:, : t - 1]
            )
            found.append((same, bool((gates[:, t:] != changed_gates[:, t:]).any())))
    return found


def test_no_gate_and_no_loss_depends_on_later_tokens(tmp_path: Path):
    ((*found,),) = run_ranks(tmp_path, 1, later_tokens)
    assert found == [(True, True)] * 12


@settings(deadline=None)
@given(st.data())
def test_rows_find_room(data):
    """Against the definition, pair by pair."""
    import torch

    from cherry_megatron.model.choice import assign, top
    from cherry_megatron.model.options import room
    from tests.moee.reference import share_out

    experts = data.draw(st.integers(2, 5))
    k, rows = data.draw(st.integers(1, experts - 1)), data.draw(st.integers(1, 12))
    # A few different scores: ties are many.
    score = st.integers(0, 3).map(lambda n: n / 4)
    scores = data.draw(st.lists(st.lists(score, min_size=experts, max_size=experts), min_size=rows, max_size=rows))
    capacity = data.draw(st.sampled_from([1.0, 1.05, 1.1, 1.25, 2.0, float(experts)]))
    chosen = assign(torch.tensor(scores), k, capacity)
    limit = room(rows, experts, k, capacity)
    assert [set(row.nonzero().flatten().tolist()) for row in chosen] == share_out(scores, k, capacity)
    assert chosen.sum(0).max() <= limit
    assert chosen.sum(1).min() >= 1
    for row in chosen[chosen.sum(1) < k]:
        assert (chosen.sum(0)[~row] == limit).all(), "a row went without an expert that had room"
    if limit == rows:
        assert torch.equal(chosen, top(torch.tensor(scores), k))


def test_room_is_that_of_the_capacity_as_written():
    from cherry_megatron.model.options import room

    assert room(160, 8, 3, 1.05) == 63  # 1.05 x 60; in floating point a little more
    assert room(8, 4, 2, 1.25) == 5
    assert room(9, 4, 1, 1.0) == 3
    assert room(4, 2, 1, 3.0) == 4


def traffic(options, depths):
    """Bytes that leave this rank in a step, as counted by the mixture, and message by message; broadcasts."""
    import torch

    model = build(options, expert_parallel=2, depths=depths)
    sent, broadcasts, broadcast = [], [], torch.distributed.broadcast
    torch.distributed.broadcast = lambda *args, **kwargs: broadcasts.append(broadcast(*args, **kwargs))
    gather, exchange = torch.distributed.all_gather_into_tensor, torch.distributed.all_to_all_single

    def counted_gather(output, ours, group=None):
        sent.append((ours.dtype, ours.nbytes * (group.size() - 1)))
        return gather(output, ours, group=group)

    def counted_exchange(output, ours, group=None, **kwargs):
        sent.append((ours.dtype, ours.nbytes * (group.size() - 1) // group.size()))
        return exchange(output, ours, group=group, **kwargs)

    torch.distributed.all_gather_into_tensor = counted_gather
    torch.distributed.all_to_all_single = counted_exchange
    draw = torch.Generator().manual_seed(torch.distributed.get_rank())
    run(model, torch.randint(0, 32, (3, 16), generator=draw).cuda()).sum().backward()
    return model.exchanged_bytes, [(str(kind), size) for kind, size in sent], len(broadcasts)


@pytest.mark.parametrize(("top_k", "depths"), [(4, 0), (2, 0), (2, 2)])
def test_ranks_exchange_ids_and_a_number_a_token_and_depth(top_k, depths, tmp_path: Path):
    from cherry_megatron.model.options import Mixture

    options = Mixture(experts=4, top_k=top_k, prefix=4)
    b, s, here = 3, 16, 2
    expected = [("torch.int32", 4 * b * s)] * 2 + [("torch.float32", 4 * b * s * here * (1 + depths))] * 2
    if top_k == 2:
        expected.insert(2, ("torch.uint8", 4 * b))
    for counted, sent, broadcasts in run_ranks(tmp_path, 2, traffic, options, depths):
        assert sent == expected
        assert broadcasts == (top_k < 4), "tensor-parallel ranks agree only where there is a choice"
        assert counted == sum(size for _, size in sent)


def seeds():
    """How many different initial embeddings there are among the experts of two mixtures, and all of them."""
    from cherry_megatron.model.options import Mixture

    models = [build(Mixture(experts=3)), make(Mixture(experts=3), seed=4)]
    found = [model.experts[str(e)].embedding.word_embeddings.weight for model in models for e in range(3)]
    return len({str(weight.tolist()) for weight in found}), len(found)


def test_mixtures_of_neighbouring_seeds_share_no_expert(tmp_path: Path):
    ((different, all_),) = run_ranks(tmp_path, 1, seeds)
    assert different == all_ == 6


def disagreeing():
    """Who sees a row in evaluation where the tensor-parallel ranks' routers want different experts."""
    import torch

    from cherry_megatron.model.options import Mixture

    model = build(Mixture(experts=4, top_k=1, prefix=4), tensor_parallel=2).eval()
    model.router.centre[torch.distributed.get_rank()] -= 9
    tokens = torch.randint(0, 32, (3, 16), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.no_grad():
        loss = run(model, tokens)
    return model.seen.chosen.tolist(), model.seen.wanted.tolist(), bool(loss.isfinite().all())


def test_tensor_parallel_ranks_walk_the_same_rows(tmp_path: Path):
    """In evaluation too: shapes that differ would make a collective hang."""
    (first, first_wanted, _), (second, second_wanted, _) = run_ranks(tmp_path, 2, disagreeing)
    assert first_wanted != second_wanted
    assert first == second == first_wanted


def observed():
    """Rows that each expert's stack shows its observer, in evaluation and training; all want expert 1."""
    import torch

    from cherry_megatron.model.options import Mixture
    from cherry_megatron.model.stack import recurrent_stacks

    model = build(Mixture(experts=3, top_k=1, prefix=4))
    model.router.centre[1] -= 9
    tokens = torch.randint(0, 32, (3, 16), generator=torch.Generator().manual_seed(1)).cuda()
    found = []
    for mode in (False, True):
        model.train(mode)
        rows = []
        for stack in recurrent_stacks(model):
            stack.observe = lambda loop, before, after, rows=rows: rows.append(after.shape[1])
        with torch.set_grad_enabled(mode):
            loss = run(model, tokens)
        found.append((rows, bool(loss.isfinite().all())))
    return found


def test_statistics_of_loops_are_of_rows_that_an_expert_sees(tmp_path: Path):
    """Two loops. In training an expert without a row walks one, for its gradients; nothing observes it there."""
    ((evaluated, trained),) = run_ranks(tmp_path, 1, observed)
    assert evaluated == ([3, 3], True)
    assert trained == ([1, 1, 3, 3, 1, 1], True)
