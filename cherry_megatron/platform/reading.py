"""Have Megatron's trainer read by another loader than torch's.

Megatron-core 0.19.2 takes a loader from outside only together with an order of samples (dataloader-type external).
Here the order stays Megatron's, and with it what a resume reads next under any layout.
"""

from collections.abc import Callable
from typing import Any

from megatron.training import training
from megatron.training.datasets import data_samplers

_build = data_samplers.build_pretraining_data_loader


def read_by(make: Callable[[Any], Any] | None) -> None:
    """Choose what reads from now on; a later call replaces the earlier.

    Args:
        make: takes a DataLoader as Megatron builds it; what it returns is iterated in its place. None is the
            DataLoader itself.
    """

    def build(dataset: Any, consumed: int) -> Any:
        loader = _build(dataset, consumed)
        return loader if loader is None or make is None else make(loader)

    data_samplers.build_pretraining_data_loader = training.build_pretraining_data_loader = build
