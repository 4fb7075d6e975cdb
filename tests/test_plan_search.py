"""The search for a grouping, with real models: what it scores, and the same search under every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cherry_megatron.cli import main
from tests.conftest import run_ranks
from tests.surgery.conftest import read
from tests.test_bad_input import check, verb

BUDGET = 12
SEARCH = ["--plan", "search", "--budget", str(BUDGET), "--seed", "3"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory, write_config, train) -> Path:
    """The run of a model of eight layers, trained until they differ."""
    path = write_config(
        tmp_path_factory.mktemp("deep"), recurrence={"pattern": "(*-)x8", "loop_scales": False},
        megatron={"group-query-attention": True, "num-query-groups": 2},
    )  # fmt: skip
    train(path, flags="--train-iters 15 --lr 0.01 --lr-decay-iters 20")
    return path.parent / "run"


def target(folder: Path, write_config, megatron: dict[str, Any] | None = None, **sections) -> Path:
    """The configuration of the compressed model, which names what is to be written, as a recovery's does."""
    return write_config(
        folder,
        evaluation={"batches": 2},
        megatron={
            "group-query-attention": True, "num-query-groups": 2, "eval-iters": 2, "load": str(folder / "small"),
            "finetune": True, **(megatron or {}),
        },
        **sections,
    )  # fmt: skip


def compress(load: Path, path: Path, *options: str) -> list[str]:
    return [
        "compress-depth", "--load", str(load), "--save", str(path.parent / "small"), "--config", str(path), *options
    ]  # fmt: skip


def _verb(arguments: list[str]) -> None:
    from cherry_megatron.cli import main

    if status := main(arguments):
        raise AssertionError(f"cherry exited with {status}")


def record(folder: Path, world: int, arguments: list[str]) -> dict[str, Any]:
    """Compress on so many ranks; returns the lineage of what rank 0 wrote."""
    run_ranks(folder / "out", world, _verb, arguments)
    return json.loads((folder / "small/iter_0000000/lineage.json").read_text())


@pytest.fixture(scope="module")
def found(deep, tmp_path_factory, write_config) -> tuple[Path, dict[str, Any]]:
    """The folder of a search on one process, and the lineage of what it wrote."""
    folder = tmp_path_factory.mktemp("found")
    return folder, record(folder, 1, compress(deep, target(folder, write_config), *SEARCH))


def _losses(path: Path, overrides: tuple[str, ...] = ()) -> list[float]:
    """What a training that starts from a configuration's checkpoint would begin with, on the same batches."""
    from cherry_megatron.config import load
    from cherry_megatron.monitor.evaluation import mean_losses
    from cherry_megatron.platform.machine import prepare
    from cherry_megatron.pretrain import pretrain

    losses: list[float] = []

    def evaluation(config, progress, run):
        def add(model):  # of the last pipeline stage
            means = mean_losses(model, progress.train_dataset, config.evaluation.batches, run)
            losses.extend([means["lm loss"]] if means else [])

        return add

    extra = {"skip-train": True, "no-load-optim": True, "no-load-rng": True}
    pretrain(load(path, overrides), prepare(), extra, evaluation=evaluation)
    return losses


@pytest.mark.parametrize("groups", ["adjacent", "slots", "found"])
def test_scores_are_the_losses_of_what_would_be_written(groups, found, deep, tmp_path, write_config):
    folder, lineage = found
    search = lineage["search"]
    text = search["groups"] if groups == "found" else groups
    path = target(tmp_path, write_config)
    main(compress(deep, path, "--groups", text, "--workers", "1"))
    ((loss,),) = run_ranks(tmp_path / "out", 1, _losses, path)
    assert loss == pytest.approx(search["loss" if groups == "found" else groups], rel=1e-6)
    if groups == "found":
        ours, theirs = (read(each / "small/iter_0000000") for each in (folder, tmp_path))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_record_tells_what_was_found(found):
    _, lineage = found
    search = lineage["search"]
    assert lineage["options"]["groups"] == search["groups"]
    assert (search["scored"], search["budget"], search["seed"]) == (BUDGET, BUDGET, 3)
    assert search["loss"] < min(search["adjacent"], search["slots"]), "the search found nothing better"


def test_a_dry_run_finds_the_same_and_writes_none(found, deep, tmp_path, write_config):
    path = target(tmp_path, write_config)
    run_ranks(tmp_path / "out", 1, _verb, compress(deep, path, *SEARCH, "--dry-run"))
    printed = (tmp_path / "out/rank0.out").read_text()
    assert f"--groups {found[1]['search']['groups']}" in printed and "written" not in printed
    assert not (tmp_path / "small").exists()


LAYOUTS = {
    "pp2": (2, {"pipeline-model-parallel-size": 2}),
    "tp2": (2, {"tensor-model-parallel-size": 2}),
    "dp2": (2, {}),
    "tp2-sp-pp2": (
        4,
        {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2, "sequence-parallel": True},
    ),
}
SAMPLE = ["pp2", *(pytest.param(name, marks=pytest.mark.full) for name in ("tp2", "dp2", "tp2-sp-pp2"))]


@pytest.mark.parametrize("name", SAMPLE)
def test_the_layout_does_not_matter(name, found, deep, tmp_path, write_config):
    world, megatron = LAYOUTS[name]
    ours = record(tmp_path, world, compress(deep, target(tmp_path, write_config, megatron), *SEARCH))["search"]
    theirs = found[1]["search"]
    for key in ("loss", "adjacent", "slots"):
        assert ours.pop(key) == pytest.approx(theirs[key], rel=1e-5)
    assert ours == {key: theirs[key] for key in ours}


@pytest.mark.full
@pytest.mark.parametrize(
    "megatron", [{"bf16": True, "eval-micro-batch-size": 4}, {"pipeline-model-parallel-size": 2}]
)
def test_tied_embeddings_and_other_types(megatron, tmp_path, write_config, train):
    tied = {"untie-embeddings-and-output-weights": False}
    source = write_config(tmp_path / "deep", recurrence={"pattern": "(*-)x8", "loop_scales": False}, megatron=tied)
    train(source, flags="--train-iters 3 --lr-decay-iters 9")
    ungrouped = {"group-query-attention": False, "num-query-groups": None}
    path = target(tmp_path / "target", write_config, {**tied, **ungrouped, **megatron})
    world = megatron.get("pipeline-model-parallel-size", 1)
    search = record(path.parent, world, compress(tmp_path / "deep/run", path, *SEARCH))["search"]
    losses = run_ranks(tmp_path / "out", world, _losses, path, ("megatron.eval-micro-batch-size=2",))
    assert losses[-1] == pytest.approx([search["loss"]], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--plan", "search", "--groups", "slots"], "--groups slots does not go with --plan search"),
        (["--plan", "search", "--expand"], "--plan says how to compress, which --expand does not"),
        (["--plan", "search", "--method", "select"], "use it with --method average and --align none"),
        (["--plan", "search", "--align", "weights"], "use it with --method average and --align none"),
        (["--budget", "9"], "--budget is that of --plan search; add it"),
        (["--plan", "search", "--budget", "1"], "--budget 1: use 2 or more"),
        (["--plan", "search", "--set", "recurrence.pattern=(*-)x9"], "has 9 layers, and the source only 8; use"),
        (["--plan", "search", "--set", "megatron.hidden-size=64"], "megatron.hidden-size is 64"),
        (["--plan", "search", "--set", "megatron.data-path=nowhere"], "nowhere.idx or .bin is missing"),
        (["--plan", "search", "--save", "."], ". exists and is not empty; choose another folder"),
    ],
)
def test_what_does_not_go_with_a_search_is_refused(options, says, deep, tmp_path, write_config):
    check(tmp_path, compress(deep, target(tmp_path, write_config), *options), says)


def test_text_that_is_too_short_is_refused(deep, tmp_path, write_config):
    path = target(tmp_path, write_config, {"train-iters": 1, "lr-warmup-iters": 0})
    ((status, errors),) = run_ranks(tmp_path / "out", 1, verb, tmp_path, compress(deep, path, *SEARCH))
    assert status == 2 and "evaluation.batches 2 is more than the 1 batches of the training" in errors, errors


@pytest.mark.full
def test_layers_of_several_kinds_are_refused(tmp_path, write_config, train):
    source = write_config(tmp_path / "deep", recurrence={"pattern": "*-*-*--*--", "loop_scales": False})
    train(source, flags="--train-iters 1 --lr-decay-iters 9")
    path = write_config(tmp_path / "target", recurrence={"pattern": "*-[*--]x3"})
    command = compress(tmp_path / "deep/run", path, *SEARCH)
    check(tmp_path, command, "--plan search needs layers of one kind")
