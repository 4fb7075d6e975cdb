"""What `cherry doctor` prints of this machine."""

import math
import os
import platform

import torch

from cherry_megatron.config import Config
from cherry_megatron.platform.machine import Machine
from cherry_megatron.versions import installed_version

_PACKAGES = ("cherry-megatron", "torch", "megatron-core", "transformers", "tokenizers", "tensorboard")


def report(machine: Machine) -> None:
    """Print what is here and what will be used."""
    print(f"{'python':<22}{platform.python_version()}")
    for name in _PACKAGES:
        print(f"{name:<22}{installed_version(name) or 'not installed as a package'}")
    print(f"{'CUDA':<22}{torch.version.cuda or 'none'}")
    print(f"{'devices':<22}{', '.join(machine.devices) or 'CPU (gloo, the CPU platform)'}")
    for library in machine.libraries:
        state = "used" if library.usable else "not used"
        details = ", ".join(part for part in (library.version, library.note) if part)
        print(f"{library.name:<22}{state}{f': {details}' if details else ''}")
    print("Megatron flags that follow from this machine:")
    for flag, value in machine.flags.items():
        print(f"  --{flag}" + ("" if value is True else f" {value}"))


def how_to_start(config: Config) -> list[str]:
    """What a single process, such as this one, lacks to train a model that is split over several."""
    parallel = ("tensor-model-parallel-size", "pipeline-model-parallel-size", "expert-model-parallel-size")
    ranks = math.prod(config.value(flag) for flag in parallel)
    if ranks == 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return []
    return [
        f"start it with a multiple of {ranks} processes ({' x '.join(parallel)}), e.g. "
        f"torchrun --nproc-per-node {ranks} -m cherry_megatron.cli pretrain --config {config.source}"
    ]
