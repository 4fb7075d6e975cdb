"""A GPU's training walked on a CPU (stand_ins.py): specs, flags and checkpoints of Transformer Engine's layers."""

import importlib
from contextlib import redirect_stdout
from io import StringIO

import pytest

from tests.conftest import HAS_GPU, PROMPTS, _train, run_ranks


def _imports() -> bool:
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception:  # not installed, or CUDA's libraries are not found
        return False
    return True


pytestmark = pytest.mark.skipif(HAS_GPU or not _imports(), reason="needs Transformer Engine, and no GPU")

KINDS = {
    "recurrent": {"recurrence": {"loop_scales": False}},
    "loop vectors": {"recurrence": {"loop_rank": 2}},
    "multi-token": {"mtp": {"depths": 2}},
    "mixture": {"moee": {"experts": 2, "prefix": 8, "router_hidden": 8}, "mtp": {"depths": 1}},
}


def walk(path, pretends):
    """A training; which kernels it called."""
    from tests.gpu.stand_ins import pretend, replace_updates

    calls = pretend() if pretends else {}
    replace_updates()
    _train(path, [], [])
    return set(calls)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_is_that_of_the_local_layers(kind, tmp_path, write_config):
    """In float32, losses and gradient norms of every step."""
    from cherry_megatron.runs import read_steps

    steps = []
    for name, kernels in (("local", set()), ("rehearsed", {"cross-entropy", "SwiGLU"})):
        path = write_config(tmp_path / name, **KINDS[kind])
        assert run_ranks(tmp_path / name, 1, walk, path, name == "rehearsed") == [kernels]
        steps.append([(step["loss"], step["grad_norm"]) for step in read_steps(tmp_path / name / "run")])
    assert steps[1] == [pytest.approx(step, rel=1e-5) for step in steps[0]]


def speak(path, pretends):
    """A text over a cache, which rotates by itself, its depths' too."""
    from cherry_megatron.cli import main
    from tests.gpu.stand_ins import pretend, replace_updates

    if pretends:
        pretend()
    replace_updates()
    said = StringIO()
    with redirect_stdout(said):
        drafted = ["--tokens", "8", "--draft-mtp", "--draft-tokens", "2"]
        assert main(["generate", "--config", str(path), "--prompt", PROMPTS[0], *drafted]) == 0
    return said.getvalue().rpartition("\n\n")[0]  # without the speed


def test_a_draft_is_that_of_the_local_layers(tmp_path, write_config):
    path = write_config(tmp_path, **KINDS["multi-token"])
    run_ranks(tmp_path / "trained", 1, walk, path, False)
    (local,), (rehearsed,) = (run_ranks(tmp_path / str(p), 1, speak, path, p) for p in (False, True))
    assert PROMPTS[0] in local
    assert rehearsed == local
