"""`cherry calibrate` records what the layers compute, whatever the layout, and `cherry compress-depth` takes it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cherry_megatron.cli import main
from cherry_megatron.storage.lineage import read_lineage
from cherry_megatron.storage.tracker import newest
from cherry_megatron.surgery.activations import open_calibration
from tests.conftest import run_ranks
from tests.surgery.conftest import read
from tests.test_bad_input import check, verb

HIDDEN, HEADS, FFN, LENGTH, TOKENS = 32, 4, 64, 32, 200
DENSE = {"pattern": "(*-)x8", "loop_scales": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_config, train):
    folder = tmp_path_factory.mktemp("calibrate")
    path = write_config(folder, recurrence=DENSE)
    train(path, flags="--train-iters 8 --lr 0.01 --lr-decay-iters 20")
    return path, folder


def calibrate(path: Path, output: Path, world: int = 1, *flags: str, tokens: int = TOKENS) -> list[tuple[int, str]]:
    arguments = ["calibrate", "--config", str(path), "--output", str(output), "--tokens", str(tokens)]
    folder = output.with_name(f"{output.name}-output")
    return run_ranks(folder, world, verb, path.parent, [*arguments, "--", *flags])


@pytest.fixture(scope="module")
def recorded(run):
    path, folder = run
    assert calibrate(path, folder / "recorded") == [(0, "")]
    return folder / "recorded"


def test_it_is_what_the_first_layer_computes(run, recorded):
    """The first token of a sequence attends to itself alone, so that its head outputs are its values."""
    tensors = read(newest(run[1] / "run/checkpoints"))
    attention, mlp = "decoder.layers.0.self_attention", "decoder.layers.1.mlp"

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (HIDDEN,), tensors[f"{name}.layer_norm_weight"], 1e-5)

    embeddings = tensors["embedding.word_embeddings.weight"]
    qkv = normed(embeddings, f"{attention}.linear_qkv") @ tensors[f"{attention}.linear_qkv.weight"].T
    values = qkv.view(-1, HEADS, 3, HIDDEN // HEADS)[:, :, 2].flatten(1)
    outputs, neurons = (
        torch.from_numpy(np.load(recorded / f"layer-000-{name}.npy")).float() for name in ("0-attention", "1-mlp")
    )
    assert outputs.shape == (TOKENS, HIDDEN) and neurons.shape == (TOKENS, FFN)
    for start in range(0, TOKENS, LENGTH):
        token = int((values - outputs[start]).norm(dim=1).argmin())
        torch.testing.assert_close(outputs[start], values[token], rtol=2e-3, atol=1e-5)
        state = embeddings[token] + values[token] @ tensors[f"{attention}.linear_proj.weight"].T
        gate, up = (normed(state, f"{mlp}.linear_fc1") @ tensors[f"{mlp}.linear_fc1.weight"].T).chunk(2)
        torch.testing.assert_close(neurons[start], F.silu(gate) * up, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_pipeline_stages_write_the_same_files(world, run, recorded, tmp_path):
    """Of four ranks two are data-parallel copies."""
    calibrate(run[0], tmp_path / "staged", world, "--pipeline-model-parallel-size", "2")
    names = {path.name for path in recorded.iterdir()}
    assert {path.name for path in (tmp_path / "staged").iterdir()} == names and len(names) == 17
    for name in names:
        assert (tmp_path / "staged" / name).read_bytes() == (recorded / name).read_bytes(), name
    assert not (tmp_path / ".staged.partial").exists()


def test_compression_takes_it_and_its_lineage_names_it(run, recorded, tmp_path, write_config, capsys):
    small = write_config(tmp_path, recurrence={"pattern": "*-[*-*-]x3*-"})
    arguments = ["compress-depth", "--load", str(run[1] / "run"), "--config", str(small), "--workers", "1"]
    for name, options in {
        "aligned": ["--align", "activations", "--calibration", str(recorded)],
        "plain": [],
    }.items():
        assert main([*arguments, *options, "--save", str(tmp_path / name)]) == 0
    assert f"alignment activations of {TOKENS} tokens, {recorded}" in capsys.readouterr().out
    calibration = open_calibration(recorded)
    lineage = read_lineage(tmp_path / "aligned/iter_0000000")
    assert lineage is not None and lineage["options"]["calibration"] == calibration.record()
    assert calibration.source == lineage["parents"][0]["identity"]
    assert len(calibration.data) == 1 and calibration.tokens == TOKENS
    assert read_lineage(tmp_path / "plain/iter_0000000")["options"]["calibration"] is None
    role = "decoder.layers.1.mlp.linear_fc2.weight"
    ours, theirs = (read(tmp_path / name / "iter_0000000", [role])[role] for name in ("aligned", "plain"))
    assert not torch.equal(ours, theirs)


def test_a_calibration_of_another_checkpoint_is_refused(run, recorded, tmp_path, write_config, train, capsys):
    other = write_config(tmp_path / "other", recurrence=DENSE)
    train(other, flags="--train-iters 1 --lr-decay-iters 9")
    small = write_config(tmp_path, recurrence={"pattern": "*-[*-*-]x3*-"})
    arguments = ["compress-depth", "--load", str(tmp_path / "other/run"), "--config", str(small)]
    arguments += ["--align", "activations", "--calibration", str(recorded), "--save", str(tmp_path / "small")]
    assert main(arguments) == 2
    assert f"{recorded} was recorded from the checkpoint" in capsys.readouterr().err


def _recorded(folder: Path, values: list[float]) -> np.ndarray:
    from cherry_megatron.calibration import Inputs

    inputs = Inputs("layer-000-1-mlp.npy", tokens=3)
    for part in torch.tensor(values).view(-1, 1, 2, 2):  # [s, b, width], a token of each of two sequences
        inputs.add(torch.nn.Identity(), (part,))
    inputs.save(folder)
    return np.load(folder / "layer-000-1-mlp.npy")


def test_large_activations_are_clipped(tmp_path):
    (found,) = run_ranks(tmp_path / "out", 1, _recorded, tmp_path, [1e9, -2.0, 3.0, -1e6, 5.0, 6.0, 7.0, 8.0])
    assert found.dtype == np.float16 and found.tolist() == [[65504, -2], [3, -65504], [5, 6]]


def test_activations_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(AssertionError, match=r"layer-000-1-mlp\.npy: infinite or NaN activations"):
        run_ranks(tmp_path, 1, _recorded, tmp_path, [1.0, float("nan"), 1.0, 1.0])


def test_more_tokens_than_the_training_has_are_refused(run, tmp_path):
    ((status, errors),) = calibrate(run[0], tmp_path / "many", tokens=20 * 8 * LENGTH + 1)
    assert status == 2 and "--tokens 5121 is more than the 5120 of the training; use fewer" in errors
    assert not (tmp_path / "many").exists() and not (tmp_path / ".many.partial").exists()


@pytest.mark.parametrize(
    ("sections", "extra", "says"),
    [
        ({}, ["--tokens", "0"], "--tokens 0 must be a positive number"),
        ({"recurrence": {"pattern": "*-[*-*-]x3*-"}}, [], "recurrence.pattern has loops; calibrate the model that"),
        ({}, ["--", "--tensor-model-parallel-size", "2"], "tensor-model-parallel-size 2 divides heads"),
        ({}, [], "has no checkpoint to calibrate"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(sections, extra, says, tmp_path, write_config):
    path = write_config(tmp_path, **{"recurrence": DENSE, **sections})
    check(tmp_path, ["calibrate", "--config", str(path), "--output", str(tmp_path / "new"), *extra], says)


def test_an_existing_folder_is_refused(run, recorded):
    ((status, errors),) = calibrate(run[0], recorded)
    assert status == 2 and f"{recorded} exists and is not empty; choose another folder or remove it" in errors
