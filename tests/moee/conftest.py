"""A configuration for a small mixture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def write_mixture(write_config: Callable[..., Path]) -> Callable[..., Path]:
    """Write a configuration; keyword arguments are keys of `moee`, `sections` are merged over the others."""
    import yaml

    def write(folder: Path, sections: dict[str, Any] | None = None, **options: Any) -> Path:
        given = sections or {}
        path = write_config(
            folder, **{**given, "recurrence": {"pattern": "*-[*-]x2", **given.get("recurrence", {})}}
        )
        content = yaml.safe_load(path.read_text())
        content["moee"] = {"experts": 2, "prefix": 8, "router_hidden": 8, **options}
        path.write_text(yaml.safe_dump(content))
        return path

    return write
