"""Declarative experiments: stages and seeds of one file, run as tasks, recorded and reported."""
