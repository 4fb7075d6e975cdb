"""A calibration says what it lacks, and writes nothing that was not measured."""

import argparse
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from cherry_megatron.platform.leaving import AGAIN


@pytest.fixture
def calibrate(benchmark_script, tmp_path, monkeypatch):
    """Run it as if these trainings had been measured; returns the coefficients that it writes."""
    script = benchmark_script("calibrate_planner")

    def run(names, with_links=True):
        def measure(self, trainings):
            for name in names:
                self.found[name] = {"seconds": 1.0, "gib": 0.0}

        monkeypatch.setattr(script, "operations", lambda options, gpus: {"collectives": [[]] * with_links})
        monkeypatch.setattr(script, "fit", lambda start, *measured: start)
        monkeypatch.setattr(script, "prepare", lambda: None)
        monkeypatch.setattr(script.Measuring, "run", measure)
        output = tmp_path / "coefficients.yaml"
        given = ["--tokenizer", "t", "--data", "d", "--work", str(tmp_path / "work"), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["calibrate_planner.py", *given, "--tiny"])
        assert script.main() == 0
        return yaml.safe_load(output.read_text())["h100"]

    return run


def test_a_calibration_in_which_nothing_ran_writes_nothing(calibrate, tmp_path):
    with pytest.raises(SystemExit, match="none of the trainings ran"):
        calibrate([])
    assert not (tmp_path / "coefficients.yaml").exists()


def test_what_is_missing_is_said_and_is_no_calibration(calibrate, benchmark_script):
    every = list(benchmark_script("calibrate_planner").CALIBRATED)
    whole = calibrate(every)
    assert whole["calibrated"] and "without" not in whole["source"]
    part = calibrate(every[:-1], with_links=False)
    assert not part["calibrated"] and part["source"].endswith("without TP=2 and collectives")


def test_ranks_of_one_host_meet_where_nobody_else_does(benchmark_script):
    program = benchmark_script("pretraining").program
    assert program(1) == [sys.executable]
    assert program(2)[-1] != program(2)[-1]


def test_what_time_did_not_allow_is_for_another_start(benchmark_script, tmp_path, monkeypatch):
    script = benchmark_script("calibrate_planner")
    given = {"work": tmp_path, "steps": 2, "limit": 100.0}
    some = {"one": script.CALIBRATED["eager"]}
    for seconds, steps, late in ((1e6, [], False), (1.0, [], True), (1e6, [{"seconds": 1.0}] * 2, False)):
        measuring = script.Measuring(argparse.Namespace(**given, seconds=seconds), 1)
        monkeypatch.setattr(measuring, "_train", lambda *_, steps=steps: steps)
        measuring.run(some)
        assert measuring.late == late and bool(measuring.missed) == (not steps)
    measuring.until = time.monotonic()
    measuring.fail("two", "1 of 2 steps")
    assert measuring.late, "time was up in the middle of it"


def test_a_calibration_to_be_continued_says_so_by_its_status(benchmark_script, tmp_path, monkeypatch):
    script = benchmark_script("calibrate_planner")
    monkeypatch.setattr(script, "prepare", lambda: None)
    given = ["--tokenizer", "t", "--data", "d", "--work", str(tmp_path / "work"), "--only-check", "--seconds", "0"]
    given += ["--check", str(tmp_path / "check.md"), "--output", str(tmp_path / "coefficients.yaml"), "--tiny"]
    (tmp_path / "coefficients.yaml").write_text(script.FILE.read_text())
    monkeypatch.setattr(sys, "argv", ["calibrate_planner.py", *given])
    assert script.main() == AGAIN


RANKS = """
import subprocess, time
subprocess.Popen(["sleep", "300"], start_new_session=True)
print(flush=True)
time.sleep(300)
"""


def test_ranks_in_sessions_of_their_own_are_ended_too(benchmark_script):
    end = benchmark_script("pretraining").end
    with subprocess.Popen([sys.executable, "-c", RANKS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (rank,) = psutil.Process(process.pid).children()
        end(process)
    rank.wait(10)
    assert not rank.is_running()
    end(process)  # once more is nothing


def test_a_training_that_takes_too_long_leaves_no_rank(benchmark_script, tmp_path, monkeypatch):
    """They hold the pipe that is read to its end."""
    script = benchmark_script("pretraining")
    monkeypatch.setattr(script, "program", lambda ranks: [sys.executable, "-c", RANKS])
    options = argparse.Namespace(tokenizer="t", data="d", steps=1, limit=1)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="failed with status -6"):
        script.train_in(tmp_path, "cherry_tiny", [], [], options, 2)
    assert time.monotonic() - began < 60
