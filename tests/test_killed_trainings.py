"""A training that is stopped by a signal loses no checkpoint, leaves no half one, and goes on bit for bit.

Every phase x every signal x one rank or all, with two seeds that draw the place within the phase.
"""

import shutil
from itertools import product
from pathlib import Path

import pytest
import yaml

from cherry_megatron.runs import read_steps
from cherry_megatron.storage.checkpoint import Checkpoint
from cherry_megatron.storage.integrity import damage
from cherry_megatron.storage.records import dump_pickle
from cherry_megatron.storage.tracker import TRACKER
from tests.killing import SIGNALS, WHO, train_and_stop

SCHEDULE = {
    "recurrence": {"random_loops": [1, 3]},
    "megatron": {
        "train-iters": 5,
        "save-interval": 2,
        "hidden-dropout": 0.1,
        "lr-warmup-iters": 0,
        "eval-iters": 1,
    },
}
PHASES = ("first step", "mid-step", "during save", "between shard and tracker")
SAMPLE = [("during save", "SIGKILL", "one", 0), ("between shard and tracker", "SIGKILL", "all", 1)]
REST = [trial for trial in product(PHASES, SIGNALS, WHO, (0, 1)) if trial not in SAMPLE]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, write_config, train) -> Path:
    """A run of five steps without a stop, on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(write_config(folder, **SCHEDULE), 2)
    return folder


def state(run: Path, step: int) -> dict[str, object]:
    """Parameters, optimizer state, generators and the place in the data, of a checkpoint."""
    found = Checkpoint(run / f"checkpoints/iter_{step:07d}")
    generators = {name: dump_pickle(found.object(name.split("/")[0])) for name in found.objects if "rng" in name}
    assert generators and found.manifest
    arguments = found.arguments()
    return {"tensors": found.manifest, "rng": generators, "samples": arguments["consumed_train_samples"]}


def survives(trial: tuple[str, str, str, int], undisturbed: Path, folder: Path, train) -> None:
    phase, name, who, seed = trial
    content = yaml.safe_load((undisturbed / "config.yaml").read_text())
    path, run = folder / "config.yaml", folder / "run"
    path.write_text(yaml.safe_dump({**content, "run": str(run)}))
    flags = "--async-save" if seed else ""
    # What rank 0 alone does is between the shards and the tracker.
    victim = 0 if phase.startswith("between") else seed
    train_and_stop(path, 2, phase, name, who, victim, seed, flags)
    saved = run / "checkpoints"
    there = sorted(path.name for path in saved.glob("iter_*"))
    assert all(damage(saved / name) is None for name in there), there
    assert not (saved / TRACKER).exists() or f"iter_{int((saved / TRACKER).read_text()):07d}" in there
    if name == "SIGKILL":
        assert not (saved / "iter_0000005").exists(), "it was not stopped"
    steps = train(path, 2, flags)
    expected = read_steps(undisturbed / "run")
    for ours, theirs in zip(steps, expected, strict=True):
        assert [ours[k] for k in ("iteration", "loss", "grad_norm")] == [
            theirs[k] for k in ("iteration", "loss", "grad_norm")
        ]
    assert state(run, 5) == state(undisturbed / "run", 5)
    assert not list(saved.glob(".*")) and all(damage(path) is None for path in saved.glob("iter_*"))
    shutil.rmtree(run)


@pytest.mark.parametrize("trial", SAMPLE, ids=str)
def test_a_killed_training_goes_on_bit_for_bit(trial, undisturbed, tmp_path, train):
    survives(trial, undisturbed, tmp_path, train)


@pytest.mark.full
@pytest.mark.parametrize("trial", REST, ids=str)
def test_kill_matrix(trial, undisturbed, tmp_path, train):
    survives(trial, undisturbed, tmp_path, train)
