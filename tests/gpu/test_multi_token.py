"""Multi-token prediction on a GPU: a recorded graph makes the steps that are made without."""

import pytest

from tests.conftest import HAS_GPU
from tests.gpu.test_selective import GRAPH, KINDS, SHAPE, worst

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_a_graph_is_the_steps_without(kind, tmp_path, write_config, train):
    flags = f"{KINDS[kind]} --deterministic-mode"
    eager, graph = (
        train(write_config(tmp_path / name, mtp={"depths": 2}, megatron=SHAPE), flags=f"{flags} {more}")
        for name, more in (("eager", ""), ("graph", GRAPH))
    )
    found = {key: worst(graph, eager, key) for key in ("loss", "grad_norm")}
    for key in eager[0]["mtp"]:
        found[key] = max(abs(a["mtp"][key] - b["mtp"][key]) for a, b in zip(graph, eager, strict=True))
    print(f"{kind}: graph against eager {found}")
    assert found.pop("grad_norm") <= 1e-2
    assert all(difference <= 1e-3 for difference in found.values())
