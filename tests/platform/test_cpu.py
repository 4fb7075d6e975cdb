"""The CPU platform: Megatron's 'cuda' means the CPU, and the platform keeps its hands off GPUs."""

from pathlib import Path

import pytest

from tests.conftest import HAS_GPU, run_ranks

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the CPU platform does not run beside a GPU")


def redirected():
    from cherry_megatron.platform import cpu

    cpu.activate()
    cpu.activate()
    import torch

    x = torch.zeros(3, device="cuda")
    moved = torch.ones(2).cuda().to("cuda:0").to(device=torch.device("cuda"))
    like = x.new_ones(2, device=torch.cuda.current_device())
    assert {t.device.type for t in (x, moved, like)} == {"cpu"}
    assert x.type() == "torch.cuda.FloatTensor"
    assert x.type(torch.int64).dtype == torch.int64
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    return torch.equal(first, torch.rand(4))


def test_cuda_means_cpu(tmp_path: Path):
    assert run_ranks(tmp_path, 1, redirected) == [True]


def refuses():
    import torch

    from cherry_megatron.platform import cpu

    torch.cuda.is_available = lambda: True
    before = torch.zeros
    with pytest.raises(RuntimeError, match="GPU is in use"):
        cpu.activate()
    return torch.zeros is before and not cpu.is_active()


def test_it_refuses_where_a_gpu_is_in_use(tmp_path: Path):
    assert run_ranks(tmp_path, 1, refuses) == [True]


def adam_against_torch(decoupled):
    import torch

    from cherry_megatron.platform.adam import ContractAdam

    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(4))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    mine = ContractAdam(ours, adam_w_mode=decoupled, **options)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, foreach=False, **options)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    assert mine.param_groups[0]["step"] == 5
    assert set(mine.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam"])
def test_adam_is_torchs_adam(decoupled, tmp_path: Path):
    assert run_ranks(tmp_path, 1, adam_against_torch, decoupled) == [True]


def test_nothing_else_patches(tmp_path: Path):
    """Only platform/ assigns to attributes of torch or megatron modules."""
    import re

    import cherry_megatron

    root = Path(cherry_megatron.__file__).parent
    assignment = re.compile(r"^\s*(torch|megatron|cuda)(\.\w+)+ = ", re.M)
    guilty = [
        str(path)
        for path in root.rglob("*.py")
        if "platform" not in path.parts and assignment.search(path.read_text())
    ]
    assert guilty == []
