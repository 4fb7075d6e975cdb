"""Megatron-core as the published wheel has it."""

from pathlib import Path


def use_shipped_helpers() -> None:
    """Use the compiled dataset helpers of the wheel.

    At start Megatron runs `make` beside megatron/core/datasets/utils.py and exits if that fails. The
    wheel of 0.19.2 ships the compiled helpers but no Makefile, so from a wheel it always would.
    """
    from megatron.core.datasets import helpers_cpp, utils  # noqa: F401  (the import is the check)

    if not (Path(utils.__file__).parent / "Makefile").exists():
        utils.compile_helpers = lambda: None
