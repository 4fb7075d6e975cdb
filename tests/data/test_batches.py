"""Held-out text does not depend on what a training may choose freely."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import run_ranks


def _first_and_last(path: Path, flags: list[str]) -> tuple[list, list, list]:
    """Of the held-out sequences, and the first of Megatron's own validation set."""
    from megatron.training.initialize import initialize_megatron

    from cherry_megatron.config import load
    from cherry_megatron.data.batches import build_datasets, build_held_out
    from cherry_megatron.platform.machine import prepare
    from cherry_megatron.pretrain import initialize

    machine = prepare()
    initialize(load(path, (), flags), machine, {})
    initialize_megatron(allow_no_cuda=True)
    held_out = build_held_out(24)
    _, valid, _ = build_datasets((8, 24, 0))
    return *(held_out[k]["tokens"].tolist() for k in (0, 23)), valid[0]["tokens"].tolist()


def test_held_out_text_is_the_same_for_every_seed_and_length(tmp_path, write_config):
    flags = {"a": [], "b": ["--seed", "77"], "c": ["--train-iters", "40", "--eval-interval", "5"]}
    found = {
        name: run_ranks(tmp_path / name / "out", 1, _first_and_last, write_config(tmp_path / name), extra)[0]
        for name, extra in flags.items()
    }
    assert found["a"][:2] == found["b"][:2] == found["c"][:2]
    assert found["a"][0] != found["a"][1]
    assert found["a"][2] != found["b"][2], "Megatron's own order follows the seed"


def test_held_out_text_may_have_files_of_its_own(tmp_path, data, write_config):
    files = {
        "data-path": None,
        "split": None,
        "train-data-path": [str(data / "text")],
        "valid-data-path": [str(data / "text")],
    }
    found = [
        run_ranks(
            tmp_path / seed / "out",
            1,
            _first_and_last,
            write_config(tmp_path / seed, megatron=files),
            ["--seed", seed],
        )[0]
        for seed in ("1", "2")
    ]
    assert found[0][:2] == found[1][:2]


def test_a_full_disk_is_told_by_the_name_of_the_cache(monkeypatch):
    from cherry_megatron.data import batches
    from cherry_megatron.errors import CherryError

    class Builder:
        def __init__(self, *_: object) -> None: ...

        def build(self) -> None:
            raise Exception("Failed to write dataset materials") from OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(batches, "BlendedMegatronDatasetBuilder", Builder)
    with pytest.raises(CherryError, match="no space left for RUN/cache; make room and run the same command again"):
        batches._built([1, 1, 1], SimpleNamespace(path_to_cache="RUN/cache"))
