"""Experts inside layers on one GPU: a run's FFNs become experts of Transformer Engine's grouped GEMM."""

from pathlib import Path

import pytest

from tests.conftest import HAS_GPU
from tests.gpu.test_mixture import KINDS, SHAPE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("kind", KINDS)
def test_assembled_and_trained(kind, tmp_path: Path, write_config, train):
    """Names of extra states fit, and copies of one run have its loss before they are trained."""
    from cherry_megatron.cli import main
    from cherry_megatron.runs import read_evaluations

    flags = f"{KINDS[kind]} --train-iters 2 --lr-warmup-iters 0"
    path = write_config(tmp_path / "run", recurrence={"pattern": "*-[*-]x2*-"}, megatron=SHAPE)
    train(path, flags=flags)
    wanted = read_evaluations(tmp_path / "run" / "run")[-1]["losses"]["2"]
    start = {"load": str(tmp_path / "assembled"), "finetune": True, "num-experts": 2}
    if kind == "fp8":
        start["moe-router-padding-for-fp8"] = True
    path = write_config(tmp_path / "layers", recurrence={"pattern": "*-[*E]x2*-"}, megatron={**SHAPE, **start})
    loads = [str(tmp_path / "run" / "run")] * 2
    verb = ["assemble-moee", "--config", str(path), "--save", str(tmp_path / "assembled")]
    assert main([*verb, "--load", *loads]) == 0
    steps = train(path, 1, flags, ("evaluation.at_start=true",))
    assert all(step["loss"] == step["loss"] for step in steps)
    assert read_evaluations(tmp_path / "layers" / "run")[0]["losses"]["2"] == pytest.approx(wanted, rel=2e-3)
