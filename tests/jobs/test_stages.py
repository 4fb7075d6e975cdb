"""What a stage starts from, makes and is given; the chain."""

import os
from pathlib import Path

import pytest
import yaml

from cherry_megatron.cli import main
from cherry_megatron.errors import CherryError
from cherry_megatron.jobs import attempts
from cherry_megatron.jobs.chain import chain
from cherry_megatron.jobs.stages import stage_of

CONFIGS = Path(__file__).parents[2] / "configs"
BASE, BRANCH, MIXTURE = (CONFIGS / f"{name}.yaml" for name in ("base_1b", "branch_227m", "cherry_1p8b"))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("CHERRY", "SLURM"))]:
        monkeypatch.delenv(name)


def saved(folder: str, step: int) -> None:
    """A checkpoint, as far as its place goes."""
    (Path(folder) / f"iter_{step:07d}").mkdir(parents=True)
    (Path(folder) / f"iter_{step:07d}" / ".metadata").touch()
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_training() -> None:
    stage = stage_of("pretrain", BASE, flags=["--train-iters", "300"])
    assert (stage.run, stage.output, stage.last) == (Path("runs/base_1b"), Path("runs/base_1b"), 300)
    assert (stage.arguments, stage.start, stage.saved, stage.finished) == ((), "scratch", 0, False)
    saved("runs/base_1b/checkpoints", 200)
    stage = stage_of("pretrain", BASE, ["megatron.train-iters=300"])
    assert (stage.start, stage.saved, stage.finished) == ("the run's own step 200", 200, False)
    assert stage_of("pretrain", BASE, ["megatron.train-iters=200"]).finished
    assert not stage_of("pretrain", BASE, ["run=runs/other"]).finished
    by_samples = ["megatron.train-iters=null", "megatron.train-samples=5120"]
    assert stage_of("pretrain", BASE, by_samples).last == 10
    with pytest.raises(CherryError, match=r"set megatron\.train-iters, by which"):
        stage_of("pretrain", BASE, [*by_samples, "megatron.rampup-batch-size=[8,8,100]"])


def test_a_damaged_checkpoint_is_left_to_the_training() -> None:
    """Which falls back from it or stops; a launcher that refused would keep it from the first."""
    saved("runs/base_1b/checkpoints", 200)
    Path("runs/base_1b/checkpoints/iter_0000200/.metadata").unlink()
    assert stage_of("pretrain", BASE).start == "the run's own step 200"
    Path("runs/base_1b/checkpoints/iter_0000200").rmdir()
    assert stage_of("pretrain", BASE).saved == 200
    Path("runs/base_1b/checkpoints/latest_checkpointed_iteration.txt").write_text("2x")
    with pytest.raises(CherryError, match="says '2x', which is no checkpoint"):
        stage_of("pretrain", BASE)
    released = Path("runs/base_1b/checkpoints/release/.metadata")
    released.parent.mkdir()
    released.touch()
    Path("runs/base_1b/checkpoints/latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(CherryError, match="names no step but 'release'; write the number of a checkpoint"):
        stage_of("pretrain", BASE)


def test_what_a_mixture_starts_from() -> None:
    """LOAD, else what was assembled in the run's folder, else nothing."""
    assert stage_of("pretrain", MIXTURE).start == "scratch, with 8 experts"
    saved("runs/cherry_1p8b/assembled", 0)
    stage = stage_of("pretrain", MIXTURE)
    assert stage.start == "runs/cherry_1p8b/assembled"
    assert stage.arguments == (
        "--set", "megatron.load=runs/cherry_1p8b/assembled", "--set", "megatron.finetune=true",
    )  # fmt: skip
    stage = stage_of("pretrain", MIXTURE, load=["runs/else"])
    assert (stage.start, stage.arguments[1]) == ("runs/else", "megatron.load=runs/else")
    assert stage_of("pretrain", MIXTURE, parent=BASE).start == "runs/base_1b"
    assert stage_of("pretrain", BRANCH).start == "runs/compressed_227m", "what the configuration names"


def test_early_end() -> None:
    assert not stage_of("pretrain", BASE).ends_early
    assert stage_of("pretrain", BASE, flags=["--exit-interval", "50"]).ends_early
    assert stage_of("pretrain", BASE, ["megatron.exit-duration-in-mins=60"]).ends_early


def test_compression() -> None:
    stage = stage_of("compress-depth", BRANCH, parent=BASE)
    assert stage.arguments == ("--load", "runs/base_1b", "--save", "runs/compressed_227m")
    assert stage.run == Path("runs/branch_227m/0")
    assert not stage.finished
    saved("runs/compressed_227m", 0)
    assert stage_of("compress-depth", BRANCH, load=["runs/else"]).finished
    with pytest.raises(CherryError, match=r"set megatron\.load to the folder"):
        stage_of("compress-depth", BASE, parent=BASE)
    with pytest.raises(CherryError, match="name what to start from"):
        stage_of("compress-depth", BRANCH)
    with pytest.raises(CherryError, match="takes one run, not a, b"):
        stage_of("compress-depth", BRANCH, load=["a", "b"])


def test_assembly(tmp_path: Path) -> None:
    stage = stage_of("assemble-moee", MIXTURE, ["moee.experts=3"], parent=BRANCH)
    runs = [f"runs/branch_227m/{number}" for number in range(8)][:3]
    assert stage.arguments == ("--load", *runs, "--save", "runs/cherry_1p8b/assembled")
    assert "CHERRY_BRANCH" not in os.environ
    inside = stage_of("assemble-moee", CONFIGS / "layers_227m.yaml", load=["a", "b"])
    assert inside.arguments == ("--load", "a", "b", "--save", "runs/layers_227m/assembled")
    with pytest.raises(CherryError, match="is the same for all branches"):
        stage_of("assemble-moee", MIXTURE, parent=BASE)
    with pytest.raises(CherryError, match="is no mixture"):
        stage_of("assemble-moee", CONFIGS / "cherry_227m.yaml", load=["a", "b"])


def evaluated_at(step: int) -> None:
    """A job of evaluate.sh that has ended well."""
    run, job = Path("runs/cherry_1p8b"), str(step)
    attempt = attempts.begin(run, "evaluate", job, 0, "n", step)
    attempts.end(run, attempt, attempts.Ranks(0), step, None, False)


def test_chain(tmp_path: Path) -> None:
    """What is finished, what is not needed for anything, and the branches that are left."""
    short = tmp_path / "branch.yaml"
    short.write_text(
        yaml.safe_dump(
            {
                "run": "runs/branch/${CHERRY_BRANCH:-0}",
                "recurrence": {"pattern": "*-"},
                "megatron": {"load": "runs/compressed", "train-iters": 10},
            }
        )
    )
    states = [(link.name, link.state) for link in chain(BASE, short, MIXTURE)]
    assert states == [(n, "left") for n in ("base", "compress", "recover", "assemble", "mixture", "evaluate")]
    saved("runs/compressed", 0)
    for number in (0, 1, 3):
        saved(f"runs/branch/{number}/checkpoints", 10)
    saved("runs/branch/5/checkpoints", 9)
    base, compress, recover, *_ = chain(BASE, short, MIXTURE)
    assert (base.state, compress.state) == ("not needed", "finished")
    assert (recover.state, recover.branches) == ("left", "2,4,5,6,7")
    assert recover.output == "runs/branch/0 .. runs/branch/7"
    saved("runs/cherry_1p8b/checkpoints", 100)
    evaluated_at(100)
    *_, mixture, evaluate = chain(BASE, short, MIXTURE)
    assert (mixture.state, evaluate.state) == ("left", "left"), "evaluated on the way"
    saved("runs/cherry_1p8b/checkpoints", 20000)
    states = {link.name: link.state for link in chain(BASE, short, MIXTURE)}
    assert states == {
        "base": "not needed", "compress": "finished", "recover": "not needed", "assemble": "not needed",
        "mixture": "finished", "evaluate": "left",
    }  # fmt: skip
    evaluated_at(20000)
    assert chain(BASE, short, MIXTURE)[-1].state == "finished"
    links = chain(BASE, short, MIXTURE, CONFIGS / "sgt_1p8b.yaml")
    assert [(link.name, link.parent) for link in links] == [
        ("base", None), ("compress", BASE), ("recover", None), ("assemble", short), ("mixture", None),
        ("sgt", MIXTURE), ("evaluate", None),
    ]  # fmt: skip
    assert links[-1].output == "runs/sgt_1p8b"
    with pytest.raises(CherryError, match="a chain ends in a mixture"):
        chain(BASE, short, BASE)


def test_a_job_asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The verb: what it prints for the launcher, its exit statuses, and the copies of what was started."""
    command = ["pretrain", "--config", str(MIXTURE), "--set", "megatron.train-iters=10"]
    begin = ["job", "begin", *command, "--records", "records"]
    end = ["job", "end", *command, "--errors", "srun.err", "--state", "RUNNING"]
    assert main(begin) == 2
    assert "there is no SLURM_JOB_ID" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    for name in ("WANDB_API_KEY", "SLURM_JWT", "SSL_PASSPHRASE", "MYSQL_PWD"):
        monkeypatch.setenv(name, "hidden value")
    monkeypatch.setenv("https_proxy", "http://me:hidden@proxy:3128")
    assert main([*begin, "--load", "a", "--", "--lr", "1e-4"]) == 0
    assert capsys.readouterr().out.split() == ["--set", "megatron.load=a", "--set", "megatron.finetune=true"]
    kept = {file.name: file.read_text() for file in Path("records").iterdir()}
    assert sorted(kept) == ["code.diff", "code.txt", "config.yaml", "environment.txt", "packages.txt"]
    resolved = yaml.safe_load(kept["config.yaml"])
    assert (resolved["megatron"]["train-iters"], resolved["flags"]) == (10, ["--lr", "1e-4"])
    assert "SLURM_JOB_ID=5\n" in kept["environment.txt"] and "hidden" not in kept["environment.txt"]
    assert "https_proxy=http://(left out)@proxy:3128\n" in kept["environment.txt"]
    assert "torch==" in kept["packages.txt"]
    (tmp_path / "srun.err").write_text("srun: error: n2: task 3: Exited with exit code 7\n")
    assert main([*end, "--status", "143"]) == 10
    assert capsys.readouterr().out == "n2\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(begin) == 0
    capsys.readouterr()
    assert main([*end, "--status", "143"]) == 7, "the first one's"
    told = capsys.readouterr()
    assert not told.out and "pretrain: stop, two attempts failed after step 0" in told.err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert main(begin) == 2
    saved("runs/cherry_1p8b/checkpoints", 10)
    assert main(begin) == 10
