"""Mutated configurations, data files and checkpoint metadata: success or a sentence, no traceback, no hang."""

import json
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import run_ranks

SECONDS = 20  # that one input may take
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 10**30, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "x", "1e-5",
    "가", "*-", "*-[*-]x9", "(*-)x3", "[", "*-[*E]x2*-", [], [1], [1, "a"], {}, {"a": 1}, [[]], "none", "${HOME}",
    "8,0", "9" * 40, "\u0000", "-", "--seed", "true",
]  # fmt: skip


@contextmanager
def in_time(what: object) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"{what} hangs")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def outcome(call: Callable[[], object], what: object) -> str | None:
    """What goes wrong; None for success or one sentence."""
    from cherry_megatron.errors import CherryError

    try:
        with in_time(what):
            call()
    except CherryError as error:
        text = str(error)
        return None if text.strip() and "\n" not in text and len(text) < 3000 else f"{what}: not a sentence: {text}"
    except BaseException:
        return f"{what}: {traceback.format_exc(limit=-4)}"
    return None


def noise(draw: random.Random, data: bytes) -> bytes:
    """Bytes changed, left out, put in, doubled or cut off."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, length = draw.randrange(len(found) + 1), draw.choice((1, 1, 4, 40))
        match draw.randrange(5):
            case 0:
                found[at : at + length] = draw.randbytes(length)
            case 1:
                del found[at : at + length]
            case 2:
                found[at:at] = draw.choice(
                    (b"\n", b": ", b"- ", b"[", b"}", b'"', b"\xff", b"0", draw.randbytes(3))
                )
            case 3:
                found[at:at] = found[at : at + length]
            case 4 if draw.random() < 0.2:
                del found[at:]
    return bytes(found)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a structure with a key of it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def altered(draw: random.Random, value: Any) -> Any:
    """Some values of a structure replaced, some keys removed or renamed."""
    for _ in range(draw.choice((1, 1, 2))):
        found = list(places(value))
        if not found:
            return draw.choice(VALUES)
        where, key = draw.choice(found)
        if isinstance(where, dict) and draw.random() < 0.2:
            where[draw.choice((f"{key}s", key, "load", "loops", 5))] = where.pop(key)
        else:
            where[key] = draw.choice(VALUES)
    return value


def fuzz_configurations(folder: Path, count: int, seed: int) -> list[str]:
    from cherry_megatron.config import load, outline
    from cherry_megatron.monitor.tables import params_table
    from cherry_megatron.platform.machine import prepare

    prepare()
    draw, path, failures = random.Random(seed), folder / "fuzzed.yaml", []
    texts = [(folder / "config.yaml").read_bytes(), (folder / "mixture.yaml").read_bytes()]

    def call() -> None:
        outline(path)
        params_table(load(path))

    for number in range(count):
        text = draw.choice(texts)
        if draw.random() < 0.7:
            text = yaml.safe_dump(altered(draw, yaml.safe_load(text)), allow_unicode=True).encode()
        path.write_bytes(text if draw.random() < 0.6 else noise(draw, text))
        if why := outcome(call, f"configuration {number}"):
            failures.append(f"{why}\n{path.read_bytes()!r}")
    return failures


def fuzz_data(folder: Path, count: int, seed: int) -> list[str]:
    from cherry_megatron.checks import _data
    from cherry_megatron.config import load
    from cherry_megatron.data import prepare
    from cherry_megatron.platform import machine
    from tests.data.conftest import threads

    machine.prepare()
    prepare.worker_processes = threads
    draw, failures = random.Random(seed), []
    lines = [json.dumps({"text": f"나는 학교에 {n}"}, ensure_ascii=False).encode() for n in range(30)]
    work = folder / "work"
    work.mkdir()
    report = json.loads((folder / "text.json").read_text())
    config = load(folder / "config.yaml", [f"megatron.data-path=[{work / 'text'}]"])
    for number in range(count):
        for left in work.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        kind = draw.choice(("text.jsonl", "text.txt", "text.jsonl.gz", "files", "files", "tokenizer"))
        if kind == "files":
            for end in ("bin", "idx", "json"):
                shutil.copy(folder / f"text.{end}", work)
            victim = work / f"text.{draw.choice(('bin', 'idx', 'json', 'json'))}"
            structured = victim.suffix == ".json" and draw.random() < 0.6
            changed = json.dumps(altered(draw, json.loads(json.dumps(report)))).encode() if structured else b""
            victim.write_bytes(changed or noise(draw, victim.read_bytes()))
            why = outcome(lambda: _data(config), f"data {number}")
        else:
            tokens, source = folder / "tokenizer", work / (kind if kind != "tokenizer" else "text.jsonl")
            source.write_bytes(noise(draw, b"\n".join(lines)))
            if kind == "tokenizer":
                shutil.copytree(tokens, tokens := work / "tokens")
                victim = tokens / "tokenizer.json"
                victim.write_bytes(noise(draw, victim.read_bytes()))
            wanted = {"workers": 1, "max_malformed": draw.choice((0.0, 1.0))}
            why = outcome(lambda: prepare.prepare([source], work / "out", tokens, **wanted), f"data {number}")  # noqa: B023
        if why:
            failures.append(why)
    return failures


def fuzz_metadata(folder: Path, count: int, seed: int) -> list[str]:
    from torch.distributed.checkpoint import FileSystemReader

    from cherry_megatron.checkpoints import unloadable
    from cherry_megatron.config import load
    from cherry_megatron.errors import CherryError
    from cherry_megatron.platform.machine import prepare
    from cherry_megatron.storage.ancestry import describe
    from cherry_megatron.storage.fallback import newest_whole
    from cherry_megatron.storage.integrity import hash_file

    prepare()
    draw, failures = random.Random(seed), []
    config, saved = load(folder / "config.yaml"), folder / "run/checkpoints"
    (checkpoint,) = saved.glob("iter_*")
    names = [".metadata", "integrity.json", "lineage.json", "manifest.json", "metadata.json", "__0_0.distcp"]
    whole = {path: path.read_bytes() for path in [*(checkpoint / name for name in names), *saved.glob("*.txt")]}

    def through_torch() -> None:
        from cherry_megatron.loading import Loading

        try:
            FileSystemReader(checkpoint).read_metadata()
        except Loading._RAISED as error:
            raise CherryError(str(error).splitlines()[0] if str(error) else "damaged") from None

    for number in range(count):
        for path, data in whole.items():
            path.write_bytes(data)
        victim = draw.choice([*whole, checkpoint / ".metadata", checkpoint / "lineage.json"])
        if victim.suffix == ".json" and draw.random() < 0.6:
            victim.write_text(json.dumps(altered(draw, json.loads(whole[victim]))))
        else:
            victim.write_bytes(noise(draw, whole[victim]))
        if victim.name != "integrity.json" and draw.random() < 0.7:  # so that more is read than hashes
            listed = {name: hash_file(checkpoint / name) for name in names if name != "integrity.json"}
            (checkpoint / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": listed}))
        calls: dict[str, Callable[[], object]] = {
            "describe": lambda: describe(folder / "run", verify=True),
            "whole": lambda: newest_whole(saved),
            "start": lambda: unloadable(config),
            "torch": through_torch,
        }
        for name, call in calls.items():
            if why := outcome(call, f"{name} {number} of {victim.name}"):
                failures.append(why)
    return failures


@pytest.fixture(scope="module")
def material(tmp_path_factory, write_config, train, data) -> Path:
    """A run with one checkpoint, a mixture's configuration, and a data set."""
    folder = tmp_path_factory.mktemp("material")
    mixture = {"recurrence": {"pattern": "*-[*E]x2*-"}, "megatron": {"num-experts": 2}, "mtp": {"depths": 1}}
    shutil.copy(write_config(folder, **mixture, sgt={"top_loss": 0.2}), folder / "mixture.yaml")
    train(write_config(folder), flags="--train-iters 1 --lr-warmup-iters 0")
    for end in ("bin", "idx", "json"):
        shutil.copy(data / f"text.{end}", folder)
    shutil.copytree(data / "tokenizer", folder / "tokenizer")
    return folder


KINDS = {"configurations": fuzz_configurations, "data": fuzz_data, "metadata": fuzz_metadata}


def check(kind: str, count: int, seed: int, material: Path, tmp_path: Path) -> None:
    shutil.copytree(material, tmp_path / "copy")
    for path in (tmp_path / "copy").glob("*.yaml"):
        path.write_text(path.read_text().replace(str(material), str(tmp_path / "copy")))
    (failures,) = run_ranks(tmp_path / "output", 1, KINDS[kind], tmp_path / "copy", count, seed)
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_mutated_ends_in_a_sentence(kind, material, tmp_path):
    check(kind, 100, 0, material, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand(kind, seed, material, tmp_path):
    check(kind, 334, seed, material, tmp_path)
