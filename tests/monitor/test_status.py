"""`cherry status`: one screen from a run's folder alone."""

import datetime
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from cherry_megatron.cli import main
from cherry_megatron.errors import CherryError
from cherry_megatron.monitor.status import status
from cherry_megatron.storage.tracker import why_none


def shown(run: Path, verify: bool = False) -> str:
    return "\n".join(status(run, verify)[0])


def ago(seconds: float) -> str:
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)).isoformat(timespec="seconds")


def write_lines(path: Path, *lines: dict) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def step(iteration: int, loss: float | None, **more) -> dict:
    return {
        "iteration": iteration, "loss": loss, "grad_norm": 0.5, "learning_rate": 1e-3, "seconds": 0.25, **more
    }  # fmt: skip


@pytest.fixture
def run(tmp_path, write_config) -> Path:
    """A run of 20 steps of 8 x 32 tokens that went back from step 7 to 4, and is writing its step 7 again."""
    path = write_config(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(path, folder / "config.yaml")
    write_lines(folder / "steps.jsonl", *(step(i, 9.0 - i) for i in range(1, 8)))
    ranks = {"median": 0.1, "slowest": 0.2, "rank": 3}
    write_lines(folder / "steps.jsonl", step(5, 4.0, ranks=ranks), step(6, None, skipped="the loss is nan"))
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"iteration": 7, "lo')
    write_lines(folder / "evaluations.jsonl", {"iteration": 4, "losses": {"1": 5.5, "3": 5.25}})
    write_lines(folder / "starts.jsonl", {"time": ago(7300), "host": "one"})
    write_lines(folder / "starts.jsonl", {"time": ago(300), "host": "two", "world_size": 4})
    ended = {"event": "end", "job": "12", "decision": "requeue", "reason": "was told to stop, saved at step 4"}
    write_lines(folder / "attempts.jsonl", {"event": "start", "job": "12", "time": ago(7300)})
    write_lines(folder / "attempts.jsonl", {**ended, "time": ago(400)})
    write_lines(folder / "attempts.jsonl", {"event": "start", "job": "12", "time": ago(300)})
    alarms = ({"time": ago(60), "iteration": i, "kind": "skip", "text": f"alarm {i}"} for i in range(1, 8))
    write_lines(folder / "alarms.jsonl", *alarms)
    return folder


def test_a_run_on_one_screen(run, capsys):
    assert main(["status", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 25 and max(map(len, lines)) < 200
    found = {line.split("  ")[0]: line for line in lines if line[0] != " "}
    assert re.search(r"6 of 20 \(30.0%\), \d s ago", found["step"])
    assert "1,024 tokens/s, 0.25 s a step, left 3 s" in found["speed"]
    assert "4.0000, mean of the last 5 steps 6.0000" in found["loss"]
    assert "the slowest is 3: 0.2 s a step, the median 0.1 s" in found["ranks"]
    assert "at step 4  1: 5.5000  3: 5.2500" in found["held out"]
    assert "no checkpoint yet" in found["saved"]
    assert "2, the last 5 min ago on two, 4 rank(s)" in found["starts"]
    text = "\n".join(lines)
    assert "job 12, 6 min ago: requeue, was told to stop, saved at step 4" in text
    assert "job 12, 5 min ago: started, has not ended" in text
    assert "alarm 2" not in text and re.search(r"step 3, 6\d s ago: alarm 3", text) and "and 2 before" in text


def test_a_run_that_has_just_begun(tmp_path, write_config):
    write_config(tmp_path)
    text = shown(tmp_path)
    assert "none yet of 20" in text and "not evaluated yet" in text and "none recorded" in text


def test_a_start_that_was_refused_is_told_by_the_record_of_its_job(tmp_path):
    begun = {"event": "start", "verb": "pretrain", "job": "7", "start": 0, "step": 0, "time": ago(600)}
    ended = {"event": "end", "job": "7", "start": 0, "decision": "stop", "reason": "refused, see the ranks' logs"}
    write_lines(tmp_path / "attempts.jsonl", begun, {**ended, "time": ago(590)})
    text = shown(tmp_path)  # without a config.yaml
    assert "job 7, 9 min ago: stop, refused, see the ranks' logs" in text and "none yet" in text


def test_a_job_that_runs_is_told_from_one_that_was_lost(run):
    begun = {"event": "start", "verb": "pretrain", "start": 0, "step": 0}
    refused = {"event": "end", "verb": "pretrain", "job": "14", "start": 0, "decision": "stop", "reason": "refused"}
    write_lines(run / "attempts.jsonl", {**begun, "job": "13", "time": ago(240)})
    write_lines(run / "attempts.jsonl", {**begun, "job": "14", "time": ago(180)}, {**refused, "time": ago(170)})
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = shown(run).splitlines()
        assert lines[1].split() == ["running"]
        assert any(line.endswith("job 13, 4 min ago: started, has not ended") for line in lines)
        assert any("job 14, 2 min ago: stop, refused" in line for line in lines)
    text = shown(run)
    assert "not running" in text and "job 13, 4 min ago: started, has not ended; nothing runs now" in text


def test_checkpoints_that_do_not_count_or_are_gone_are_not_called_none_yet(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    next(checkpoints.glob("latest*")).unlink()
    assert f"WARNING: {why_none(checkpoints)}" in shown(tmp_path / "run")
    with (tmp_path / "run/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "no checkpoint yet: iter_0000002 is being saved" in shown(tmp_path / "run")
    shutil.rmtree(checkpoints)
    assert "has saved a checkpoint of step 2, and now there is none; restore" in shown(tmp_path / "run")
    (tmp_path / "run/saves.jsonl").unlink()
    assert "no checkpoint yet" in shown(tmp_path / "run")


def test_a_truncated_file_is_seen_by_its_size_and_what_a_start_does_is_told(saved, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    shutil.copytree(checkpoints / "iter_0000002", checkpoints / "iter_0000001")
    file = checkpoints / "iter_0000002/__0_0.distcp"
    os.truncate(file, file.stat().st_size // 2)
    assert main(["status", str(tmp_path / "run")]) == 0 and main(["status", str(tmp_path / "run"), "--verify"]) == 2
    for text in capsys.readouterr().out.split("run       ")[1:]:
        assert f"damaged: {file} is truncated" in text and "2 of 2 (100.0%)" in text
        assert "a start falls back to the newest older one that is whole, iter_0000001" in text
    # Of the older one the hashes are compared too where those of the newest are.
    _flip(checkpoints / "iter_0000001/__0_0.distcp")
    assert "as far as its sizes tell" in shown(tmp_path / "run")
    lines, undamaged = status(tmp_path / "run", verify=True)
    assert not undamaged and "no older checkpoint of the run is whole, so a start stops" in "\n".join(lines)


def test_a_checkpoint_outside_of_a_run_is_verified(saved, tmp_path, capsys):
    shutil.copytree(saved / "checkpoints", folder := tmp_path / "taken")
    assert main(["status", str(folder), "--verify"]) == 0
    assert "no run's folder" in (said := capsys.readouterr().out) and "verified: every tensor" in said
    _flip(folder / "iter_0000002/__0_0.distcp")
    assert main(["status", str(folder)]) == 0 and main(["status", str(folder), "--verify"]) == 2
    assert f"damaged: {folder}/iter_0000002/__0_0.distcp" in capsys.readouterr().out


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, write_config, train) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    train(write_config(folder, megatron={"train-iters": 2, "lr-warmup-iters": 0}))
    return folder / "run"


def test_the_newest_checkpoint_and_its_hashes(saved, tmp_path):
    assert "step 2, " in (text := shown(saved)) and "--verify compares them" in text
    assert "verified" in shown(saved, verify=True)
    shutil.copytree(saved, tmp_path / "run")
    (file,) = (tmp_path / "run/checkpoints/iter_0000002").glob("__0_0.distcp")
    _flip(file)
    status(tmp_path / "run")
    lines, undamaged = status(tmp_path / "run", verify=True)
    assert not undamaged and "2 of 2 (100.0%)" in (text := "\n".join(lines))
    assert (
        "saved     damaged: " in text and "iter_0000002/__0_0.distcp" in text and "restore the checkpoint" in text
    )
    assert "no older checkpoint of the run is whole" in text
    (tmp_path / "run/checkpoints/iter_0000002/.metadata").unlink()
    text = shown(tmp_path / "run")  # the rest is told all the same
    assert "damaged: " in text and ".metadata is missing" in text and "2 of 2 (100.0%)" in text


def test_what_no_training_wrote_is_one_sentence(saved, tmp_path):
    shutil.copytree(saved / "checkpoints", tmp_path / "small")
    record = tmp_path / "small/iter_0000002/lineage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "operation": "compress-depth"}))
    ((line,), _) = status(tmp_path / "small")
    assert f"{tmp_path}/small is a checkpoint made by cherry compress-depth, " in line and "cherry lineage" in line
    with pytest.raises(CherryError, match=r"is no run's folder: it has no config\.yaml yet"):
        status(tmp_path)
    with pytest.raises(CherryError, match="none is no run's folder: it does not exist"):
        status(tmp_path / "none")
