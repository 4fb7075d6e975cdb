"""Bad input: one clear line on stderr, exit status 2, no traceback, nothing half-written."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests.conftest import run_ranks

# name: (sections of the configuration, overrides and flags after the verb, what the line says)
CONFIGS = {
    "unknown-section": ({"recurence": {}}, [], "did you mean 'recurrence'"),
    "unknown-key": ({"recurrence": {"patern": "*-"}}, [], "did you mean 'pattern'"),
    "negative-size": ({"megatron": {"hidden-size": -128}}, [], "set megatron.hidden-size to a positive number"),
    "unknown-flag": ({"megatron": {"hiden-size": 64}}, [], "did you mean 'hidden-size'"),
    "unknown-trailing-flag": ({}, ["--", "--train-itres", "3"], "did you mean 'train-iters'"),
    "bad-pattern": ({"recurrence": {"pattern": "*-[*-"}}, [], "written [layers]xN"),
    "bad-symbol": ({"recurrence": {"pattern": "*-Z"}}, [], "'Z' is not a layer; use '*' (attention) and '-' (MLP)"),
    "group-without-brackets": ({"recurrence": {"pattern": "*-x4"}}, [], "with brackets: (*-)x4"),
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
    "query-groups-alone": (
        {"megatron": {"group-query-attention": False, "num-query-groups": 2}},
        [],
        "does nothing without group-query-attention",
    ),
    "one-query-group-alone": ({"megatron": {"num-query-groups": 1}}, [], "num-query-groups 1 does nothing without"),
    "query-groups-of-a-flag": ({}, ["--", "--num-query-groups", "1"], "num-query-groups 1 does nothing without"),
    "fixed-flag": ({"megatron": {"calculate-per-token-loss": False}}, [], "must be True"),
    "derived-flag": ({"megatron": {"num-layers": 6}}, [], "follows from `recurrence.pattern`"),
    "derived-trailing-flag": ({}, ["--", "--save", "x"], "follows from `run`"),
    "fixed-trailing-flag": ({}, ["--", "--normalization", "LayerNorm"], "must be RMSNorm"),
    "unsupported-flag": ({"megatron": {"reset-attention-mask": True}}, [], "take it out"),
    "zero-stages": ({"megatron": {"pipeline-model-parallel-size": 0}}, [], "positive number"),
    "selective-recomputation": (
        {
            "recurrence": {"loop_rank": 2},
            "megatron": {"recompute-granularity": "selective", "recompute-modules": ["mlp"]},
        },
        [],
        "would use the last loop's vectors, corrections and routers",
    ),
    "recomputed-norms": (
        {"megatron": {"recompute-granularity": "selective", "recompute-modules": ["layernorm"]}},
        [],
        "recompute-modules layernorm: a norm's output goes with the residual stream",
    ),
    "loader": ({"data": {"loader": "daly"}}, [], "data.loader 'daly' is not one of torch, dali"),
    "external-loader": ({"megatron": {"dataloader-type": "external"}}, [], "choose by data.loader"),
    "negative-rank": ({"recurrence": {"loop_rank": -1}}, [], "recurrence.loop_rank is -1"),
    "nothing-selects": (
        {"sgt": {"alpha": 0.5}},
        [],
        "either marks, the name that `cherry select` gave them, or top_loss",
    ),
    "two-selections": ({"sgt": {"marks": "some", "top_loss": 0.1}}, [], "either marks"),
    "no-such-marks": ({"sgt": {"marks": "some"}}, [], "make them with cherry select"),
    "answers-as-selection": ({"sgt": {"marks": "answers"}}, [], "are no selection"),
    "top-loss-of-nothing": ({"sgt": {"top_loss": 0.0}}, [], "sgt.top_loss 0.0 is no share of the tokens"),
    "alpha": ({"sgt": {"top_loss": 0.1, "alpha": 1.5}}, [], "sgt.alpha 1.5 is not from 0 to 1"),
    "alpha-schedule": ({"sgt": {"top_loss": 0.1, "alpha_start": 0.5}}, [], "go together"),
    "skipped-head": ({"sgt": {"top_loss": 0.1, "skip_head": True}}, [], "needs sgt.alpha 1"),
    "skipped-head-graph": (
        {
            "sgt": {"top_loss": 0.1, "alpha": 1.0, "skip_head": True},
            "megatron": {"cuda-graph-impl": "full_iteration", "attention-backend": "unfused"},
        },
        [],
        "the number of tokens varies",
    ),
    "probe-loops-overlap": (
        {"sgt": {"top_loss": 0.1, "probe_interval": 1, "probe_loops": True}},
        ["--", "--overlap-grad-reduce"],
        "a loop's pass leaves weights without a gradient",
    ),
    "probe-instances": (
        {"sgt": {"top_loss": 0.1, "probe_interval": 1}},
        ["--", "--num-distributed-optimizer-instances", "2"],
        "gradients are not summed over 2",
    ),
    "skipped-head-teacher": (
        {"sgt": {"top_loss": 0.1, "alpha": 1.0, "skip_head": True}, "distillation": {"config": "c", "load": "l"}},
        [],
        "take distillation out",
    ),
    "probe": ({"sgt": {"top_loss": 0.1, "probe_interval": -1}}, [], "0 is never"),
    "probe-loops": ({"sgt": {"top_loss": 0.1, "probe_loops": True}}, [], "needs sgt.probe_interval"),
    "negative-prefix": ({"data": {"prefix": -1}}, [], "data.prefix -1 is negative"),
    "shuffle": ({"data": {"shuffle": "letters"}}, [], "is not one of none, tokens, words"),
    "rank-of-more-than-the-weights": (
        {"recurrence": {"loop_rank": 33}},
        [],
        "is more than megatron.hidden-size 32",
    ),
    "graph-of-layers": ({"megatron": {"cuda-graph-impl": "local"}}, [], "use full_iteration"),
    "graph-of-random-loops": (
        {"recurrence": {"random_loops": [1, 3]}, "megatron": {"cuda-graph-impl": "full_iteration"}},
        [],
        "it replays one step",
    ),
    "graph-of-a-ramp-up": (
        {"megatron": {"cuda-graph-impl": "full_iteration", "rampup-batch-size": [4, 4, 100]}},
        [],
        "it replays as many micro-batches",
    ),
    "graph-over-stages": (
        {"megatron": {"cuda-graph-impl": "full_iteration", "pipeline-model-parallel-size": 2}},
        [],
        "has not been tried over pipeline stages",
    ),
    "graph-by-an-older-name": ({"megatron": {"enable-cuda-graph": True}}, [], "use cuda-graph-impl full_iteration"),
    "graph-of-short-sequences": ({"megatron": {"cuda-graph-impl": "full_iteration"}}, [], "use longer sequences"),
    "graph-without-a-gpu": (
        {"megatron": {"cuda-graph-impl": "full_iteration", "attention-backend": "unfused"}},
        [],
        "needs a GPU; take it out",
    ),
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
    "underscores-too": ({"megatron": {"hidden_size": 64}}, [], "hidden-size is set twice"),
    "set-extends": ({}, ["--set", "extends=base_1b.yaml"], "only a file can extend another"),
    "run-that-is-a-number": ({}, ["--set", "run=123"], "as text (it is 123)"),
    "flags-that-are-no-list": ({"flags": "--seed 7"}, [], "`flags` must be a list of texts"),
    "flag-that-is-no-text": ({"flags": ["--seed", 7]}, [], "`flags` must be a list of texts"),
    "unknown-flag-of-a-file": ({"flags": ["--train-itres", "3"]}, [], "did you mean 'train-iters'"),
    "list-for-one-value": ({}, ["--set", "megatron.split=[90,8,2]"], "it takes one value, without brackets"),
    "list-for-one-number": ({"megatron": {"lr": [1, 2]}}, [], "megatron.lr is [1, 2]; it takes one value"),
    "set-that-is-not-yaml": ({}, ["--set", "evaluation.loops=[1,2"], "expected a list of whole numbers"),
    **{
        f"{flag}-zero": ({"megatron": {flag: 0}}, [], f"set megatron.{flag} to a positive number (it is 0)")
        for flag in (
            "micro-batch-size",
            "global-batch-size",
            "train-iters",
            "log-interval",
            "eval-interval",
            "eval-iters",
            "save-interval",
            "kv-channels",
        )
    },
    "negative-batch": ({"megatron": {"global-batch-size": -16}}, [], "a positive number (it is -16)"),
    "no-samples": ({"megatron": {"train-iters": None, "train-samples": 0}}, [], "set megatron.train-samples"),
    "no-length": ({"megatron": {"train-iters": None}}, [], "set megatron.train-iters"),
    "no-save-interval": ({"megatron": {"save-interval": None}}, [], "set megatron.save-interval"),
    "lr-that-is-no-number": ({}, ["--set", "megatron.lr=nan"], "not negative (it is nan)"),
    "no-lr": ({}, ["--set", "megatron.lr="], "not negative (it is None)"),
    **{
        f"negative-{flag}": ({"megatron": {flag: value}}, [], f"set megatron.{flag} to a finite number that is not")
        for flag, value in {
            "lr": float("-inf"),
            "min-lr": -1e-5,
            "clip-grad": -1.0,
            "weight-decay": -0.1,
            "lr-warmup-iters": -2,
        }.items()
    },
    "min-lr-above-lr": ({"megatron": {"min-lr": 1}}, [], "min-lr 1.0 is more than lr"),
    "sequence-too-long": ({"megatron": {"seq-length": 64}}, [], "is more than max-position-embeddings 32"),
    "odd-heads": ({"megatron": {"kv-channels": 7}}, [], "heads of size 7"),
    "odd-heads-by-hidden-size": ({"megatron": {"num-attention-heads": 32}}, [], "heads of size 1"),
    "two-activations": ({}, ["--", "--squared-relu"], "squared-relu and megatron.swiglu exclude each other"),
    "split-that-is-none": ({"megatron": {"split": "foo"}}, [], "'foo' must be three shares"),
    "split-of-two": ({"megatron": {"split": "90,10"}}, [], "must be three shares"),
    "split-that-is-negative": ({"megatron": {"split": "90,-8,2"}}, [], "must be three shares"),
    "split-without-validation": ({"megatron": {"split": "100,0,0"}}, [], "nothing to train on or to validate on"),
    "split-with-an-empty-share": ({"megatron": {"split": "969,30,1"}}, [], "none of the 300 documents"),
    "no-split": ({"megatron": {"split": None}}, [], "set megatron.split"),
    "sgd": ({}, ["--", "--optimizer", "sgd"], "--optimizer must be adam"),
    **{
        f"unsupported-{flag}": ({}, ["--", f"--{flag}", *value], f"megatron.{flag}: {why}")
        for flag, value, why in (
            ("init-method-xavier-uniform", (), "initial weights"),
            ("full-validation", (), "the held-out loss"),
            ("yaml-cfg", ("x",), "a configuration is"),
            ("mtp-detach-heads", (), "what is predicted ahead trains the whole model"),
            ("multi-latent-attention", (), "the attention is built"),
            ("apply-layernorm-1p", (), "the norms are built"),
            ("quick-geglu", (), "the MLP is built"),
            ("mock-data", (), "training reads"),
            ("per-split-data-args-path", ("x",), "what it names"),
        )
    },
    "mtp-num-layers": ({"megatron": {"mtp-num-layers": 1}}, [], "mtp-num-layers follows from `mtp.depths`"),
    "mtp-loss-scaling-factor": ({}, ["--", "--mtp-loss-scaling-factor", "0.1"], "follows from `mtp.weight`"),
    "mtp-in-the-pattern": ({"recurrence": {"pattern": "*-/*-"}}, [], "set by mtp.depths; take out '/'"),
    "mtp-negative": ({"mtp": {"depths": -1}}, [], "mtp.depths is -1; use a positive number"),
    "mtp-without-weight": ({"mtp": {"depths": 1, "weight": 0}}, [], "to go without: mtp.depths 0"),
    "mtp-too-deep": ({"mtp": {"depths": 32}}, [], "mtp.depths 32 is not less than seq-length 32; use fewer"),
    "mtp-without-a-head": (
        {"mtp": {"depths": 1}, "sgt": {"marks": "some", "alpha": 1.0, "skip_head": True}},
        [],
        "sgt.skip_head does not go with mtp.depths 1",
    ),
    "mtp-with-tied-matrices-over-stages": (
        {
            "mtp": {"depths": 1},
            "megatron": {"untie-embeddings-and-output-weights": False, "pipeline-model-parallel-size": 2},
        },
        [],
        "does not go with mtp.depths 1: of 2 pipeline stages",
    ),
    "missing-number": ({"megatron": {"hidden-size": None}}, [], "set megatron.hidden-size"),
    "warmup-too-long": ({"megatron": {"lr-warmup-iters": 20}}, [], "lr-warmup-iters 20"),
    "switch-with-value": ({"megatron": {"swiglu": "yes please"}}, [], "it is a switch"),
    "not-a-number": ({"megatron": {"lr": "fast"}}, [], "lr"),
    "bad-set": ({}, ["--set", "recurrence.loops"], "section.key=value"),
    "absurd-loops": ({"recurrence": {"loops": 100_000}}, [], "recurrence.loops is 100000, which makes 200002 eff"),
    "absurd-pattern": ({"recurrence": {"pattern": "*-[*-]x999999999"}}, [], "1000000000 effective layers are more"),
    "absurd-batches": ({"evaluation": {"batches": 10**8}}, [], "evaluation.batches 100000000 is more than 10000;"),
    "evaluation-loops": ({"evaluation": {"loops": [0]}}, [], "must be positive"),
    "batch-does-not-divide": ({"megatron": {"global-batch-size": 7}}, [], "global-batch-size 7"),
    "small-vocabulary": ({"megatron": {"padded-vocab-size": 256}}, [], "padded-vocab-size 256"),
    "missing-data": ({"megatron": {"data-path": ["nowhere/text"]}}, [], "nowhere/text"),
    "no-data": ({"megatron": {"data-path": None}}, [], "set megatron.data-path"),
    "empty-data": ({}, ["--set", "megatron.data-path="], "set megatron.data-path"),
    "missing-validation-data": (
        {"megatron": {"valid-data-path": ["1", "nowhere/v"]}},
        [],
        "valid-data-path nowhere/v",
    ),
    "missing-data-list": ({"megatron": {"data-args-path": "nowhere.txt"}}, [], "data-args-path nowhere.txt"),
    "rope-that-is-not-built": ({"megatron": {"rotary-percent": 0.5}}, [], "rotary-percent"),
    "missing-tokenizer": ({"megatron": {"tokenizer-model": "nowhere"}}, [], "nowhere"),
    "missing-checkpoint": ({"megatron": {"load": "nowhere"}}, [], "megatron.load: nowhere does not exist; cor"),
    "no-checkpoint-there": ({"megatron": {"load": "."}}, [], "megatron.load: .: no checkpoint there"),
    "context-parallel": ({"megatron": {"context-parallel-size": 2}}, [], "context-parallel-size 2"),
    "recompute-block": (
        {"megatron": {"recompute-granularity": "full", "recompute-method": "block", "recompute-num-layers": 1}},
        [],
        "a loop at a time",
    ),
    "transformer-engine-on-cpu": (
        {},
        ["--", "--transformer-impl", "transformer_engine"],
        "transformer-impl transformer_engine is not usable here",
    ),
    "layers-for-inference": ({"megatron": {"transformer-impl": "inference_optimized"}}, [], "is not usable here"),
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


def check_configuration(tmp_path: Path, write_config, sections: dict, arguments: list[str], says: str) -> None:
    path = write_config(tmp_path, **sections)
    content = yaml.safe_load(path.read_text())
    for key in set(sections) - set(content):
        content[key] = sections[key]
    path.write_text(yaml.safe_dump(content))
    check(tmp_path, ["pretrain", "--config", str(path), *arguments], says)


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration(name, tmp_path: Path, write_config):
    check_configuration(tmp_path, write_config, *CONFIGS[name])


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_data(suffix, tmp_path: Path, data: Path, write_config):
    for path in data.glob("text.*"):
        shutil.copy(path, tmp_path)
    os.truncate(tmp_path / f"text{suffix}", 100)
    path = write_config(tmp_path, megatron={"data-path": [str(tmp_path / "text")]})
    check(tmp_path, ["pretrain", "--config", str(path)], f"text{suffix} has 100 bytes, not ")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--data-path DATA --train-data-path DATA", "data-path and megatron.train-data-path are both set"),
        ("--split 90,8,2 --train-data-path DATA --valid-data-path DATA", "split 90,8,2 does not go with"),
        ("--train-data-path DATA", "train-data-path needs megatron.valid-data-path"),
    ],
)
def test_sources_that_do_not_go_together(flags, says, tmp_path: Path, data: Path, write_config):
    path = write_config(tmp_path, megatron={"data-path": None, "split": None})
    flags = flags.replace("DATA", str(data / "text"))
    check(tmp_path, ["pretrain", "--config", str(path), "--", *flags.split()], says)


def test_missing_configuration(tmp_path: Path):
    check(tmp_path, ["pretrain", "--config", "none.yaml"], "cannot read the configuration none.yaml")


def test_configuration_that_is_not_yaml(tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("run: [1\nmegatron: {")
    check(tmp_path, ["params", "bad.yaml"], "bad.yaml, line 2: not valid YAML")


def test_key_that_stands_twice(tmp_path: Path):
    (tmp_path / "twice.yaml").write_text("run: a\nmegatron:\n  lr: 1.0\n  seed: 1\n  lr: 2.0\n")
    check(tmp_path, ["params", "twice.yaml"], "twice.yaml, line 5: not valid YAML (the key 'lr' stands twice")


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


def test_text_in_another_encoding(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes("나는 학교에 갑니다".encode("cp949"))
    arguments = ["tokenizer", "--input", "a.txt", "--output", "t", "--vocab-size", "300"]
    check(tmp_path, arguments, "no text to train a tokenizer on; the first malformed line is a.txt:1: not UTF-8")


@pytest.mark.parametrize("output", [".", "folder", "new/"])
def test_output_that_is_a_folder(output, tmp_path: Path, data: Path):
    (tmp_path / "a.txt").write_text("글")
    (tmp_path / "folder").mkdir()
    arguments = ["data", "--input", "a.txt", "--output", output, "--tokenizer", str(data / "tokenizer")]
    check(tmp_path, arguments, f"--output {output} is a folder")


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
