"""Benchmarks are scripts: imported from their files."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_script(monkeypatch: pytest.MonkeyPatch):
    """Import a script by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in [path.stem for path in FOLDER.glob("*.py")]:
        sys.modules.pop(name, None)
