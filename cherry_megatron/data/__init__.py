"""Text to indexed tokens, and the batches that Megatron trains on."""
