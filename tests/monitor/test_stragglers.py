"""Ranks that compute longer than the others."""

import time

from cherry_megatron.monitor.stragglers import slow_ranks
from tests.conftest import _train, run_ranks


def test_a_rank_is_slow_against_the_median():
    assert slow_ranks([1.0, 1.1, 1.0, 1.6], 1.5) == [3]
    assert slow_ranks([1.0, 1.4], 1.5) == []
    assert slow_ranks([1.0, 1.0, 3.0, 3.0], 1.5) == [2, 3], "of an even number the faster half counts"


def train_slowly(path, slow):
    from torch.distributed import get_rank

    from cherry_megatron.objective import Objective

    healthy = Objective.forward_step

    def forward_step(self, *given):
        time.sleep(0.15 if get_rank() == slow else 0)
        return healthy(self, *given)

    Objective.forward_step = forward_step
    _train(path, [], [])


def test_a_slow_replica_is_named(tmp_path, write_config):
    from cherry_megatron.monitor.alarms import read_alarms
    from cherry_megatron.runs import read_steps

    path = write_config(tmp_path, megatron={"train-iters": 5, "micro-batch-size": 4})
    run_ranks(tmp_path / "output", 2, train_slowly, path, 0)
    (alarm,) = read_alarms(tmp_path / "run")
    assert alarm["kind"] == "straggler" and alarm["text"].startswith("rank 0 on ")
    (*_, last) = read_steps(tmp_path / "run")
    assert last["ranks"]["rank"] == 0 and last["ranks"]["slowest"] > 0.15 > last["ranks"]["median"]
