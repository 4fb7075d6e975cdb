"""What is found before a step: an even start, and a load that says what the router itself wants."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import run_ranks
from tests.model.test_mixture import build, run

ROWS, EXPERTS, TOP_K = 256, 8, 2


def choose(mixture, tokens, first=False, reads=True, forced=False):
    """What is found before a step of one micro-batch of rows, or before the first one."""
    from cherry_megatron import expert_choice

    args = SimpleNamespace(micro_batch_size=len(tokens), moe_router_force_load_balancing=forced)
    expert_choice.get_args = lambda: args
    expert_choice.get_num_microbatches = lambda: 1
    rows = [{"tokens": tokens}] if reads else None
    if first:
        expert_choice.centre_router(mixture, rows)
    expert_choice.choose_experts(mixture, rows)
    return rows and rows[0]["experts"].bool()


def start():
    """Load of fresh routers, before and after they have seen their first rows, and on other rows after it."""
    import torch

    from cherry_megatron.model.options import Mixture
    from cherry_megatron.model.router import Router

    options = Mixture(experts=EXPERTS, top_k=TOP_K, prefix=64, router_hidden=64)
    model = build(options)
    frequency = 1 / torch.arange(1, 2001).float()  # Zipf
    draw = torch.Generator().manual_seed(1)
    first, others = torch.multinomial(frequency, 2 * ROWS * 64, True, generator=draw).view(2, ROWS, 64).cuda()

    def load(rows):
        with torch.no_grad():
            scores = model.scores(model.router(rows))
        best = scores.topk(TOP_K).indices
        return float(best.flatten().bincount(minlength=EXPERTS).max() / (ROWS * TOP_K / EXPERTS))

    found = []
    for seed in (1, 2, 1234):
        model.router = Router(model.config, options, 2000, seed).cuda()
        before = load(first)
        choose(model, first, first=True)
        centre = model.router.centre.clone()
        choose(model, others, first=True)
        assert torch.equal(centre, model.router.centre), "a router is centred once"
        found.append((before, load(first), load(others)))
    return found


def test_a_fresh_router_has_no_favourites(tmp_path: Path):
    """The expert that most sequences want is wanted at most twice as often as with an even load."""
    ((*found,),) = run_ranks(tmp_path, 1, start)
    assert max(before for before, _, _ in found) > 3, "there was nothing to even out"
    assert max(max(after) for _, *after in found) <= 2


def collapsed():
    """Chosen and load where every row wants expert 0; the balance loss's gradient of the experts' outputs."""
    import torch

    from cherry_megatron.model.options import Mixture

    model = build(Mixture(experts=3, top_k=1, prefix=4, capacity=1.0, balance=1.0))
    model.router.outer.data.zero_()
    model.router.centre.copy_(torch.tensor([-1.0, 0.5, 0.5]))
    tokens = torch.randint(0, 32, (9, 16), generator=torch.Generator().manual_seed(1)).cuda()
    chosen = choose(model, tokens)
    model.router.centre.requires_grad_()  # a bias, but for its sign
    run(model, tokens, chosen=chosen)
    model.balance.sum().backward()
    return chosen.sum(0).tolist(), model.load.tolist(), (-model.router.centre.grad).tolist()


def test_capacity_does_not_hide_that_all_want_one_expert(tmp_path: Path):
    ((chosen, load, gradient),) = run_ranks(tmp_path, 1, collapsed)
    assert chosen == [3, 3, 3]
    assert load == [1, 0, 0]
    # d(experts * score_0) of each row, by each expert's logit.
    gates = [math.exp(1), math.exp(-0.5), math.exp(-0.5)]
    best, *others = (gate / sum(gates) for gate in gates)
    assert gradient == pytest.approx([27 * best * (1 - best), *(-27 * best * other for other in others)], rel=1e-4)


def forced():
    """Chosen and load where every row wants expert 0, and all experts have to see as many."""
    import torch

    from cherry_megatron.model.options import Mixture

    model = build(Mixture(experts=4, top_k=2, prefix=4, capacity=4.0))
    model.router.outer.data.zero_()
    model.router.centre.copy_(torch.tensor([-1.0, 0.0, 0.5, 0.5]))
    tokens = torch.randint(0, 32, (6, 16), generator=torch.Generator().manual_seed(1)).cuda()
    return choose(model, tokens, forced=True).tolist(), model.load.tolist()


def test_forced_balance(tmp_path: Path):
    """Every row has an expert of either half, whatever the router wants; that is still its load."""
    ((chosen, load),) = run_ranks(tmp_path, 1, forced)
    assert [[expert for expert, sees in enumerate(row) if sees] for row in chosen] == [
        [0, 2], [1, 3], [0, 2], [1, 3], [0, 2], [1, 3],
    ]  # fmt: skip
    assert load == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (8, 3), (8, 1), (4, 4), (5, 3)])
def test_forced_balance_is_of_any_rows_in_succession(experts, top_k):
    from cherry_megatron.model.choice import evenly

    chosen = evenly(3 * experts, experts, top_k).int()
    assert chosen.sum(1).eq(top_k).all()
    assert all(chosen[row : row + experts].sum(0).eq(top_k).all() for row in range(2 * experts))


def disagreeing():
    """Centre and load of tensor-parallel ranks whose routers differ, and what is chosen where data is read."""
    import torch

    from cherry_megatron.model.options import Mixture

    model = build(Mixture(experts=4, top_k=1, prefix=4, capacity=4.0), tensor_parallel=2)
    rank = torch.distributed.get_rank()
    model.router.outer.data.mul_(1 - 2 * rank)  # what one wants most the other wants least
    tokens = torch.randint(0, 32, (8, 16), generator=torch.Generator().manual_seed(1)).cuda()
    chosen = choose(model, tokens, first=True, reads=rank == 0)
    own = model.scores(model.router(tokens)).argmax(-1).bincount(minlength=4) / len(tokens)
    return model.router.centre.tolist(), model.load.tolist(), own.tolist(), rank or chosen.float().mean(0).tolist()


def test_tensor_parallel_ranks_have_one_centre_and_one_load(tmp_path: Path):
    """Those of the first one, which reads the data."""
    (centre, load, own, chosen), (other_centre, other_load, others, _) = run_ranks(tmp_path, 2, disagreeing)
    assert own != others
    assert centre == other_centre
    assert load == other_load == own == chosen
