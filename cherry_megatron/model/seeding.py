"""Draws that depend on a seed and a name alone."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Draw initial weights from (seed, name) alone, so that every layout starts from the same ones."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPU's generator too.
        torch.default_generator.manual_seed(seed_of(seed, name))
        yield


def seed_of(seed: int, name: str) -> int:
    """The seed of one thing that is drawn: 63 bits of a hash of both."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
