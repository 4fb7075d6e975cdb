"""Messages of different sizes on gloo."""

from pathlib import Path

import pytest

from tests.conftest import HAS_GPU, run_ranks

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the CPU platform does not run beside a GPU")


def exchange():
    from cherry_megatron.platform import cpu

    cpu.activate()
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = torch.full((rank + 1, 2), float(rank + 1))
    gathered = list(torch.zeros(3, 2).split([1, 2]))
    dist.all_gather(gathered, mine)
    mean_of = [torch.full((1, 2), rank + 1.0), torch.full((2, 2), rank + 10.0)]
    scattered = torch.empty_like(mean_of[rank])
    dist.reduce_scatter(scattered, mean_of, group=dist.group.WORLD)
    swapped = torch.empty(3, 2)
    sizes = torch.tensor([1, 2]) if rank == 0 else torch.tensor([2, 1])
    dist.all_to_all_single(swapped, torch.full((3, 2), float(rank)), sizes, sizes)
    return [t.tolist() for t in gathered], scattered.tolist(), swapped[:, 0].tolist()


def test_gather_reduce_and_exchange(tmp_path: Path):
    first, second = run_ranks(tmp_path, 2, exchange)
    assert first[0] == second[0] == [[[1.0, 1.0]], [[2.0, 2.0], [2.0, 2.0]]]
    assert (first[1], second[1]) == ([[3.0, 3.0]], [[21.0, 21.0], [21.0, 21.0]])
    assert (first[2], second[2]) == ([0.0, 1.0, 1.0], [0.0, 0.0, 1.0])
