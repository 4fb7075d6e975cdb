"""`cherry status`: one screen from a run's folder alone."""

import datetime
import json
import shutil
from pathlib import Path

import pytest

from cherry_megatron.cli import main
from cherry_megatron.errors import CherryError
from cherry_megatron.monitor.status import status


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
    assert "6 of 20 (30.0%), 0 s ago" in found["step"]
    assert "1,024 tokens/s, 0.25 s a step, left 3 s" in found["speed"]
    assert "4.0000, mean of the last 5 steps 6.0000" in found["loss"]
    assert "the slowest is 3: 0.2 s a step, the median 0.1 s" in found["ranks"]
    assert "at step 4  1: 5.5000  3: 5.2500" in found["held out"]
    assert "no checkpoint yet" in found["saved"]
    assert "2, the last 5 min ago on two, 4 rank(s)" in found["starts"]
    text = "\n".join(lines)
    assert "job 12, 6 min ago: requeue, was told to stop, saved at step 4" in text
    assert "job 12, 5 min ago: started, has not ended" in text
    assert "alarm 2" not in text and "step 3, 60 s ago: alarm 3" in text and "and 2 before" in text


def test_a_run_that_has_just_begun(tmp_path, write_config):
    write_config(tmp_path)
    text = "\n".join(status(tmp_path))
    assert "none yet of 20" in text and "not evaluated yet" in text and "none recorded" in text


@pytest.fixture(scope="module")
def saved(tmp_path_factory, write_config, train) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    train(write_config(folder, megatron={"train-iters": 2, "lr-warmup-iters": 0}))
    return folder / "run"


def test_the_newest_checkpoint_and_its_hashes(saved, tmp_path):
    assert "step 2, " in (text := "\n".join(status(saved))) and "--verify compares them" in text
    assert "verified" in "\n".join(status(saved, verify=True))
    shutil.copytree(saved, tmp_path / "run")
    (file,) = (tmp_path / "run/checkpoints/iter_0000002").glob("__0_0.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    status(tmp_path / "run")
    with pytest.raises(CherryError, match="iter_0000002"):
        status(tmp_path / "run", verify=True)
    (tmp_path / "run/checkpoints/iter_0000002/.metadata").unlink()
    text = "\n".join(status(tmp_path / "run"))  # the rest is told all the same
    assert "damaged: " in text and ".metadata is missing" in text and "2 of 2 (100.0%)" in text


def test_what_no_training_wrote_is_one_sentence(saved, tmp_path):
    shutil.copytree(saved / "checkpoints", tmp_path / "small")
    record = tmp_path / "small/iter_0000002/lineage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "operation": "compress-depth"}))
    (line,) = status(tmp_path / "small")
    assert f"{tmp_path}/small is a checkpoint made by cherry compress-depth, " in line and "cherry lineage" in line
    with pytest.raises(CherryError, match=r"is no run's folder: it has no config\.yaml yet"):
        status(tmp_path)
    with pytest.raises(CherryError, match="none is no run's folder: it does not exist"):
        status(tmp_path / "none")
