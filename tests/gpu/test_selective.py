"""Selective supervision on a GPU: under FP8 and CUDA graphs, and probes that training does not notice.

Shapes of the depth experiment's model, which graphs are used for. With --deterministic-mode two runs of one program
are equal bit for bit, so that what must not be noticed can be asked for exactly.
"""

import json

import pytest

from tests.conftest import HAS_GPU
from tests.sgt.conftest import marked, selective  # noqa: F401
from tests.sgt.test_probe import PARTS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]

SHAPE = {
    "hidden-size": 256, "ffn-hidden-size": 640, "num-attention-heads": 4, "seq-length": 512, "lr": 5e-4,
    "max-position-embeddings": 512, "global-batch-size": 4, "micro-batch-size": 4, "train-iters": 12,
    "init-method-std": 0.045,
}  # fmt: skip
GRAPH = "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"
KINDS = {
    "bf16": "--bf16",
    "fp8": "--bf16 --fp8-format hybrid --fp8-recipe delayed",
    "bf16-graph": f"--bf16 {GRAPH}",
    "fp8-graph": f"--bf16 --fp8-format hybrid --fp8-recipe delayed {GRAPH}",
}
LOSSES = ("loss", "selected_loss", "unselected_loss", "weighted_loss", "grad_norm")
SCHEDULE = {"marks": "some", "alpha": 0.9, "alpha_start": 0.1, "alpha_steps": 8}


def worst(ours: list[dict], theirs: list[dict], key: str) -> float:
    """The largest relative difference of a step's value."""
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def run(tmp_path, selective, train):  # noqa: F811
    def steps(name: str, flags: str, **options) -> list[dict[str, float]]:
        path = selective(tmp_path / name, {"megatron": SHAPE}, **options)
        return train(path, flags=flags)

    return steps


@pytest.mark.parametrize("options", [SCHEDULE, {"top_loss": 0.15, "alpha": 0.7}], ids=["marks", "online"])
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_a_graph_sees_alpha_rho_and_marks(kind, options, run):
    """A graph that kept the first step's alpha, rho or selection would be off by some percent."""
    eager = run("eager", f"{KINDS[kind]} --deterministic-mode", **options)
    graph = run("graph", f"{KINDS[f'{kind}-graph']} --deterministic-mode", **options)
    shown = {key: worst(graph, eager, key) for key in LOSSES}
    print(f"{kind}, {options}: graph against eager {shown}")
    assert all(shown[key] <= 1e-3 for key in LOSSES if key != "grad_norm")
    assert shown["grad_norm"] <= 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_notice_a_probe(kind, run, tmp_path):
    flags = f"{KINDS[kind]} --deterministic-mode --hidden-dropout 0.1"
    options = {"marks": "some", "alpha": 0.7}
    plain = run("plain", flags, **options)
    probed = run("probed", flags, **options, probe_interval=5, probe_loops=True)
    lines = (tmp_path / "probed" / "run" / "probes.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [5, 10]
    for key in LOSSES:
        assert [step[key] for step in probed] == [step[key] for step in plain], key


def test_coupling_is_that_of_float32(run, tmp_path):
    """In TF32, BF16 and FP8, on the first step of one model."""
    found = {}
    for kind, flags in {
        "fp32": "",
        "bf16": KINDS["bf16"],
        "fp8": KINDS["fp8"],
        "graph": KINDS["bf16-graph"],
    }.items():
        run(kind, f"{flags} --train-iters 3", marks="some", alpha=0.7, probe_interval=1)
        lines = (tmp_path / kind / "run" / "probes.jsonl").read_text().splitlines()
        found[kind] = json.loads(lines[0])["coupling"]
    for kind, tolerance in {"bf16": 0.02, "fp8": 0.05, "graph": 0.02}.items():
        for part in PARTS:
            for name in ("cos", "ratio"):
                print(
                    f"{kind}, {name} of {part}: {found[kind][part][name]:.4f} for {found['fp32'][part][name]:.4f}"
                )
                assert found[kind][part][name] == pytest.approx(found["fp32"][part][name], abs=tolerance)


def test_a_head_left_out_changes_nothing(run):
    whole = run("whole", KINDS["bf16"], marks="some", alpha=1.0)
    partly = run("partly", KINDS["bf16"], marks="some", alpha=1.0, skip_head=True)
    assert worst(partly, whole, "selected_loss") <= 5e-3
    assert worst(partly, whole, "grad_norm") <= 5e-2
