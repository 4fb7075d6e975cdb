"""What the host waits for around an update."""

from types import SimpleNamespace

import torch

from cherry_megatron.platform import waiting
from cherry_megatron.platform.waiting import Reading, means, scale_from_gpu, scale_without_gpu
from tests.conftest import _train, run_ranks

COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "barrier")


def collectives_between_passes(path) -> tuple[str, list[str]]:
    """From a decision on an update to the next step's passes, where no line is printed."""
    from megatron.training import get_args

    from cherry_megatron.around_step import AroundStep

    called: list[str] = []
    for name in COLLECTIVES:
        known = getattr(torch.distributed, name)
        setattr(torch.distributed, name, lambda *a, _n=name, _k=known, **k: (called.append(_n), _k(*a, **k))[1])
    begins, decides, marks = AroundStep.begin, AroundStep.allows, []

    def begin(self, model):
        marks.append(len(called))
        begins(self, model)

    def allows(self, losses, norm):
        marks.append(len(called))
        return decides(self, losses, norm)

    AroundStep.begin, AroundStep.allows = begin, allows
    _train(path, [], ["--train-iters", "5", "--log-interval", "5"])
    return get_args().rerun_mode, called[marks[5] : marks[6]]


def test_a_rank_alone_asks_nobody_whether_to_go_on(tmp_path, write_config):
    ((rerun, called),) = run_ranks(tmp_path / "output", 1, collectives_between_passes, write_config(tmp_path))
    assert rerun == "disabled" and called == []


def test_what_is_read_are_the_numbers(tmp_path):
    read = Reading({"loss": torch.tensor([0.1]), "norm": 0.2})
    assert float(read.values["loss"]) == float(torch.tensor(0.1)) and read.values["norm"] == 0.2
    assert means([]) == {}


def test_the_loss_scale_is_on_the_device_while_a_step_goes_on():
    class Optimizer(SimpleNamespace):
        def get_loss_scale(self):
            return torch.tensor([8.0])

    without, with_one = (Optimizer(chained_optimizers=[SimpleNamespace(grad_scaler=g)]) for g in (None, object()))
    for optimizer, between in ((without, 1.0), (with_one, 8.0)):
        scale_without_gpu(optimizer)
        assert optimizer.get_loss_scale().item() == between
        scale_from_gpu(optimizer)
        assert optimizer.get_loss_scale().item() == 8.0


def test_the_log_adds_up_losses_on_the_host(monkeypatch):
    def log(losses, sums, step):
        for name in (*losses, "auxiliary loss"):
            sums[name] = waiting.training.torch.tensor([0.0], dtype=torch.float, device="meta")
        return step

    monkeypatch.setattr(waiting, "_log", log)
    monkeypatch.setattr(waiting.training, "training_log", log)
    waiting.log_without_gpu()
    sums = {"skipped iterations": 0}
    assert waiting.training.training_log({"lm loss": torch.tensor(1.0)}, sums, 3) == 3
    assert {name: getattr(one, "device", None) for name, one in sums.items()} == {
        "skipped iterations": None,
        "lm loss": torch.device("cpu"),
        "auxiliary loss": torch.device("meta"),  # what Megatron adds to it lies there
    }
    assert waiting.training.torch is torch
