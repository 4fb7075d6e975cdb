"""Which code a record names."""

import subprocess

import pytest

from cherry_megatron import versions


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, in which cherry_megatron/versions.py lies, not tracked yet."""

    def git(*command: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *command], check=True, capture_output=True)

    here = tmp_path / "cherry_megatron/versions.py"
    here.parent.mkdir()
    here.write_text("")
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    monkeypatch.setattr(versions, "__file__", str(here))
    return git


def test_a_checkout_is_named_by_its_commit(repository):
    repository("add", ".")
    repository("commit", "-m", "second")
    state = versions.git_state()
    assert len(state["commit"]) == 40 and state["modified"] is False


def test_the_commit_of_a_repository_that_only_surrounds_the_package_is_not_taken_for_it(repository):
    assert versions.git_state() == {} and versions.git_difference() == ""
