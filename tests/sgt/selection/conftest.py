"""A small data set of Korean, Hanja, emoji, code and English, and `cherry select` without worker processes."""

import json
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cherry_megatron.data import prepare, tokenizer
from cherry_megatron.sgt.selection import scratch, tokens
from cherry_megatron.sgt.selection.select import Selection, select
from cherry_megatron.sgt.selection.selectors import Random, Selector
from cherry_megatron.sgt.selection.semantic import Semantic
from tests.conftest import korean_text, run_ranks

MIXED = [
    "왜냐하면 서울대학교에서 漢字를 가르쳤기 때문이다 😀👨‍👩‍👧. 그런데 GPU 3대를 샀다.",
    "def f(x):\n    return x ** 2  # 제곱을 돌려준다\n",
    "However, the committee wasn't convinced; wait, check 3,000 samples in Seoul.",
    "다시 생각해 보면 ㅋㅋㅋ진짜 재미있는 영화였다ㅠㅠ 10점!",
    "大學之道 在明明德 é ñ \U0001f9ea `rm -rf ./a_b-c` 한글\tand tabs",
]


def _make(folder: Path) -> None:
    tokenizer.train([folder / "text.jsonl"], folder / "tokenizer", 500)
    prepare.prepare([folder / "text.jsonl"], folder / "text", folder / "tokenizer", workers=1)


@pytest.fixture(scope="package")
def source(tmp_path_factory) -> Path:
    """A folder with tokenizer/ and text.{bin,idx,json}."""
    folder = tmp_path_factory.mktemp("sgt")
    texts = [text for pair in zip(korean_text(3, 60), MIXED * 12, strict=True) for text in pair]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (folder / "text.jsonl").write_text("\n".join(lines))
    run_ranks(folder / "logs", 1, _make, folder)
    return folder


@pytest.fixture
def own(source, tmp_path) -> Path:
    """The same in a folder of the test's own."""
    for path in source.glob("text.*"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenizer").symlink_to(source / "tokenizer")
    return tmp_path


@contextmanager
def at_once(workers: int, prepared: Any, *arguments: Any) -> Iterator[Any]:
    """Stands in for worker processes: what is asked is done here and now."""
    work = prepared(*arguments)

    def submit(*request: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*request))
        return future

    yield submit


def small_pieces(size: int = 1000) -> None:
    tokens.PIECE_TOKENS = size
    scratch.worker_processes = at_once


def selector(name: str, folder: Path, triggers: Path | None = None) -> Selector:
    return Random(7) if name == "random" else Semantic(folder / "text", folder / "tokenizer", triggers)


def run(folder: Path, name: str, rho: float = 0.15, workers: int = 1, **options: Any) -> Selection:
    return select(folder / "text", selector(name, folder, **options), rho, name, workers)


def read_marks(folder: Path, name: str) -> np.ndarray:
    return np.fromfile(folder / f"text.{name}.bin", np.uint8)
