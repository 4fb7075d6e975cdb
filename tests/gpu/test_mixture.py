"""A mixture on one GPU: trained runs are assembled, trained on, and taken apart, under Transformer Engine."""

from pathlib import Path

import pytest

from tests.conftest import HAS_GPU
from tests.gpu.test_selective import GRAPH, worst
from tests.moee.conftest import write_mixture  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]

KINDS = {
    "bf16": "--bf16",
    "fp8": "--bf16 --fp8-format hybrid --fp8-recipe tensorwise",
    "overlap": "--bf16 --overlap-grad-reduce --overlap-param-gather",
}
SHAPE = {
    "hidden-size": 128, "ffn-hidden-size": 256, "seq-length": 128, "max-position-embeddings": 128,
    "global-batch-size": 4, "micro-batch-size": 2,
}  # fmt: skip
PATTERN = {"pattern": "*-[*-]x2"}


@pytest.mark.parametrize("kind", KINDS)
def test_assembled_trained_and_taken_apart(kind, tmp_path: Path, write_config, write_mixture, train):  # noqa: F811
    """Names of extra states fit, experts have the losses of their runs, and what is taken out is a single model."""
    from cherry_megatron.cli import main
    from cherry_megatron.runs import read_evaluations

    losses = []
    for run in range(2):
        path = write_config(tmp_path / f"run{run}", recurrence=PATTERN, data={"prefix": 8}, megatron=SHAPE)
        train(path, flags=f"{KINDS[kind]} --train-iters 2 --lr-warmup-iters 0 --seed {run + 1}")
        losses.append(read_evaluations(path.parent / "run")[-1]["losses"]["2"])
    start = {**SHAPE, "load": str(tmp_path / "assembled"), "finetune": True}
    path = write_mixture(tmp_path / "mixture", {"megatron": start}, experts=2)
    loads = [str(tmp_path / f"run{run}" / "run") for run in range(2)]
    verb = ["assemble-moee", "--config", str(path), "--load"]
    assert main([*verb, *loads, "--save", str(tmp_path / "assembled")]) == 0
    steps = train(path, 1, f"{KINDS[kind]} --train-iters 2 --lr-warmup-iters 0", ("evaluation.at_start=true",))
    assert all(step["loss"] == step["loss"] for step in steps)
    report = read_evaluations(path.parent / "run")[0]["moee"]["2"]
    for expert, loss in enumerate(losses):
        assert report[f"loss/{expert}"] == pytest.approx(loss, rel=1e-3)
    assert main([*verb, str(path.parent / "run"), "--extract", "1", "--save", str(tmp_path / "taken")]) == 0
    load = {**SHAPE, "load": str(tmp_path / "taken"), "finetune": True}
    path = write_config(tmp_path / "again", recurrence=PATTERN, data={"prefix": 8}, megatron=load)
    (step,) = train(path, flags=f"{KINDS[kind]} --train-iters 1 --lr-warmup-iters 0")
    assert step["loss"] == step["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_mixture_that_routes(kind, tmp_path: Path, write_mixture, train):  # noqa: F811
    """Under low precision a step is that of float32 but for rounding."""
    options = {"experts": 4, "top_k": 2, "balance": 0.5}
    found = {
        name: train(
            write_mixture(tmp_path / name, {"megatron": SHAPE}, **options),
            flags=f"{flags} --train-iters 1 --lr-warmup-iters 0",
        )[0]["loss"]
        for name, flags in (("float32", ""), ("low", KINDS[kind]))
    }
    assert found["low"] == pytest.approx(found["float32"], rel=1e-2)


@pytest.mark.parametrize("depths", [0, 1], ids=["next-token", "ahead"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_is_the_steps_without(kind, depths, tmp_path: Path, write_mixture, train):  # noqa: F811
    """Losses, gradient norms and what is reported of the experts, over twelve steps, nine of them replayed."""
    sections = {"mtp": {"depths": depths}, "megatron": {**SHAPE, "train-iters": 12}}
    eager, graph = (
        train(write_mixture(tmp_path / name, sections, experts=2), flags=f"{KINDS[kind]} {flags}")
        for name, flags in (("eager", ""), ("graph", GRAPH))
    )
    found = {key: worst(graph, eager, key) for key in ("loss", "grad_norm")}
    for key in eager[0]["moee"]:
        theirs = [step["moee"][key] for step in eager]
        ours = [step["moee"][key] for step in graph]
        found[key] = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(ours, theirs, strict=True))
    print(f"{kind}, {depths} depths: graph against eager {found}")
    assert found.pop("grad_norm") <= 1e-2
    assert all(difference <= 2e-3 for difference in found.values())
    assert len({step["loss"] for step in graph}) == len(graph)  # a replay of the same batch would repeat itself
