"""The sums of multi-token prediction: what is shifted, and that no split changes them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cherry_megatron.model.multi_token import Ahead, ahead
from cherry_megatron.sgt.loss import loss_function
from tests.conftest import run_ranks


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 3), st.integers(0, 99))
def test_rows_add_up_to_the_sums_of_the_definition(rows, depths, share, seed):
    draw = torch.Generator().manual_seed(seed)
    losses, apart = torch.rand(2, rows, 5, generator=draw, dtype=torch.float64)
    later = torch.rand(depths, rows, 5, generator=draw, dtype=torch.float64)
    mask = (torch.rand(rows, 5, generator=draw) < 0.6).float()
    weights = torch.rand(rows, 5, generator=draw)
    mixed = {"divergence": apart, "share": share / 3} if share else {}
    total = 0.0
    for row in range(rows):
        found = Ahead(later[:, row : row + 1], None, 0.3)
        arguments = {name: value[row : row + 1] if name == "divergence" else value for name, value in mixed.items()}
        part, _, report = loss_function(
            mask[row : row + 1], losses[row : row + 1], weights=weights[row : row + 1], ahead=found, **arguments
        )
        assert "weighted loss" in report
        total += float(part)
    counted = (mask * weights).tolist()
    wanted = 0.0
    for b in range(rows):
        for t in range(5):
            own = (1 - share / 3) * losses[b, t] + share / 3 * apart[b, t] if share else losses[b, t]
            wanted += counted[b][t] * float(own)
            for d in range(1, depths + 1):
                if t + d < 5:
                    wanted += 0.3 / depths * counted[b][t + d] * float(later[d - 1, b, t])
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 7))
def test_ahead_moves_each_row_by_itself(depth):
    values = torch.arange(1, 17).view(2, 8)
    found = ahead(values, depth)
    assert found[:, : 8 - depth].equal(values[:, depth:])
    assert not found[:, 8 - depth :].any()


def _likeliest(logits):
    import os

    from cherry_megatron.model.multi_token import likeliest

    torch.distributed.init_process_group("gloo")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return likeliest(logits.chunk(world, -1)[rank], torch.distributed.group.WORLD).tolist()


def test_likeliest_over_ranks_takes_the_first_of_equals(tmp_path):
    logits = torch.randint(0, 4, (6, 3, 12), generator=torch.Generator().manual_seed(1)).float()
    wanted = torch.stack([(row == row.max(-1, keepdim=True).values).int().argmax(-1) for row in logits])
    for found in run_ranks(tmp_path, 2, _likeliest, logits):
        assert found == wanted.T.tolist()
