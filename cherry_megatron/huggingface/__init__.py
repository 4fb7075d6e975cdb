"""Modelling code that `cherry convert-hf` ships with weights: plain PyTorch, nothing of this project."""
