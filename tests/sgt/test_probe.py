"""The probe: the coupling of independently computed gradients, the same on all ranks, and nothing else changes."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.sgt.conftest import ONE_STEP, first_gradient

PROBED = {"marks": "some", "alpha": 0.7, "probe_interval": 1}


def couplings(run: Path) -> list[dict[str, dict[str, float]]]:
    return [json.loads(line)["coupling"] for line in (run / "probes.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def probed(tmp_path_factory, selective, train) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("probed")
    train(selective(folder, **PROBED, probe_loops=True), 1, ONE_STEP)
    return couplings(folder / "run")[0]


def test_coupling_is_that_of_the_gradients(probed, tmp_path, selective, train):
    """From the gradients of two trainings: on all tokens, and on the selected ones."""
    gradients, recorded = {}, {}
    for alpha in (0.0, 1.0):
        recorded[alpha] = train(selective(tmp_path / str(alpha), marks="some", alpha=alpha), 1, ONE_STEP)[0]
        gradients[alpha] = first_gradient(tmp_path / str(alpha) / "run")
    steps = recorded[0.0]
    tokens = 8 * 32
    number = round(tokens * (steps["loss"] - steps["unselected_loss"]) / (steps["selected_loss"] - steps["unselected_loss"]))
    some = {"decoder.final_norm.weight": 0}.keys()
    assert some <= gradients[0.0].keys()
    # alpha 1 has sum / (rho tokens): its rho follows from the loss that was recorded of it.
    rho = number / tokens * _scale(tmp_path, selective, train, gradients)
    selected = {name: rho * tokens * value / number for name, value in gradients[1.0].items()}
    others = {
        name: (tokens * gradients[0.0][name] - number * selected[name]) / (tokens - number) for name in selected
    }
    for part, chosen in PARTS.items():
        names = [name for name in selected if chosen(name)]
        dot = sum(float((selected[name] * others[name]).sum()) for name in names)
        ours = sum(float((selected[name] ** 2).sum()) for name in names)
        theirs = sum(float((others[name] ** 2).sum()) for name in names)
        assert probed[part]["cos"] == pytest.approx(dot / np.sqrt(ours * theirs), rel=1e-5, abs=1e-6), part
        assert probed[part]["ratio"] == pytest.approx(dot / ours, rel=1e-5, abs=1e-6), part


PARTS = {
    "all": lambda name: True,
    "embedding": lambda name: "embedding" in name,
    "attention": lambda name: "self_attention" in name or "input_layernorm" in name,
    "ffn": lambda name: "mlp" in name,
    "head": lambda name: "output_layer" in name or "final_norm" in name,
}
