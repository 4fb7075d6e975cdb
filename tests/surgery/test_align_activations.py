"""Heads and neurons are matched by what they put out on text, not by weights that text never uses."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cherry_megatron.cli import main
from cherry_megatron.errors import CherryError
from cherry_megatron.model.pattern import ATTENTION, MLP
from cherry_megatron.storage.checkpoint import hash_values
from cherry_megatron.storage.layers import FC1, FC2, PROJ, QKV
from cherry_megatron.surgery import compress
from cherry_megatron.surgery.activations import calibration_text, file_name
from cherry_megatron.surgery.align import (
    ACTIVATIONS,
    Order,
    match_heads_by_activations,
    match_neurons,
    match_neurons_by_activations,
)
from tests.surgery.conftest import FFN, HEADS, HIDDEN, SIZE, model_tensors, read, save
from tests.surgery.test_align import HOW, attention, draw_layer, mlp, shuffled

TOKENS, COPIES, USED = 64, 3, 8
PARTS = {ATTENTION: (attention, f"{PROJ}.weight"), MLP: (mlp, f"{FC2}.weight")}


def text(used: int = HIDDEN) -> torch.Tensor:
    """States of which only the first `used` channels are ever other than zero."""
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    x[:, used:] = 0
    return x


def activations(layer: dict[str, Any], symbol: str, x: torch.Tensor) -> np.ndarray:
    """What the last linear of a sublayer takes: what the sublayer gives if that is the identity."""
    part, last = PARTS[symbol]
    return part({**layer, last: torch.eye(layer[last].shape[1])}, x).numpy()


def save_model(folder: Path, layers: list[dict[str, Any]]) -> Path:
    tensors = {name: t for name, t in model_tensors(0).items() if "layers" not in name}
    for number, layer in enumerate(layers):
        for role, tensor in layer.items():
            tensors[f"decoder.layers.{2 * number + role.startswith('mlp')}.{role}"] = tensor
    return save(folder, tensors)


def save_calibration(folder: Path, layers: list[dict[str, Any]], x: torch.Tensor) -> Path:
    folder.mkdir()
    files = {}
    for number, layer in enumerate(layers):
        for place, symbol in enumerate(PARTS):
            name = file_name(number, place, symbol)
            np.save(folder / name, activations(layer, symbol, x).astype(np.float16))
            files[name] = hash_values(np.load(folder / name))
    described = calibration_text(Path("deep"), None, len(layers), TOKENS, ["text"], files)
    (folder / "calibration.json").write_text(described)
    return folder


def recorded(layer: dict[str, Any], symbol: str, x: torch.Tensor) -> dict[str, np.ndarray]:
    """What a matching gets of a layer."""
    weights = {role: tensor.numpy() for role, tensor in layer.items()}
    return {**weights, ACTIVATIONS: activations(layer, symbol, x)}


def layer_of(tensors: dict[str, Any], number: int) -> dict[str, Any]:
    """A layer of a checkpoint, by role."""
    prefixes = (f"decoder.layers.{2 * number}.", f"decoder.layers.{2 * number + 1}.")
    return {name.split(".", 3)[3]: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


@pytest.fixture
def errors(tmp_path, config):
    """Relative errors of the parts of layers that are averaged from copies, under each alignment."""

    def measure(
        layers: list[dict[str, Any]], copies: list[dict[str, Any]], x: torch.Tensor
    ) -> dict[str, list[float]]:
        path = config(recurrence={"pattern": f"(*-)x{len(layers)}"})
        save_model(tmp_path / "deep", copies)
        calibration = save_calibration(tmp_path / "calibration", copies, x)
        found: dict[str, list[float]] = {}
        for align in ("none", "weights", "activations"):
            options = compress.Options(align=align, calibration=calibration if align == "activations" else None)
            folder = compress.plan_compression(tmp_path / "deep", path, (), options).run(tmp_path / align, 2)
            made = read(folder)
            found[align] = []
            for number, layer in enumerate(layers):
                for part, _ in PARTS.values():
                    ours, wanted = part(layer_of(made, number), x), part(layer, x)
                    found[align].append(float((ours - wanted).norm() / wanted.norm()))
        return found

    return measure


def test_shuffled_copies_average_back_to_the_function(errors):
    layers = [draw_layer(0), draw_layer(1)]
    copies = [shuffled(layer, 10 * k + seed) for k, layer in enumerate(layers) for seed in range(COPIES)]
    found = errors(layers, copies, text())
    assert max(found["activations"]) < 1e-6
    assert min(found["none"]) > 0.3


def test_weights_that_the_text_never_uses_mislead_weights_alone(errors):
    layer = draw_layer(0)
    copies = [shuffled(layer, seed) for seed in range(COPIES)]
    generator = torch.Generator().manual_seed(2)
    for copy in copies:
        for role in (f"{QKV}.weight", f"{FC1}.weight"):
            copy[role] = copy[role].clone()
            copy[role][:, USED:] = 10 * torch.randn(copy[role][:, USED:].shape, generator=generator)
    found = errors([layer], copies, text(USED))
    assert max(found["activations"]) < 1e-6
    assert min(found["weights"]) > 0.3


def test_neurons_of_another_scale_are_matched():
    layer, x = draw_layer(0), text()

    def scaled(by: torch.Tensor) -> dict[str, Any]:
        """The same function: the up weights of each neuron times a number, its down weights over it."""
        fc1 = layer[f"{FC1}.weight"] * torch.cat((torch.ones(FFN), by))[:, None]
        return {**layer, f"{FC1}.weight": fc1, f"{FC2}.weight": layer[f"{FC2}.weight"] / by}

    scales = 10 ** torch.linspace(-1, 1, FFN)
    ours, theirs = scaled(scales), shuffled(scaled(1 / scales), 1)
    torch.testing.assert_close(mlp(theirs, x), mlp(ours, x), rtol=1e-4, atol=1e-4)

    def misplaced(match: Callable[..., Order]) -> int:
        order = match(recorded(ours, MLP, x), recorded(theirs, MLP, x), HOW)
        gates = order.apply(f"{FC1}.weight", theirs[f"{FC1}.weight"])[:FFN]
        return int((gates != layer[f"{FC1}.weight"][:FFN]).any(dim=1).sum())

    assert misplaced(match_neurons_by_activations) == 0
    assert misplaced(match_neurons) > FFN / 4


def test_neurons_that_never_fire_do_not_disturb_the_others():
    layer, x = draw_layer(0), text()
    layer[f"{FC1}.weight"][FFN : FFN + 3] = 0
    other = shuffled(layer, 1)
    order = match_neurons_by_activations(recorded(layer, MLP, x), recorded(other, MLP, x), HOW)
    found, gates = order.apply(f"{FC1}.weight", other[f"{FC1}.weight"])[:FFN], layer[f"{FC1}.weight"][:FFN]
    assert torch.equal(found[3:], gates[3:])
    assert torch.equal(found.sort(dim=0)[0], gates.sort(dim=0)[0])


def test_heads_that_add_much_in_one_layer_and_little_in_the_other_are_matched():
    layer, x = draw_layer(0), text()
    sizes = (10 ** torch.linspace(-2, 2, HEADS)).repeat_interleave(SIZE)
    ours, theirs = ({**layer, f"{PROJ}.weight": layer[f"{PROJ}.weight"] * by} for by in (sizes, 1 / sizes))
    other = shuffled(theirs, 1)
    order = match_heads_by_activations(recorded(ours, ATTENTION, x), recorded(other, ATTENTION, x), HOW)
    for role in (f"{QKV}.weight", f"{PROJ}.weight"):
        assert torch.equal(order.apply(role, other[role]), theirs[role])


def _describe(**changes: Any) -> Callable[[Path], None]:
    """Change calibration.json."""

    def spoil(folder: Path) -> None:
        path = folder / "calibration.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def _values(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Change a file's values."""
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


HEADS_OF_1, NEURONS_OF_2 = file_name(1, 0, ATTENTION), file_name(2, 1, MLP)
# name: (what happens to the calibration, what the line says)
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "layers": (_describe(layers=2), "is of a model of 2 layers, but"),
    "source": (_describe(identity="0123456789abcdef"), "was recorded from the checkpoint 0123456789ab"),
    "format": (_describe(format=2), "has the format 2, not 1"),
    "width": (_values(HEADS_OF_1, lambda a: a[:, 1:]), f"{HEADS_OF_1} has 23 features, but decoder.layers.2"),
    "tokens": (_values(HEADS_OF_1, lambda a: a[1:]), "does not belong to the calibration.json beside it"),
    "changed": (_values(NEURONS_OF_2, lambda a: a + 1), f"{NEURONS_OF_2} is not what was recorded (SHA-256)"),
    "truncated": (lambda folder: os.truncate(folder / NEURONS_OF_2, 500), f"{NEURONS_OF_2} is missing or damaged"),
    "missing": (lambda folder: (folder / HEADS_OF_1).unlink(), f"{HEADS_OF_1} is missing or damaged"),
    "damaged": (lambda folder: (folder / "calibration.json").write_text("{"), "calibration.json is damaged"),
    "none": (lambda folder: (folder / "calibration.json").unlink(), "name a folder made by `cherry calibrate`"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_calibration_that_does_not_fit_is_refused(name, tmp_path, config, capsys):
    spoil, says = BAD[name]
    layers = [draw_layer(seed) for seed in range(3)]
    save_model(tmp_path / "deep", layers)
    spoil(save_calibration(tmp_path / "calibration", layers, text()))
    arguments = ["compress-depth", "--load", str(tmp_path / "deep"), "--save", str(tmp_path / "small")]
    arguments += ["--config", str(config(recurrence={"pattern": "*-"})), "--workers", "1", "--align", "activations"]
    assert main([*arguments, "--calibration", str(tmp_path / "calibration")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cherry ")]
    assert says in line
    assert not (tmp_path / "small").exists()


def test_the_options_go_together():
    with pytest.raises(CherryError, match="--align activations needs --calibration"):
        compress.Options(align="activations")
    with pytest.raises(CherryError, match="--calibration there is for --align activations alone"):
        compress.Options(align="weights", calibration=Path("there"))
