"""What `cherry doctor` prints, and whether a configuration can run on this machine."""

import importlib.metadata
import platform
from typing import TYPE_CHECKING

import torch

from cherry_megatron.platform.machine import Machine

if TYPE_CHECKING:
    from cherry_megatron.config import Config

_PACKAGES = ("cherry-megatron", "torch", "megatron-core", "transformers", "tokenizers", "tensorboard")


def report(machine: Machine, config: "Config | None" = None) -> int:
    """Print what is here and what will be used.

    Returns:
        0, or 1 if the configuration cannot run here; every reason is printed.
    """
    print(f"{'python':<22}{platform.python_version()}")
    for name in _PACKAGES:
        print(f"{name:<22}{importlib.metadata.version(name)}")
    print(f"{'CUDA':<22}{torch.version.cuda or 'none'}")
    print(f"{'devices':<22}{', '.join(machine.devices) or 'CPU (gloo, the CPU platform)'}")
    for library in machine.libraries:
        state = "used" if library.usable else "not used"
        details = ", ".join(part for part in (library.version, library.note) if part)
        print(f"{library.name:<22}{state}{f': {details}' if details else ''}")
    print("Megatron flags that follow from this machine:")
    for flag, value in machine.flags.items():
        print(f"  --{flag}" + ("" if value is True else f" {value}"))
    if config is None:
        return 0
    problems = obstacles(machine, config)
    for problem in problems:
        print(f"{config.source}: {problem}")
    if not problems:
        print(f"{config.source}: can run here")
    return 1 if problems else 0


def obstacles(machine: Machine, config: "Config") -> list[str]:
    """Why a configuration cannot run here; empty if it can."""
    found = []
    implementation = config.value("transformer-impl")
    asked = "transformer-impl" in config.megatron and implementation == "transformer_engine"
    if asked and not machine.usable("transformer-engine"):
        found.append("megatron.transformer-impl transformer_engine: Transformer Engine is not usable here")
    if config.value("fp8-format") and not machine.usable("transformer-engine"):
        found.append("megatron.fp8-format: FP8 needs Transformer Engine and a GPU")
    if config.value("fp16") and not machine.devices:
        found.append("megatron.fp16: FP16 needs a GPU")
    ranks = config.value("tensor-model-parallel-size") * config.value("pipeline-model-parallel-size")
    if machine.devices and ranks > len(machine.devices):
        found.append(
            f"one model takes {ranks} GPUs; this machine has {len(machine.devices)} (a cluster may have more)"
        )
    for path in config.megatron.get("data-path") or []:
        if not str(path).replace(".", "").isdigit() and not _exists(f"{path}.idx"):
            found.append(f"megatron.data-path {path}: {path}.idx does not exist; make it with `cherry data`")
    tokenizer = config.megatron.get("tokenizer-model")
    if tokenizer and not _exists(str(tokenizer)):
        found.append(f"megatron.tokenizer-model {tokenizer} does not exist; make it with `cherry tokenizer`")
    return found


def _exists(path: str) -> bool:
    from pathlib import Path

    return Path(path).exists()
