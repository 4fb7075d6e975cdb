"""Guards on a GPU: a skipped step leaves no trace in FP8 scales and dropout, and a graph is looked at too."""

import pytest

from tests.conftest import HAS_GPU, _train, run_ranks
from tests.gpu.test_selective import GRAPH, KINDS, SHAPE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]

DROPOUT = {**SHAPE, "hidden-dropout": 0.1, "lr-decay-style": "constant", "lr-warmup-iters": 0}


def train_skipping(path, flags, step):
    """Without `step` as the configuration says; else the loss of this step is NaN, after its passes."""
    from megatron.training import get_args

    from cherry_megatron.monitor import guards

    looked = guards._over_all_ranks

    def look(losses, norm):
        loss, norm = looked(losses, norm)
        return (float("nan") if get_args().curr_iteration + 1 == step else loss), norm

    guards._over_all_ranks = look
    _train(path, [], flags.split())


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_is_one_that_was_left_out(kind, tmp_path, write_config):
    """Eager and in a graph, found or named before, a step leaves the same run behind, bit for bit."""
    from cherry_megatron.runs import read_steps

    found = {}
    for name, guards, step in (("found", {"not_finite": "skip"}, 8), ("named", {"leave_out": [8]}, None)):
        path = write_config(tmp_path / name, megatron=DROPOUT, guards=guards)
        run_ranks(tmp_path / name, 1, train_skipping, path, f"{KINDS[kind]} --deterministic-mode", step)
        found[name] = [(s["loss"], s["grad_norm"]) for s in read_steps(tmp_path / name / "run")]
        assert ["skipped" in s for s in read_steps(tmp_path / name / "run")].index(True) == 7
    assert found["found"] == found["named"]


def train_broken(path, flags):
    """The weights are NaN from the eighth step on, which a graph records from the third."""
    from cherry_megatron.around_step import AroundStep

    prepare = AroundStep.prepare

    def broken(self, data_iterator, model, config):
        if self._progress.iteration == 8:
            next(model[0].parameters()).data.fill_(float("nan"))
        return prepare(self, data_iterator, model, config)

    AroundStep.prepare = broken
    _train(path, [], flags.split())


def test_a_graph_is_looked_at(tmp_path, write_config):
    from cherry_megatron.monitor.alarms import read_alarms

    path = write_config(tmp_path, megatron=DROPOUT)
    with pytest.raises(AssertionError, match="exited with 2"):
        run_ranks(tmp_path, 1, train_broken, path, f"--bf16 {GRAPH}")
    (alarm,) = read_alarms(tmp_path / "run")
    assert (alarm["kind"], alarm["iteration"]) == ("stop", 8)
