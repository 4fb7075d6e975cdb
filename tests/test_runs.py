"""A run's folder: what may start in it, and what it goes on from."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cherry_megatron.monitor.alarms import read_alarms
from cherry_megatron.runs import read_steps, record_saved_step
from cherry_megatron.storage.ancestry import describe
from cherry_megatron.storage.fallback import newest_whole
from cherry_megatron.storage.integrity import damage
from tests.conftest import run_ranks
from tests.test_bad_input import verb

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_config, train) -> Path:
    """A configuration whose run has the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_config(folder, megatron={"save-interval": 2})
    train(path, flags="--train-iters 4")
    return path


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """The same run in a folder of its own."""
    shutil.copytree(trained.parent / "run", tmp_path / "run")
    content = yaml.safe_load(trained.read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**content, "run": str(tmp_path / "run")}))
    return tmp_path / "config.yaml"


def pretrain(path: Path, *arguments: str) -> tuple[int, str]:
    command = ["pretrain", "--config", str(path), *arguments]
    ((status, errors),) = run_ranks(path.parent / "output", 1, verb, path.parent, command)
    return status, errors


def refused(path: Path, *arguments: str) -> str:
    """The sentence; nothing in the run's folder but logs may have changed."""
    before = contents(path.parent / "run")
    status, errors = pretrain(path, *arguments)
    lines = [line for line in errors.splitlines() if line.startswith("cherry ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in errors, errors
    assert contents(path.parent / "run") == before
    return lines[0]


def contents(run: Path) -> dict[str, int]:
    files = [file for part in ("*", "checkpoints/**/*") for file in run.glob(part) if file.is_file()]
    return {str(file): file.stat().st_mtime_ns for file in files if file.name != "lock"}


@pytest.mark.parametrize("content", ["foo", "", "9" * 5000, "\x00\xff"])
def test_a_tracker_that_names_no_checkpoint_is_refused(copy, content):
    (copy.parent / "run/checkpoints" / TRACKER).write_text(content)
    assert "there are iter_0000002, iter_0000004" in refused(copy)


def test_checkpoints_without_a_tracker_are_not_written_over(copy):
    (copy.parent / "run/checkpoints" / TRACKER).unlink()
    sentence = refused(copy)
    assert f"checkpoints holds iter_0000004, but {TRACKER} is missing; write the number" in sentence
    assert f"{copy.parent}/run/checkpoints/{TRACKER}, or choose another run" in sentence
    for whole in (copy.parent / "run/checkpoints").glob("iter_*/integrity.json"):
        whole.unlink()
    assert "holds iter_0000004 without integrity.json" in refused(copy)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(copy):
    saved = copy.parent / "run/checkpoints"
    shutil.rmtree(saved)
    (copy.parent / "run/saves.jsonl").write_text('{"time": "')  # of a save that was killed
    record_saved_step(copy.parent / "run", 4)
    assert f"has saved a checkpoint of step 4, and now there is none; restore {saved}" in refused(copy)
    saved.touch()
    assert f"cannot write the run's folder {saved}: {saved} is not a folder; choose another" in refused(copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("recurrence.order=sequence", "recurrence.order 'cycle', not 'sequence'"),
        ("recurrence.loop_scales=false", "recurrence.loop_scales True, not False"),
        ("recurrence.injection=add", "recurrence.injection 'none', not 'add'"),
        ("recurrence.pattern='*-[*-*-*-]x3*-'", "recurrence.pattern '*-[*-*-]x3*-'"),
        ("megatron.ffn-hidden-size=96", "megatron.ffn-hidden-size 64, not 96"),
    ],
)
def test_another_model_does_not_go_on_in_the_same_run(copy, change, says):
    assert says in refused(copy, "--set", change)


@pytest.mark.parametrize("flag", ["--finetune", "--load nowhere", "--no-load-optim"])
def test_flags_that_would_undo_a_resume_are_refused(copy, flag):
    assert f"{flag.split()[0]} would undo every resume" in refused(copy, "--", *flag.split())


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("__0_0.distcp", _flip),
        ("__0_0.distcp", lambda path: os.truncate(path, 1000)),
        ("__0_0.distcp", Path.unlink),
        ("metadata.json", lambda path: path.write_text("{}")),
        ("integrity.json", Path.unlink),
        (".metadata", _flip),
    ],
)
def test_a_damaged_checkpoint_is_one_sentence_that_names_the_file_and_the_older_one(copy, file, damage):
    damage(copy.parent / "run/checkpoints/iter_0000004" / file)
    later = copy.parent / "run/checkpoints/iter_0000006"  # its save was killed
    later.mkdir()
    shutil.copy(copy.parent / "run/checkpoints/iter_0000002/.metadata", later)
    sentence = refused(copy, "--set", "checkpoints.fall_back=false", "--", "--train-iters", "6")
    assert "iter_0000004" in sentence and file in sentence
    tracker = copy.parent / "run/checkpoints" / TRACKER
    assert "restore " in sentence
    assert f", or go back to iter_0000002: write its number into {tracker}" in sentence


def _shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


FILES = (
    ".metadata", "__0_0.distcp", "integrity.json", "lineage.json", "manifest.json", "metadata.json",
)  # fmt: skip
WAYS = {"flip": _flip, "shorten": _shorten, "remove": Path.unlink}
SAMPLE = [("__0_0.distcp", "flip"), (".metadata", "remove")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("file", FILES)
def test_every_damage_is_detected(file, way, copy):
    """The sum of what is looked at before ranks have found each other, and of what is when they have."""
    saved = copy.parent / "run/checkpoints"
    assert {path.name for path in (saved / "iter_0000004").iterdir()} == {*FILES}
    assert newest_whole(saved).name == "iter_0000004" and damage(saved / "iter_0000004") is None
    WAYS[way](saved / "iter_0000004" / file)
    assert file in str(damage(saved / "iter_0000004")) or "integrity.json is damaged" in str(
        damage(saved / "iter_0000004")
    )
    assert file == "__0_0.distcp" or newest_whole(saved).name == "iter_0000002"


def test_no_byte_of_the_list_of_hashes_can_change_unseen(copy):
    """Not even one that leaves it a list of other files."""
    path = copy.parent / "run/checkpoints/iter_0000004/integrity.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert damage(path.parent) is not None, place


def falls_back(copy: Path, file: str, way: str, train) -> None:
    saved = copy.parent / "run/checkpoints"
    WAYS[way](saved / "iter_0000004" / file)
    damaged = {path.name: path.read_bytes() for path in (saved / "iter_0000004").iterdir()}
    before = [step["loss"] for step in read_steps(copy.parent / "run")]
    steps = train(copy, flags="--train-iters 6")
    assert [step["iteration"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step["loss"] for step in steps[:4]] == before  # steps 3 and 4 were trained anew
    said = (copy.parent / "output/rank0.out").read_text()
    (warning,) = [line for line in said.splitlines() if line.startswith("WARNING")]
    assert "iter_0000004 is damaged" in warning and "the run falls back to step 2" in warning
    assert file in warning or "integrity.json is damaged" in warning
    (alarm,) = read_alarms(copy.parent / "run")
    assert (alarm["kind"], alarm["iteration"]) == ("fallback", 2) and warning == f"WARNING: {alarm['text']}"
    assert f"goes on from step 2, {saved}/iter_0000002" in said
    aside = {path.name: path.read_bytes() for path in (saved / "broken-iter_0000004").iterdir()}
    assert aside == damaged and damage(saved / "iter_0000004") is None
    assert (saved / TRACKER).read_text() == "6"


@pytest.mark.parametrize(("file", "way"), SAMPLE)
def test_a_run_falls_back_to_the_newest_checkpoint_that_is_whole(file, way, copy, train):
    falls_back(copy, file, way, train)


REST = [(file, way) for file in FILES for way in WAYS if (file, way) not in SAMPLE]


@pytest.mark.full
@pytest.mark.parametrize(("file", "way"), REST)
def test_a_run_falls_back_matrix(file, way, copy, train):
    falls_back(copy, file, way, train)


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("file", FILES)
def test_a_run_stops_matrix(file, way, copy):
    WAYS[way](copy.parent / "run/checkpoints/iter_0000004" / file)
    sentence = refused(copy, "--set", "checkpoints.fall_back=false", "--", "--train-iters", "6")
    assert file in sentence or "integrity.json is damaged" in sentence
    assert "go back to iter_0000002" in sentence


def test_a_checkpoint_that_is_gone_is_fallen_back_from_and_a_run_without_one_stops(copy, train):
    saved = copy.parent / "run/checkpoints"
    shutil.rmtree(saved / "iter_0000004")
    assert [step["iteration"] for step in train(copy, flags="--train-iters 3")] == [1, 2, 3, 4]
    (alarm,) = read_alarms(copy.parent / "run")
    assert alarm["text"] == f"{saved}/iter_0000004 is missing; the run falls back to step 2"
    for name in ("iter_0000002", "iter_0000003"):
        _flip(saved / name / "__0_0.distcp")
    sentence = refused(copy, "--", "--train-iters", "6")
    assert "iter_0000003/__0_0.distcp is not what was saved" in sentence
    assert "no older checkpoint of the run is whole" in sentence
    for name in ("iter_0000002", "iter_0000003"):
        (saved / name / ".metadata").unlink()
    assert "no older checkpoint of the run is whole" in refused(copy, "--", "--train-iters", "6")


def test_a_tracker_that_names_a_step_before_all_checkpoints_is_told_what_there_is(copy):
    (copy.parent / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("0")
    sentence = refused(copy, "--", "--train-iters", "6")
    assert "says '0', which is no checkpoint beside it; there are iter_0000002" in sentence


def _loses_its_tracker(path: Path) -> tuple[int, str]:
    """When all is verified and Megatron is to load."""
    from cherry_megatron.platform import loading

    load = loading._load_checkpoint

    def load_then(*args, **kwargs):
        (path.parent / "run/checkpoints" / TRACKER).unlink()
        return load(*args, **kwargs)

    loading._load_checkpoint = load_then
    return verb(path.parent, ["pretrain", "--config", str(path), "--", "--train-iters", "6"])


def test_what_is_gone_when_it_is_loaded_is_no_start_from_new_weights(copy):
    ((status, errors),) = run_ranks(copy.parent / "output", 1, _loses_its_tracker, copy)
    assert status == 2 and "Traceback" not in errors
    assert "what was loaded is of step 0, not " in errors and "iter_0000004, which was verified" in errors
    assert [step["iteration"] for step in read_steps(copy.parent / "run")] == [1, 2, 3, 4]


def test_a_verb_that_reads_does_not_choose_another_checkpoint(copy):
    _flip(copy.parent / "run/checkpoints/iter_0000004/__0_0.distcp")
    command = ["evaluate", "--config", str(copy), "--", "--train-iters", "4"]
    ((status, errors),) = run_ranks(copy.parent / "output", 1, verb, copy.parent, command)
    assert status == 2 and "go back to iter_0000002" in errors and "Traceback" not in errors


def test_going_back_to_an_older_checkpoint_is_possible(copy, train):
    (copy.parent / "run/checkpoints" / TRACKER).write_text("2")
    assert [step["iteration"] for step in train(copy, flags="--train-iters 5")] == [1, 2, 3, 4, 5]


def test_a_run_says_where_it_starts_and_when_it_saves(copy):
    others = ["--set", "recurrence.loops=4", "--set", "megatron.seed=77"]
    status, _ = pretrain(copy, *others, "--", "--train-iters", "6")
    printed = (copy.parent / "output/rank0.out").read_text()
    assert status == 0
    start = f"goes on from step 4, {copy.parent}/run/checkpoints/iter_0000004"
    changes = ", with megatron.seed 77 for 1234, with recurrence.loops 4 for 3"
    assert f"{start}{changes}; loops above 3 use the vectors of loop 3\n" in printed
    assert f"step       6  checkpoint written to {copy.parent}/run/checkpoints/iter_0000006" in printed
    pretrain(copy, "--", "--train-iters", "6")
    assert "is at step 6 of 6 already" in (copy.parent / "output/rank0.out").read_text()


def test_a_second_training_is_kept_out_of_the_folder(copy):
    command = [sys.executable, "-m", "cherry_megatron.cli", "pretrain", "--config", str(copy), "--"]
    first = subprocess.Popen(
        [*command, "--train-iters", "100000"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert first.stdout is not None and b"goes on from step 4" in first.stdout.readline()
        status, errors = pretrain(copy, "--", "--train-iters", "6")
        assert status == 2 and "another training writes to" in errors and "Traceback" not in errors
    finally:
        first.send_signal(signal.SIGTERM)
        first.wait(timeout=120)


def _starts_unchanged(path: Path, load: str | None) -> str:
    from argparse import Namespace

    from cherry_megatron.checkpoints import unchanged_start
    from cherry_megatron.config import load as load_config
    from cherry_megatron.errors import CherryError

    try:
        unchanged_start(load_config(path), Namespace(load=load))
    except CherryError as error:
        return str(error)
    return ""


def test_a_checkpoint_that_came_while_a_training_started_is_not_written_over(copy):
    """The start was planned when the run was empty; the first training has saved and ended since."""
    own = str(copy.parent / "run/checkpoints")
    ((planned_anew),) = run_ranks(copy.parent / "a", 1, _starts_unchanged, copy, None)
    ((planned_to_resume),) = run_ranks(copy.parent / "b", 1, _starts_unchanged, copy, own)
    assert "got a checkpoint while this training started" in planned_anew and not planned_to_resume


def test_a_finished_run_that_is_started_again_records_no_other_step(copy, train):
    train(copy, flags="--train-iters 4")
    lines = (copy.parent / "run/evaluations.jsonl").read_text().splitlines()
    assert {json.loads(line)["iteration"] for line in lines} == {4}


def test_half_a_line_that_a_kill_left_is_closed(copy, train):
    with (copy.parent / "run/steps.jsonl").open("a") as file:
        file.write('{"iteration": 5, "lo')
    assert [step["iteration"] for step in train(copy, flags="--train-iters 6")] == [1, 2, 3, 4, 5, 6]


def test_evaluation_says_when_it_holds_out_other_text(copy):
    command = ["evaluate", "--config", str(copy), "--", "--train-iters", "4"]
    ((status, errors),) = run_ranks(copy.parent / "output", 1, verb, copy.parent, command)
    assert status == 0 and "from training" not in errors
    recorded = (copy.parent / "run/evaluations.jsonl").read_text()
    command[-2:] = ["--split", "70,20,10"]
    ((status, errors),) = run_ranks(copy.parent / "output", 1, verb, copy.parent, command)
    assert status == 0 and "note: split differs from training" in errors
    assert (copy.parent / "run/evaluations.jsonl").read_text() == recorded


def test_every_checkpoint_carries_its_lineage(copy, train):
    checkpoint = copy.parent / "run/checkpoints/iter_0000004"
    lineage = json.loads((checkpoint / "lineage.json").read_text())
    assert lineage["operation"] == "pretrain" and lineage["iteration"] == 4 and not lineage["parents"]
    assert lineage["config"]["recurrence"]["pattern"] == "*-[*-*-]x3*-" and lineage["data"][0]["report"]
    # A later checkpoint of the same run has the same parents, not the earlier checkpoint.
    train(copy, flags="--train-iters 6")
    assert len(describe(copy.parent / "run", verify=True)) == 1
