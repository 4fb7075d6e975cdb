"""What a checkpoint's files name is not run, even where all hashes agree: a planted pickle leaves no trace."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cherry_megatron.storage.integrity import hash_file
from cherry_megatron.storage.records import dump_pickle, load_pickle, read_object, stand_in, write_object
from tests.conftest import run_ranks
from tests.test_bad_input import verb


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_config, train) -> Path:
    """A configuration of a run with a checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_config(folder, recurrence={"pattern": "(*-)x4", "loop_scales": False})
    train(path, flags="--train-iters 2 --lr-warmup-iters 0")
    return path


def payload(trace: Path) -> Any:
    """Pickled, makes a folder when it is unpickled."""
    return stand_in("os", "mkdir")(str(trace))


def plant(folder: Path, where: str, trace: Path) -> None:
    """Put the payload into a checkpoint that is else as it was, and have all hashes agree."""
    metadata = load_pickle((folder / ".metadata").read_bytes())
    if where == ".metadata":
        metadata.state["planner_data"] = payload(trace)
    elif where == ".metadata, dotted":  # an attribute of a name that is allowed
        metadata.state["planner_data"] = stand_in("torch.serialization", "_get_layout.__globals__")()
    elif where == "common.pt":  # an older format's
        with (folder / where).open("w+b", buffering=0) as file:
            write_object(file, {"args": payload(trace)})
    else:
        places = metadata.state["storage_data"]
        (place,) = (at.state for index, at in places.items() if index.state["fqn"].split("/")[0] == where)
        with (folder / place["relative_path"]).open("r+b", buffering=0) as file:
            found = read_object(file, place["offset"], place["length"])
            place["offset"] = file.seek(0, os.SEEK_END)
            place["length"] = write_object(file, [*found, payload(trace)])
    (folder / ".metadata").write_bytes(dump_pickle(metadata))
    files = {path.name: hash_file(path) for path in folder.iterdir() if path.name != "integrity.json"}
    (folder / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": files}))


PLACES = (".metadata", "common_state", ".metadata, dotted", "common.pt", "rng_state")


def _tries(path: Path, arguments: list[str]) -> tuple[int, str]:
    return verb(path.parent, arguments)


@pytest.mark.parametrize("where", [*PLACES[:2], *(pytest.param(p, marks=pytest.mark.full) for p in PLACES[2:])])
def test_nothing_planted_runs(where, trained, tmp_path):
    shutil.copytree(trained.parent / "run", tmp_path / "run")
    trace, path = tmp_path / "trace", tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(trained.read_text()), "run": str(tmp_path / "run")}))
    plant(tmp_path / "run/checkpoints/iter_0000002", where, trace)
    config = ["--config", str(path)]
    small = ["--set", "recurrence.pattern=(*-)x2"]
    for arguments in (
        ["pretrain", *config, "--", "--train-iters", "3", "--lr-warmup-iters", "0"],
        ["generate", *config, "--prompt", "a", "--tokens", "1"],
        ["lineage", str(tmp_path / "run")],
        ["compress-depth", *config, *small, "--load", str(tmp_path / "run"), "--save", str(tmp_path / "small")],
    ):
        ((status, errors),) = run_ranks(tmp_path / "output", 1, _tries, path, arguments)
        assert not trace.exists(), arguments
        assert "Traceback" not in errors
        if arguments[0] == "pretrain" and where != "common.pt":
            assert status == 2 and "restore " in errors
            assert "CheckpointException" not in errors and "weights_only" not in errors


def test_the_payload_is_one(tmp_path):
    """Or the tests above would prove nothing."""
    pickle.loads(dump_pickle(payload(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()
