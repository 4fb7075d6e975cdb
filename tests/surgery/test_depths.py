"""Layers of multi-token prediction go with a checkpoint through surgery, bit for bit; missing ones are drawn."""

import numpy as np
import pytest

from cherry_megatron.errors import CherryError
from cherry_megatron.storage.checkpoint import open_checkpoint
from cherry_megatron.surgery import compress
from tests.conftest import run_ranks
from tests.surgery.test_expand import _logits

OPTIONS = compress.Options()
DENSE = {"pattern": "(*-)x4", "loop_scales": False}


@pytest.fixture(scope="module")
def deep(tmp_path_factory, write_config, train):
    """The configuration of a trained dense model of four layers with one depth."""
    path = write_config(tmp_path_factory.mktemp("deep"), recurrence=DENSE, mtp={"depths": 1})
    train(path, flags="--train-iters 2 --lr-decay-iters 20")
    return path


def test_compression_takes_them_over_and_draws_more(deep, tmp_path, write_config, train):
    small = tmp_path / "small"
    recurrence = {"pattern": "*-[*-]x2*-", "loop_scales": False}
    start = {"load": str(small), "finetune": True}
    path = write_config(tmp_path, mtp={"depths": 2}, recurrence=recurrence, megatron=start)
    compress.plan_compression(deep.parent / "run", path, (), OPTIONS).run(small, 2)
    before, after = open_checkpoint(deep.parent / "run/checkpoints"), open_checkpoint(small)
    names = [name for name in before.model if name.startswith("mtp.")]
    assert len(names) == 10
    for name in names:
        assert np.array_equal(before.read(name), after.read(name)), name
        drawn = after.read(name.replace("mtp.layers.0", "mtp.layers.1"))
        spread = 0.02 * 8**-0.5 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0.02
        if "norm" in name:
            assert (drawn == 1).all()
        else:
            assert drawn.std() == pytest.approx(spread, rel=0.1), name
    (step,) = train(path, flags="--train-iters 1 --lr-warmup-iters 0")
    assert step["mtp"].keys() == {"loss/1", "loss/2"}
    with pytest.raises(CherryError, match=r"mtp.depths is 0, but .* has 1, which are taken over"):
        compress.plan_compression(deep.parent / "run", path, ("mtp.depths=0",), OPTIONS)
    with pytest.raises(CherryError, match=r"no moments for new layers of mtp.depths 2"):
        compress.plan_compression(deep.parent / "run", path, (), compress.Options(optimizer="average"))


@pytest.mark.full
def test_moments_and_expansion_keep_them(deep, tmp_path, write_config, train):
    looped = write_config(
        tmp_path,
        mtp={"depths": 1},
        recurrence={"pattern": "*-[*-]x2*-"},
        megatron={"load": str(tmp_path / "small"), "finetune": True},
    )
    moments = compress.Options(optimizer="average")
    compress.plan_compression(deep.parent / "run", looped, (), moments).run(tmp_path / "small", 2)
    before, after = open_checkpoint(deep.parent / "run/checkpoints"), open_checkpoint(tmp_path / "small")
    names = [name for name in before.tensors if "mtp." in name]
    assert len(names) == 40  # weights, their copy and two moments
    for name in names:
        assert np.array_equal(before.read(name), after.read(name)), name
    train(looped, flags="--train-iters 3 --lr-decay-iters 20 --lr 0.03")
    compress.plan_expansion(tmp_path / "run", looped, ()).run(tmp_path / "wide", 2)
    dense = write_config(
        tmp_path / "dense",
        mtp={"depths": 1},
        recurrence={"pattern": "(*-)x4", "loop_scales": False},
        megatron={"load": str(tmp_path / "wide"), "finetune": True},
    )
    trained, wide = open_checkpoint(tmp_path / "run/checkpoints"), open_checkpoint(tmp_path / "wide")
    for name in names:
        assert name not in trained.model or np.array_equal(trained.read(name), wide.read(name)), name
    (ours,), (theirs,) = (run_ranks(path.parent / "out", 1, _logits, path) for path in (dense, looped))
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-5
