"""Data preparation, selection and surgery that are stopped by a signal leave nothing half made, and can be redone.

Every verb x every signal x a worker or all processes, with two seeds that draw the place.
"""

import json
import random
import shutil
from itertools import product
from pathlib import Path

import pytest
import yaml

from cherry_megatron.cli import main
from cherry_megatron.data import tokenizer as tokenizers
from cherry_megatron.storage.integrity import damage, saved_files
from cherry_megatron.storage.weights import Weights
from tests.conftest import korean_text
from tests.killing import SIGNALS, WHO, run_and_stop
from tests.surgery.conftest import FFN, GROUPS, HEADS, HIDDEN, VOCABULARY, model_tensors, save

NEVER = 10**9
VERBS = ("data", "select", "compress-depth", "assemble-moee", "convert-hf")
SAMPLE = [("compress-depth", "SIGKILL", "one", 0), ("assemble-moee", "SIGTERM", "all", 0)]
REST = [trial for trial in product(VERBS, SIGNALS, WHO, (0, 1)) if trial not in SAMPLE]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Two models, and configurations of a compression and of a mixture."""
    folder = tmp_path_factory.mktemp("sources")
    for number in range(2):
        save(folder / f"run{number}", model_tensors(8, seed=number))
    megatron = {
        "hidden-size": HIDDEN, "ffn-hidden-size": FFN, "num-attention-heads": HEADS, "swiglu": True,
        "group-query-attention": True, "num-query-groups": GROUPS, "padded-vocab-size": VOCABULARY,
        "untie-embeddings-and-output-weights": True,
    }  # fmt: skip
    small = {"run": "run", "recurrence": {"pattern": "*-[*-*-]x4*-"}, "megatron": megatron}
    (folder / "compress-depth.yaml").write_text(yaml.safe_dump(small))
    whole = {**small, "recurrence": {"pattern": "*-[(*-)x6]x2*-"}, "moee": {"experts": 2, "router_hidden": 6}}
    (folder / "assemble-moee.yaml").write_text(yaml.safe_dump(whole))
    dense = {**small, "recurrence": {"pattern": "(*-)x8"}, "megatron": {**megatron, "seq-length": 64}}
    (folder / "convert-hf.yaml").write_text(yaml.safe_dump(dense))
    return folder


def make_text(sources: Path) -> None:
    """Text and its tokenizer, and tokens, beside the models."""
    if (sources / "text.jsonl").exists():
        return
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in korean_text(1, 200))
    (sources / "text.jsonl").write_text("\n".join(lines))
    tokenizers.train([sources / "text.jsonl"], sources / "tok", 400)
    assert main([*command("data", sources, sources), "--workers", "1"]) == 0


def command(verb: str, sources: Path, folder: Path) -> list[str]:
    if verb == "data":
        tokens = ["--tokenizer", str(sources / "tok"), "--output", str(folder / "tokens")]
        return ["data", "--input", str(sources / "text.jsonl"), *tokens]
    if verb == "select":
        return ["select", "--data", str(folder / "tokens"), "--selector", "random"]
    loads = [str(sources / "run0"), *([str(sources / "run1")] if verb == "assemble-moee" else [])]
    more = ["--no-tokenizer", "--shard-size", "2e-5"] if verb == "convert-hf" else []
    return [
        verb,
        "--load",
        *loads,
        "--save",
        str(folder / "made"),
        "--config",
        str(sources / f"{verb}.yaml"),
        *more,
    ]


def artefacts(verb: str, folder: Path) -> dict[str, object]:
    """What a verb has made, as far as it does not tell of its time; nothing where it has not come to its end."""
    if verb in ("data", "select"):
        start = "tokens" if verb == "data" else "tokens.random"
        if not (folder / f"{start}.idx").exists():
            return {}
        return {f"{start}.{end}": (folder / f"{start}.{end}").read_bytes() for end in ("idx", "bin")}
    made = folder / "made"
    if not made.exists():
        return {}
    if verb == "convert-hf":
        Weights(made).check(list(Weights(made).tensors))
        return {"names": {path.name for path in made.iterdir()}, "values": (made / "manifest.json").read_text()}
    made = made / "iter_0000000"
    assert damage(made) is None
    # Archives and records have the time in them.
    return {"names": {*saved_files(made)}, "values": (made / "manifest.json").read_text()}


def prepared(verb: str, sources: Path, folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    if verb in ("data", "select"):
        make_text(sources)
    if verb == "select":
        for end in ("idx", "bin", "json"):
            shutil.copy(sources / f"tokens.{end}", folder)
    return [*command(verb, sources, folder), "--workers", "2"]


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory) -> dict[str, tuple[dict[str, object], int]]:
    """What each verb makes without a stop, and how often it changes files."""
    found: dict[str, tuple[dict[str, object], int]] = {}

    def get(verb: str) -> tuple[dict[str, object], int]:
        if verb not in found:
            folder = tmp_path_factory.mktemp("whole")
            status, changes = run_and_stop(prepared(verb, sources, folder), "SIGKILL", "all", NEVER)
            assert status == 0 and artefacts(verb, folder)
            found[verb] = artefacts(verb, folder), changes
        return found[verb]

    return get


def survives(trial: tuple[str, str, str, int], sources: Path, folder: Path, whole) -> None:
    verb, name, who, _ = trial
    expected, changes = whole(verb)
    assert changes > 5
    arguments = prepared(verb, sources, folder)
    at = random.Random(f"{trial}").randint(1, changes - 2)
    status, done = run_and_stop(arguments, name, who, at)
    assert who == "one" or (status != 0 and not done), "it was not stopped"
    if found := artefacts(verb, folder):  # it was done but for clearing up
        assert found == expected
        return
    again, _ = run_and_stop(arguments, name, who, NEVER)
    assert again == 0
    assert artefacts(verb, folder) == expected
    names = {path.name for path in folder.iterdir()}
    assert not [left for left in names if left.endswith((".parts", ".partial")) or left.startswith(".")], names


@pytest.mark.parametrize("trial", SAMPLE, ids=str)
def test_a_killed_verb_leaves_nothing_half_made(trial, sources, tmp_path, whole):
    survives(trial, sources, tmp_path, whole)


@pytest.mark.full
@pytest.mark.parametrize("trial", REST, ids=str)
def test_kill_matrix(trial, sources, tmp_path, whole):
    survives(trial, sources, tmp_path, whole)
