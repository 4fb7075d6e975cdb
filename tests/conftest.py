"""Fixtures: real Megatron in forked worker processes, and a small real data set."""

import json
import multiprocessing
import os
import random
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # a time limit fails on a busy one
settings.load_profile("shared machine")

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests fork, and the library's threads do not survive that

# Children are forked from a server that has imported Megatron once: 7 s saved for each. With a GPU they
# are started afresh, because CUDA does not survive a fork.
HAS_GPU = Path("/dev/nvidia0").exists()
_CONTEXT = multiprocessing.get_context("spawn" if HAS_GPU else "forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])
# Python 3.12.1 and older do not tell the server sys.path (cpython issue 117378).
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")))
)

TEXT = """나는 학교에 갑니다 그리고 오늘 날씨가 매우 좋습니다 하지만 내일은 비가 온다고 합니다 결제 연동을
진행하려면 먼저 관리자 콘솔에서 채널을 추가해야 합니다 the model is trained on text
1 2 3 다시 생각해 보면 서울 부산"""
WORDS = TEXT.split()


def _rank_main(
    rank: int, world: int, port: int, log: str, function: Callable[..., Any], args: tuple, queue: Any
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    with Path(log).open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        sys.stdout = sys.stderr = out
        try:
            queue.put((rank, function(*args), None))
        except SystemExit as stop:
            queue.put((rank, None, None if not stop.code else f"exit {stop.code}"))
        except BaseException:
            queue.put((rank, None, traceback.format_exc()))
        out.flush()
    queue.close()
    queue.join_thread()
    os._exit(0)


def run_ranks(folder: Path, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a module-level function on `world` ranks; returns what each gave, raises what one raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        # A process alone takes a port when it needs one: by then another may have this one.
        port = probe.getsockname()[1] if world > 1 else 0
    folder.mkdir(parents=True, exist_ok=True)
    queue = _CONTEXT.Queue()
    ranks = [
        _CONTEXT.Process(
            target=_rank_main,
            args=(rank, world, port, str(folder / f"rank{rank}.out"), function, args, queue),
        )
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, value, error = queue.get(timeout=300)
            if error is not None:
                raise AssertionError(f"rank {rank} of {world} failed:\n{error}")
            results[rank] = value
    finally:
        for process in ranks:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world)]


def korean_text(seed: int, documents: int = 300) -> list[str]:
    """Text made from a fixed vocabulary, with enough order that a model learns something."""
    draw = random.Random(seed)
    return [
        " ".join(WORDS[(start + step) % len(WORDS)] for step in range(draw.randint(20, 120)))
        for start in (draw.randrange(len(WORDS)) for _ in range(documents))
    ]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of documents."""
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in korean_text(1)))
    return path


def _make_data(corpus: Path, folder: Path) -> None:
    from cherry_megatron.data import prepare, tokenizer

    tokenizer.train([corpus], folder / "tokenizer", 512)
    prepare.prepare([corpus], folder / "text", folder / "tokenizer", workers=1)


@pytest.fixture(scope="session")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer/ and text.{bin,idx,json}."""
    folder = tmp_path_factory.mktemp("data")
    run_ranks(folder / "logs", 1, _make_data, corpus, folder)
    return folder


TINY: dict[str, Any] = {
    "hidden-size": 32, "ffn-hidden-size": 64, "num-attention-heads": 4, "swiglu": True,
    "untie-embeddings-and-output-weights": True, "padded-vocab-size": 512, "seq-length": 32,
    "max-position-embeddings": 32, "split": "80,10,10", "global-batch-size": 8, "micro-batch-size": 2,
    "train-iters": 20, "lr": 1e-3, "lr-warmup-iters": 2, "lr-decay-style": "cosine", "weight-decay": 0.1,
    "clip-grad": 1.0, "eval-interval": 1000, "eval-iters": 1, "save-interval": 1000, "log-interval": 5,
    "num-workers": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def write_config(data: Path) -> Callable[..., Path]:
    """Write a configuration for a tiny model; keyword arguments are sections merged over the defaults."""
    import yaml

    def write(folder: Path, **sections: dict[str, Any]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        megatron = {
            **TINY,
            "tokenizer-model": str(data / "tokenizer"),
            "data-path": [str(data / "text")],
            "data-cache-path": str(data / "cache"),
            **sections.get("megatron", {}),
        }
        content = {
            **sections,
            "run": str(folder / "run"),
            "recurrence": {"pattern": "*-[*-*-]x3*-", "loop_scales": True, **sections.get("recurrence", {})},
            "evaluation": {"batches": 1, **sections.get("evaluation", {})},
            "megatron": {k: v for k, v in megatron.items() if v is not None},
        }
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def _train(path: Path, overrides: list[str], flags: list[str]) -> None:
    from cherry_megatron.cli import main

    arguments = ["pretrain", "--config", str(path)]
    for override in overrides:
        arguments += ["--set", override]
    status = main([*arguments, "--", *flags])
    if status:
        raise AssertionError(f"cherry pretrain exited with {status}")


@pytest.fixture(scope="session")
def train() -> Callable[..., list[dict[str, float]]]:
    """Train with `cherry pretrain` on so many ranks; returns the recorded steps."""

    def run(path: Path, world: int = 1, flags: str = "", overrides: tuple[str, ...] = ()) -> list[dict[str, float]]:
        import yaml

        from cherry_megatron.runs import read_steps

        run_ranks(path.parent / "output", world, _train, path, list(overrides), flags.split())
        folder = yaml.safe_load(path.read_text())["run"]
        folder = next((o.removeprefix("run=") for o in overrides if o.startswith("run=")), folder)
        return read_steps(Path(folder))

    return run


PROMPTS = ["나는 학교에", "오늘 날씨가 매우", "결제 연동을 진행하려면 먼저 관리자", "the model", "서울"]


@pytest.fixture(scope="session")
def speaking(
    tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., Path], train: Callable[..., Any]
) -> Path:
    """The configuration of a trained run that continues PROMPTS at its two evaluations."""
    folder = tmp_path_factory.mktemp("speaking")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    path = write_config(
        folder,
        recurrence={"injection": "add"},
        generation={"prompts": str(folder / "prompts.txt"), "tokens": 8, "temperature": 0.8},
        megatron={
            "seq-length": 96,
            "max-position-embeddings": 96,
            "global-batch-size": 4,
            "train-iters": 8,
            "lr": 1e-2,
            "eval-interval": 4,
            "hidden-dropout": 0.1,
        },
    )
    train(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def _no_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing may reach for a model hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    yield
