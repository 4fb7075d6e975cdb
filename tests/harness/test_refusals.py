"""What `cherry evaluate` refuses of its options, and what does without the harness."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cherry_megatron.cli import main
from cherry_megatron.errors import CherryError
from tests.harness.conftest import TASKS

RUN = ["--config", "c.yaml"]
# name: (arguments, what the line says)
OPTIONS = {
    "no-folder": ([*RUN, "--tasks", "kmmlu"], "--tasks needs --task-dir, the folder with the data of the tasks"),
    "no-configuration": (["--tasks", "kmmlu", "--task-dir", "."], "name a configuration"),
    "nothing": ([], "name a configuration"),
    "task-dir-alone": ([*RUN, "--task-dir", "."], "--task-dir belongs to --tasks or --compare; take it out"),
    "limit-alone": ([*RUN, "--limit", "3"], "--limit belongs to --tasks"),
    "changed-alone": ([*RUN, "--changed", "x"], "--changed belongs to --tasks or --compare"),
    "hf-alone": (["--hf", "x"], "--hf says which model; say what to ask it with --tasks"),
    "hf-and-config": ([*RUN, "--hf", "x", "--tasks", "a", "--task-dir", "."], "--config does not go with --hf"),
    "hf-and-loops": (["--hf", "x", "--loops", "2", "--tasks", "a"], "--loops does not go with --hf"),
    "hf-and-flags": (["--hf", "x", "--tasks", "a", "--", "--lr", "1"], "a flag after -- does not go with --hf"),
    "compare-and-tasks": (["--compare", "a", "b", "--tasks", "x"], "--tasks does not go with --compare"),
    "compare-and-set": (["--compare", "a", "b", "--set", "x=1"], "--set does not go with --compare"),
    "tasks-and-changed": ([*RUN, "--tasks", "a", "--changed", "x"], "--changed does not go with --tasks"),
    "compare-nothing": (["--compare", "a", "b"], "a holds no evaluation on tasks"),
    "empty-name": (["--hf", "x", "--tasks", "a,,b", "--task-dir", "."], "--tasks names no task, or an empty one"),
    "limit": (["--hf", "x", "--tasks", "a", "--task-dir", ".", "--limit", "0"], "--limit 0 must be a positive"),
    "fewshot": (
        ["--hf", "x", "--tasks", "a", "--task-dir", ".", "--fewshot", "-1"],
        "--fewshot -1 must not be neg",
    ),
    "no-model": (["--hf", "x", "--tasks", "a", "--task-dir", "."], "--hf x does not exist; name a folder with a"),
    "other-folder": (["--hf", ".", "--tasks", "a", "--task-dir", "."], "--hf . holds no config.json; name a fold"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, wanted = OPTIONS[name]
    if "--config" not in arguments and "--compare" not in arguments:
        pytest.importorskip("lm_eval")
    for variable in ("HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")  # put back afterwards
    if name in ("nothing", "no-configuration"):  # these would make this process ready for Megatron
        monkeypatch.setattr("cherry_megatron.platform.machine.prepare", lambda: None)
    assert main(["evaluate", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("cherry evaluate: ")
    assert said.count("\n") == 1
    assert wanted in said
    assert not list(tmp_path.iterdir())


def test_data_that_are_missing_are_told_before_anything_is_written(asked, cherry, tmp_path):
    run = tmp_path / "run"
    more = ("--set", f"run={run}", "--set", f"megatron.load={asked.parent}/run", "--set", "megatron.finetune=true")
    command = ("evaluate", "--config", asked, "--tasks", "kmmlu_accounting", "--task-dir", TASKS, *more)
    status, said = cherry(tmp_path / "out", *command)
    assert status == 2
    assert f"the data of the task kmmlu_accounting are not in {TASKS}: put test.jsonl, dev.jsonl" in said
    assert not run.exists()


def test_a_run_without_a_checkpoint(write_config, cherry, tmp_path):
    path = write_config(tmp_path)
    status, said = cherry(tmp_path / "out", "evaluate", "--config", path, "--tasks", "a", "--task-dir", TASKS)
    assert status == 2
    assert "has no checkpoint to evaluate; train it first" in said


def test_without_the_harness(monkeypatch):
    from cherry_megatron import harness

    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    with pytest.raises(
        CherryError, match=r"--tasks needs lm-eval; install it with pip install 'cherry-megatron\[ev"
    ):
        harness.require_harness()


def test_nothing_else_imports_it():
    code = (
        "import sys; import cherry_megatron.cli, cherry_megatron.harness.compare; "
        "assert not {'lm_eval', 'datasets', 'accelerate', 'torch'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    package = Path(__file__).parents[2] / "cherry_megatron"
    importing = {
        path.parent.name
        for path in package.rglob("*.py")
        if re.search(r"^\s*(import|from) lm_eval", path.read_text(), re.MULTILINE)
    }
    assert importing == {"harness"}
