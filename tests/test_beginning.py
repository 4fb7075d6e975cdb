"""`cherry init`: the folders of the project, copied."""

import pytest

from cherry_megatron.beginning import FOLDERS, STARTER, begin
from cherry_megatron.cli import main


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_file_is_copied_and_what_is_there_stays(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    for name in FOLDERS:
        ours = files(STARTER / name)
        ours.pop("cluster.env", None)  # somebody's account
        assert files(tmp_path / name) == ours
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs", "mine", "slurm"]


def test_nothing_is_written_over(tmp_path, capsys):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/cluster.env").write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert f"{tmp_path}/slurm exists and is not empty" in capsys.readouterr().err
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["slurm", "slurm/cluster.env"]


def test_somebody_else_s_account_is_not_copied(tmp_path, monkeypatch):
    for name in FOLDERS:
        (tmp_path / "starter" / name).mkdir(parents=True)
    (tmp_path / "starter/slurm/cluster.env").write_text("CLUSTER_ACCOUNT=mine")
    (tmp_path / "starter/slurm/common.sh").write_text("")
    monkeypatch.setattr("cherry_megatron.beginning.STARTER", tmp_path / "starter")
    begin(tmp_path / "work")
    assert files(tmp_path / "work") == {"slurm/common.sh": b""}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["params", "configs/cherry_227m.yaml"], "`cherry init` puts the project's configs/ into this folder"),
        (["experiment", "run", "depth", "--out", "out"], "`cherry init` puts the project's configs/"),
    ],
)
def test_a_missing_file_of_ours_says_how_to_get_it(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


def test_a_file_that_is_not_ours_or_not_missing_altogether_gets_no_such_advice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in ("configs/none.yaml", "none.yaml"):
        assert main(["params", path]) == 2
    (tmp_path / "configs").mkdir()
    assert main(["params", "configs/cherry_227m.yaml"]) == 2
    assert "cherry init" not in capsys.readouterr().err
