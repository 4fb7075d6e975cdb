"""Initial weights that depend on a seed and a name alone."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Draw initial weights from (seed, name) alone, so that every layout starts from the same ones."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPU's generator too.
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
