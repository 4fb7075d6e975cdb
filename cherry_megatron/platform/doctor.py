"""What `cherry doctor` prints of this machine."""

import math
import os
import platform

import torch

from cherry_megatron.config import Config
from cherry_megatron.platform.machine import Library, Machine, dali
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
        _print_library(library, "used" if library.usable else "not used")
    _print_library(dali(), "used where data.loader is dali" if dali().usable else "not usable")
    print("Megatron flags that follow from this machine:")
    for flag, value in machine.flags.items():
        print(f"  --{flag}" + ("" if value is True else f" {value}"))


def _print_library(library: Library, state: str) -> None:
    details = ", ".join(part for part in (library.version, library.note) if part)
    print(f"{library.name:<22}{state}{f': {details}' if details else ''}")


def reads_by(config: Config) -> str:
    """What reads the batches of a configuration that can run here."""
    if config.data.loader == "dali":
        return f"batches are read by DALI {dali().version}"
    unused = ", which data.loader dali would change" if dali().usable else ""
    return f"batches are read by torch's DataLoader{unused}"


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
