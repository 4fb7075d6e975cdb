"""Marks beside the tokens of the small data set, and the gradient that a training's first step has seen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import run_ranks


def mark(prefix: Path, name: str, choose: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """Write marks; `choose` is given the document and the position of every token of the data set."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from cherry_megatron.data.marks import Marks, fingerprint, write_marks

    tokens = IndexedDataset(str(prefix))
    lengths = tokens.sequence_lengths.copy()  # the data set unmaps its own with itself
    documents = np.repeat(np.arange(len(lengths)), lengths)
    marks = choose(documents, np.arange(lengths.sum())).astype(np.uint8)
    described = Marks(name, "by hand", "1", len(marks), len(marks), int(marks.sum()), fingerprint(prefix))
    write_marks(prefix, described, lengths, [marks])


def _mark_all(prefix: Path) -> None:
    draw = np.random.default_rng(5)
    mark(prefix, "some", lambda documents, _: draw.random(len(documents)) < 0.15)
    # Most sequences have no selected token.
    mark(prefix, "few", lambda documents, _: documents % 10 == 0)
    mark(prefix, "every", lambda documents, _: np.ones(len(documents)))


@pytest.fixture(scope="session")
def marked(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path prefix of tokens with the marks `some`, `few` and `every`."""
    folder = tmp_path_factory.mktemp("marked")
    for suffix in (".bin", ".idx", ".json"):
        (folder / f"text{suffix}").symlink_to(data / f"text{suffix}")
    run_ranks(folder / "logs", 1, _mark_all, folder / "text")
    return folder / "text"


@pytest.fixture(scope="session")
def selective(marked: Path, write_config: Callable[..., Path]) -> Callable[..., Path]:
    """Write a configuration for selective training; keyword arguments are keys of `sgt`, `megatron` a section."""
    import yaml

    def write(folder: Path, sections: dict[str, Any] | None = None, **options: Any) -> Path:
        path = write_config(folder)
        content = yaml.safe_load(path.read_text())
        content["megatron"]["data-path"] = [str(marked)]
        for name, section in (sections or {}).items():
            content[name] = {**content.get(name, {}), **section}
        if options:
            content["sgt"] = options
        path.write_text(yaml.safe_dump(content))
        return path

    return write


ONE_STEP = "--train-iters 1 --lr-warmup-iters 0 --clip-grad 0"


def first_gradient(run: Path) -> dict[str, np.ndarray]:
    """The gradient of a run's only step by parameter: Adam's first moment is a tenth of it."""
    from cherry_megatron.storage.checkpoint import open_checkpoint

    checkpoint, start = open_checkpoint(run / "checkpoints"), "optimizer.state.exp_avg."
    names = [name for name in checkpoint.tensors if name.startswith(start)]
    return {name.removeprefix(start): checkpoint.read(name).astype(np.float64) * 10 for name in names}


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest relative error of a tensor."""
    assert ours.keys() == theirs.keys()
    assert all(np.linalg.norm(value) > 0 for value in theirs.values()), "nothing was learned from"
    return max(float(np.linalg.norm(ours[k] - theirs[k]) / np.linalg.norm(theirs[k])) for k in theirs)


def evaluate(path: Path, overrides: list[str]) -> str:
    """What `cherry evaluate` says on stderr."""
    import contextlib
    import io

    from cherry_megatron.cli import main

    arguments = ["evaluate", "--config", str(path)]
    for override in overrides:
        arguments += ["--set", override]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(arguments) == 0
    return said.getvalue()
