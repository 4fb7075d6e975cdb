"""A mixture of trained runs computes what they do."""

from pathlib import Path

import pytest

from cherry_megatron.cli import main
from cherry_megatron.storage.checkpoint import open_checkpoint

TOLERANCE = 1e-6


AHEAD = {"mtp": {"depths": 1}}


def test_experts_compute_what_their_runs_do(tmp_path: Path, write_config, write_mixture, train, capsys):
    """Each expert has the loss of its run; a mixture of one run has that run's loss, whoever sees a sequence.

    So have their depths.
    """
    from cherry_megatron.runs import read_evaluations

    loss, ahead = {}, {}
    for run in ("first", "second"):
        path = write_config(tmp_path / run, recurrence={"pattern": "*-[*-]x2"}, data={"prefix": 8}, **AHEAD)
        train(path, 1, f"--train-iters 3 --lr 0.01 --lr-warmup-iters 0 --seed {len(run)}")
        evaluation = read_evaluations(tmp_path / run / "run")[-1]
        loss[run], ahead[run] = evaluation["losses"]["2"], evaluation["mtp"]["2"]
    assert loss["first"] != pytest.approx(loss["second"], rel=1e-4)
    for name, runs, top_k in (("both", ["first", "second"], 2), ("alike", ["first", "first"], 1)):
        start = {"load": str(tmp_path / name / "assembled"), "finetune": True, "train-iters": 1}
        path = write_mixture(tmp_path / name, {"megatron": start, **AHEAD}, experts=2, top_k=top_k)
        loads = [str(tmp_path / run / "run") for run in runs]
        save_to = str(tmp_path / name / "assembled")
        assert main(["assemble-moee", "--load", *loads, "--save", save_to, "--config", str(path)]) == 0
        train(path, 1, "--lr 0 --lr-warmup-iters 0", ("evaluation.at_start=true",))
        found = read_evaluations(tmp_path / name / "run")[0]
        report = found["moee"]["2"]
        if name == "both":
            for expert, run in enumerate(runs):
                assert report[f"loss/{expert}"] == pytest.approx(loss[run], rel=TOLERANCE)
            assert found["losses"]["2"] < sum(loss.values()) / 2 * (1 + TOLERANCE)
            assert found["mtp"]["2"]["loss/1"] < sum(each["loss/1"] for each in ahead.values()) / 2 * (
                1 + TOLERANCE
            )
        else:
            assert found["losses"]["2"] == pytest.approx(loss["first"], rel=TOLERANCE)
            assert found["mtp"]["2"] == pytest.approx(ahead["first"], rel=TOLERANCE)
            assert 0 < report["load/0"] < 1, "all sequences went one way, which tests little"
    # And back: the second run's model, out of the mixture that was trained (with a learning rate of 0).
    mixed, taken = tmp_path / "both", tmp_path / "taken"
    extract = [
        "assemble-moee",
        "--load",
        str(mixed / "run"),
        "--config",
        str(mixed / "config.yaml"),
        "--extract",
        "1",
    ]
    assert main([*extract, "--save", str(taken / "expert")]) == 0
    start = {"load": str(taken / "expert"), "finetune": True, "train-iters": 1}
    path = write_config(taken, recurrence={"pattern": "*-[*-]x2"}, data={"prefix": 8}, megatron=start, **AHEAD)
    train(path, 1, "--lr 0 --lr-warmup-iters 0")
    evaluation = read_evaluations(taken / "run")[-1]
    assert evaluation["losses"]["2"] == pytest.approx(loss["second"], rel=TOLERANCE)
    assert evaluation["mtp"]["2"] == pytest.approx(ahead["second"], rel=TOLERANCE)
    # A configuration without depths leaves them out; one with others cannot have them.
    assert main([*extract, "--save", str(taken / "plain"), "--set", "mtp.depths=0"]) == 0
    assert not any("mtp." in name for name in open_checkpoint(taken / "plain").model)
    capsys.readouterr()
    assert main([*extract, "--save", str(taken / "deeper"), "--set", "mtp.depths=2"]) == 2
    assert "mtp.depths is 2, but" in capsys.readouterr().err
    assert not (taken / "deeper").exists()
