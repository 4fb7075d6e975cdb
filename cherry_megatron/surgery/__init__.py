"""Checkpoint -> checkpoint, streaming, without a GPU, a model or torch."""
