"""CHERRY language models on Megatron-core: recurrent stacks, selective supervision, mixtures of compressed experts."""

__version__ = "0.1.0"
