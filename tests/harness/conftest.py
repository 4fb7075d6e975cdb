"""A trained run without injection, and the command line on some ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_ranks

TASKS = Path(__file__).parents[2] / "configs/tasks"
LOOPS = 3


def _cherry(arguments: list[str]) -> int:
    from cherry_megatron.cli import main

    return main(arguments)


@pytest.fixture(scope="session")
def cherry() -> Callable[..., tuple[int, str]]:
    """Run a verb on so many ranks; gives its status, and the output of the first."""

    def run(folder: Path, *arguments: object, world: int = 1) -> tuple[int, str]:
        statuses = run_ranks(folder, world, _cherry, list(map(str, arguments)))
        return statuses[0], (folder / "rank0.out").read_text()

    return run


@pytest.fixture(scope="session")
def asked(
    tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path], train: Callable[..., Any]
) -> Path:
    """The configuration of a run, trained a little, whose model plain PyTorch and transformers can be given."""
    folder = tmp_path_factory.mktemp("asked")
    lengths = {"seq-length": 192, "max-position-embeddings": 192}
    path = write_config(folder, megatron={**lengths, "train-iters": 8, "lr": 1e-2, "global-batch-size": 4})
    train(path)
    return path


@pytest.fixture(scope="session")
def evaluated(
    asked: Path, cherry: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A folder of results on the repository's three tasks, and what was printed."""
    names = "cherry_ko,cherry_ko_speak,cherry_ko_text"
    command = ("evaluate", "--config", asked, "--tasks", names, "--task-dir", TASKS)
    status, said = cherry(tmp_path_factory.mktemp("said"), *command)
    assert status == 0, said
    (folder,) = (asked.parent / "run/tasks").iterdir()
    return folder, said


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """The items of a task in order."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return sorted((line for line in lines if line["task"] == task), key=lambda line: line["item"])
