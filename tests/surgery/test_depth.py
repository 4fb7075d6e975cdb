"""The memory that a dry run announces is about what the jobs take."""

import tracemalloc

import pytest

from cherry_megatron.storage.checkpoint import open_checkpoint
from cherry_megatron.storage.layers import MLP, ROLES
from cherry_megatron.surgery.align import Alignment
from cherry_megatron.surgery.corrections import Correct, factors
from cherry_megatron.surgery.depth import peak_bytes
from cherry_megatron.surgery.jobs import Constant, Drawn, Merge, Unroll
from cherry_megatron.surgery.writing import Spec
from tests.surgery.conftest import save

ROWS, COLUMNS = 512, 384
KINDS = ["mean", "aligned", "drawn", "constant", "corrected", "aligned-corrected", "unrolled"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def source(request, tmp_path_factory):
    """Three MLPs large enough that arrays alone count."""
    import torch

    dtype = getattr(torch, request.param)
    shapes = ((COLUMNS,), (2 * ROWS, COLUMNS), (COLUMNS, ROWS))
    tensors = {
        f"decoder.layers.{k}.{role}": torch.randn(shape).to(dtype)
        for k in range(3)
        for role, shape in zip(ROLES[MLP], shapes, strict=True)
    }
    return open_checkpoint(save(tmp_path_factory.mktemp("large"), tensors))


@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_neither_short_nor_wild(kind, source):
    members = tuple({role: f"decoder.layers.{k}.{role}" for role in ROLES[MLP]} for k in range(3))
    stored = [source.tensors[members[0][role]] for role in ROLES[MLP]]
    writes = tuple(Spec(f"decoder.layers.0.{r}", t.dtype, t.shape) for r, t in zip(ROLES[MLP], stored, strict=True))
    aligned = Alignment(4, 4, True) if "aligned" in kind else None
    job = merge = Merge(MLP, members, (1.0,) * 3, writes, aligned)
    if kind == "drawn":
        job = Drawn(writes, 0.02, 0.02, 1)
    if kind == "constant":
        job = Constant((Spec("it", stored[0].dtype, (ROWS, COLUMNS)),), 1.0)
    if kind.endswith("corrected"):
        job = Correct(merge, members, factors("decoder.layers.0.", merge, 3, 8, True))
    if kind == "unrolled":
        job = Unroll(MLP, members[0], None, writes)
    list(job.make(source))  # imports take memory too
    tracemalloc.start()
    for _ in job.make(source):
        pass
    _, taken = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.95 * taken <= peak_bytes([job], 1) <= 5 * taken
