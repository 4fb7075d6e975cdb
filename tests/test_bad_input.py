"""Bad input: one clear line on stderr, exit status 2, no traceback, nothing half-written."""

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.conftest import run_ranks

# name: (sections of the configuration, overrides and flags after the verb, what the line says)
CONFIGS = {
    "unknown-section": ({"recurence": {}}, [], "did you mean 'recurrence'"),
    "unknown-key": ({"recurrence": {"patern": "*-"}}, [], "did you mean 'pattern'"),
    "unknown-flag": ({"megatron": {"hiden-size": 64}}, [], "did you mean 'hidden-size'"),
    "unknown-trailing-flag": ({}, ["--", "--train-itres", "3"], "did you mean 'train-iters'"),
    "bad-pattern": ({"recurrence": {"pattern": "*-[*-"}}, [], "written [layers]xN"),
    "bad-symbol": ({"recurrence": {"pattern": "*-Z"}}, [], "'Z' is not a layer"),
    "bad-order": ({"recurrence": {"order": "random"}}, [], "not one of cycle, sequence"),
    "bad-type": ({"recurrence": {"loops": "many"}}, [], "expected int"),
    "negative-loops": ({"recurrence": {"loops": -1}}, [], "recurrence.loops is -1"),
    "random-loops": ({"recurrence": {"random_loops": [2, 9]}}, [], "within 1 to 3"),
    "truncation-alone": ({"recurrence": {"backprop_loops": 1}}, [], "needs recurrence.injection add"),
    "injected-sequence": ({"recurrence": {"order": "sequence", "injection": "add"}}, [], "need order cycle"),
    "stages-do-not-add-up": (
        {"recurrence": {"stages": [4, 5]}, "megatron": {"pipeline-model-parallel-size": 2}},
        [],
        "add up to 8 effective layers",
    ),
    "more-stages-than-layers": ({"megatron": {"pipeline-model-parallel-size": 9}}, [], "more than the 8 effective"),
    "tp-does-not-divide-heads": ({"megatron": {"tensor-model-parallel-size": 3}}, [], "num-attention-heads 4"),
    "tp-does-not-divide-vocabulary": (
        {"megatron": {"tensor-model-parallel-size": 4, "padded-vocab-size": 514}},
        [],
        "padded-vocab-size 514",
    ),
    "heads-do-not-divide-hidden": ({"megatron": {"num-attention-heads": 5}}, [], "not a multiple"),
    "fixed-flag": ({"megatron": {"calculate-per-token-loss": False}}, [], "must be True"),
    "derived-flag": ({"megatron": {"num-layers": 6}}, [], "follows from `recurrence.pattern`"),
    "derived-trailing-flag": ({}, ["--", "--save", "x"], "follows from `run`"),
    "fixed-trailing-flag": ({}, ["--", "--normalization", "LayerNorm"], "must be RMSNorm"),
    "unsupported-flag": ({"megatron": {"reset-attention-mask": True}}, [], "take it out"),
    "zero-stages": ({"megatron": {"pipeline-model-parallel-size": 0}}, [], "positive number"),
    "more-loops-than-trained": ({"evaluation": {"loops": [9]}}, [], "evaluation.loops 9"),
    "random-loops-overlap": (
        {
            "recurrence": {"random_loops": [1, 3]},
            "megatron": {
                "overlap-grad-reduce": True,
                "recompute-granularity": "full",
                "recompute-method": "uniform",
                "recompute-num-layers": 1,
            },
        },
        [],
        "overlap-grad-reduce",
    ),
    "missing-number": ({"megatron": {"hidden-size": None}}, [], "set megatron.hidden-size"),
    "warmup-too-long": ({"megatron": {"lr-warmup-iters": 20}}, [], "lr-warmup-iters 20"),
    "switch-with-value": ({"megatron": {"swiglu": "yes please"}}, [], "it is a switch"),
    "not-a-number": ({"megatron": {"lr": "fast"}}, [], "lr"),
    "bad-set": ({}, ["--set", "recurrence.loops"], "section.key=value"),
    "evaluation-loops": ({"evaluation": {"loops": [0]}}, [], "must be positive"),
    "batch-does-not-divide": ({"megatron": {"global-batch-size": 7}}, [], "global-batch-size 7"),
    "small-vocabulary": ({"megatron": {"padded-vocab-size": 256}}, [], "padded-vocab-size 256"),
    "missing-data": ({"megatron": {"data-path": ["nowhere/text"]}}, [], "nowhere/text"),
    "missing-validation-data": (
        {"megatron": {"valid-data-path": ["1", "nowhere/v"]}},
        [],
        "valid-data-path nowhere/v",
    ),
    "missing-data-list": ({"megatron": {"data-args-path": "nowhere.txt"}}, [], "data-args-path nowhere.txt"),
    "rope-that-is-not-built": ({"megatron": {"rotary-percent": 0.5}}, [], "rotary-percent"),
    "missing-tokenizer": ({"megatron": {"tokenizer-model": "nowhere"}}, [], "nowhere"),
    "missing-checkpoint": ({"megatron": {"load": "nowhere"}}, [], "no checkpoint there"),
    "context-parallel": ({"megatron": {"context-parallel-size": 2}}, [], "context-parallel-size 2"),
    "recompute-block": (
        {"megatron": {"recompute-granularity": "full", "recompute-method": "block", "recompute-num-layers": 1}},
        [],
        "a loop at a time",
    ),
    "fp8-on-cpu": ({"megatron": {"fp8-format": "hybrid", "bf16": True}}, [], "FP8 needs"),
}


def verb(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """Status and stderr of one verb in this process."""
    import contextlib
    import io

    from cherry_megatron.cli import main

    os.chdir(folder)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main(arguments)
    return status, errors.getvalue()


def check(tmp_path: Path, arguments: list[str], says: str) -> None:
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    ((status, errors),) = run_ranks(tmp_path.parent / f"{tmp_path.name}-output", 1, verb, tmp_path, arguments)
    lines = [line for line in errors.splitlines() if line.startswith("cherry ")]
    assert status == 2, errors
    assert len(lines) == 1, errors
    assert says in lines[0], lines[0]
    assert "Traceback" not in errors
    # Parts of an interrupted `cherry data` are kept to go on from, and do not look finished.
    after = sorted(str(p) for p in tmp_path.rglob("*") if ".parts" not in str(p))
    assert after == before, "something was written"


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration(name, tmp_path: Path, write_config):
    sections, extra, says = CONFIGS[name]
    path = write_config(tmp_path, **sections)
    content = yaml.safe_load(path.read_text())
    for key in set(sections) - set(content):
        content[key] = sections[key]
    path.write_text(yaml.safe_dump(content))
    check(tmp_path, ["pretrain", "--config", str(path), *extra], says)


def test_missing_configuration(tmp_path: Path):
    check(tmp_path, ["pretrain", "--config", "none.yaml"], "cannot read the configuration none.yaml")


def test_configuration_that_is_not_yaml(tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("run: [1\nmegatron: {")
    check(tmp_path, ["params", "bad.yaml"], "bad.yaml, line 2: not valid YAML")


def test_run_folder_that_is_a_file(tmp_path: Path, write_config):
    path = write_config(tmp_path)
    (tmp_path / "run").write_text("in the way")
    check(tmp_path, ["pretrain", "--config", str(path)], "cannot write the run's folder")


def test_evaluate_without_checkpoint(tmp_path: Path, write_config):
    check(tmp_path, ["evaluate", "--config", str(write_config(tmp_path))], "has no checkpoint to evaluate")


def test_missing_text(tmp_path: Path):
    check(
        tmp_path,
        ["tokenizer", "--input", "no.txt", "--output", "t", "--vocab-size", "300"],
        "no.txt does not exist",
    )


def test_empty_corpus(tmp_path: Path, data: Path):
    (tmp_path / "empty.jsonl").write_text("")
    arguments = ["data", "--input", "empty.jsonl", "--output", "out", "--tokenizer", str(data / "tokenizer")]
    check(tmp_path, arguments, "no documents")


def test_malformed_corpus(tmp_path: Path, data: Path):
    lines = [json.dumps({"text": "좋은 글"})] * 5 + ["{bad"] * 5
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    arguments = ["data", "--input", "bad.jsonl", "--output", "out", "--tokenizer", str(data / "tokenizer")]
    check(tmp_path, arguments, "5 of 10 lines are malformed")


def test_not_a_tokenizer(tmp_path: Path):
    (tmp_path / "a.txt").write_text("글")
    check(tmp_path, ["data", "--input", "a.txt", "--output", "o", "--tokenizer", "."], "holds no tokenizer.json")
