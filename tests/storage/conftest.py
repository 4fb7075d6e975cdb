"""The checkpoints and configurations of the surgery's tests."""

from tests.surgery.conftest import config

__all__ = ["config"]
