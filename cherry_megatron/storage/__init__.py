"""Checkpoints on disk: reading them without torch, their hashes and their lineage."""
