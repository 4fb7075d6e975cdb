"""A calibration says what it lacks, and writes nothing that was not measured."""

import sys

import pytest
import yaml


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
        script.main()
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
