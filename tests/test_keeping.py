"""The checkpoints that a run writes: beside the training or not, room for them, and which stay."""

import json
import os
import shutil
import subprocess
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from cherry_megatron.keeping import _stays
from cherry_megatron.platform import shards
from cherry_megatron.storage.ancestry import describe
from cherry_megatron.storage.integrity import damage
from cherry_megatron.storage.tracker import TRACKER
from tests.conftest import _train, run_ranks
from tests.test_bad_input import verb

SCHEDULE = {"megatron": {"train-iters": 6, "save-interval": 1, "hidden-dropout": 0.1, "lr-warmup-iters": 0}}


def _train_while_the_clock_jumps(path: Path, overrides: list[str]) -> None:
    """Again and again three years ahead, and as many back; writing begins when steps have followed."""
    now, calls, write = time.time, count(), shards._write_bucket

    def write_later(*given: Any) -> Any:
        time.sleep(0.3)
        return write(*given)

    shards._write_bucket = write_later
    time.time = lambda: now() + (0, 1e8, -1e8)[next(calls) // 10 % 3]
    _train(path, overrides, [])
    assert next(calls) > 60


@pytest.fixture(scope="module")
def runs(tmp_path_factory, write_config, train) -> dict[str, Path]:
    """A training that waits for saves; the same with saves beside it, few of which stay, and a clock that jumps."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("waits", "beside")}
    waits, beside = (write_config(folder, **SCHEDULE) for folder in folders.values())
    train(waits, 2, overrides=("megatron.save-interval=2",))
    few = ["megatron.async-save=true", "checkpoints.keep=2", "checkpoints.keep_every=2"]
    run_ranks(folders["beside"] / "output", 2, _train_while_the_clock_jumps, beside, few)
    return folders


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "run/checkpoints").iterdir())


def test_neither_saves_beside_the_training_nor_the_clock_change_anything(runs):
    lines = [
        [json.loads(line) for line in (runs[name] / "run/steps.jsonl").read_text().splitlines()] for name in runs
    ]
    assert [[(s["loss"], s["grad_norm"]) for s in steps] for steps in lines] == [
        [(s["loss"], s["grad_norm"]) for s in lines[0]]
    ] * 2
    for step in (2, 4, 6):  # they are of these, not of one that was trained meanwhile
        manifests = [runs[name] / f"run/checkpoints/iter_{step:07d}/manifest.json" for name in runs]
        assert len({manifest.read_text() for manifest in manifests}) == 1, step


def test_few_stay_and_all_are_what_was_saved(runs):
    assert checkpoints(runs["waits"]) == ["iter_0000002", "iter_0000004", "iter_0000006", TRACKER]
    saved = ["iter_0000002", "iter_0000004", "iter_0000005", "iter_0000006", TRACKER]
    assert checkpoints(runs["beside"]) == saved
    for name, step in (("waits", 2), ("beside", 5)):
        folder = runs[name] / f"run/checkpoints/iter_{step:07d}"
        assert damage(folder) is None
        assert "(verified)" in describe(folder, verify=True)[0]


def test_every_file_is_in_the_list_of_hashes(runs):
    for run in runs.values():
        folder = run / "run/checkpoints/iter_0000006"
        listed = json.loads((folder / "integrity.json").read_text())["files"]
        assert {*listed, "integrity.json"} == {path.name for path in folder.iterdir()}
        assert {"__0_0.distcp", "__1_0.distcp", "lineage.json", "manifest.json"} <= {*listed}


def test_a_step_that_is_saved_is_not_saved_again(runs, train):
    """Written over, it could be lost."""
    checkpoint = runs["waits"] / "run/checkpoints/iter_0000006"
    before = checkpoint.stat()
    train(runs["waits"] / "config.yaml", 2, overrides=("megatron.save-interval=4",))
    assert (checkpoint.stat().st_ino, checkpoint.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_multiples_stay():
    steps = (Path(f"iter_{step:07d}") for step in range(1, 7))
    assert [_stays(folder, 3) for folder in steps] == [False, False, True, False, False, True]
    assert not _stays(Path("iter_0000003"), 0)


def _fails_while(path: Path, what: str, arguments: list[str]) -> tuple[int, str]:
    """A training that something befalls; the status and what it printed."""
    from cherry_megatron import keeping

    if what == "surplus":
        keeping.damage = lambda folder: f"{folder}/__0_0.distcp is not what was saved"
    if what == "room":
        usage = shutil.disk_usage(path.parent)
        keeping.shutil.disk_usage = lambda _: usage._replace(free=1000)
    return verb(path.parent, ["pretrain", "--config", str(path), *arguments])


@pytest.fixture
def copy(runs, tmp_path) -> Path:
    shutil.copytree(runs["waits"] / "run", tmp_path / "run")
    content = yaml.safe_load((runs["waits"] / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**content, "run": str(tmp_path / "run")}))
    return tmp_path / "config.yaml"


def befallen(copy: Path, what: str, *flags: str, overrides: tuple[str, ...] = ()) -> tuple[int, str]:
    sets = [word for override in overrides for word in ("--set", override)]
    ((status, errors),) = run_ranks(copy.parent / "output", 1, _fails_while, copy, what, [*sets, "--", *flags])
    assert "Traceback" not in errors
    return status, errors


def test_nothing_is_removed_while_the_newest_is_not_verified(copy):
    status, _ = befallen(copy, "surplus", "--train-iters", "7", overrides=("checkpoints.keep=1",))
    said = (copy.parent / "output/rank0.out").read_text()
    assert status == 0 and "WARNING: no older checkpoint is removed" in said
    assert len(checkpoints(copy.parent)) == 5  # four and the tracker


def test_no_room_is_seen_before_anything_is_trained(copy):
    before = checkpoints(copy.parent)
    status, errors = befallen(copy, "room", "--train-iters", "7")
    assert status == 2 and "no space left for a checkpoint" in errors and "1,000 are free; make room" in errors
    assert checkpoints(copy.parent) == before


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of so many KiB at a folder; gives what resizes it."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mounted = []

    def mount(folder: Path, options: str) -> None:
        again = [] if folder not in mounted else ["-o", "remount"]
        folder.mkdir(parents=True, exist_ok=True)
        if subprocess.run(["mount", "-t", "tmpfs", *again, "-o", options, "none", folder], check=False).returncode:
            pytest.skip("mounting is not allowed here")
        mounted.append(folder)

    yield mount
    for folder in {*mounted}:
        subprocess.run(["umount", folder], check=True)


def _fills_up(path: Path, arguments: list[str]) -> tuple[int, str]:
    """As if another program took the room after it was looked for."""
    from cherry_megatron import keeping

    keeping.why_no_room = lambda _: None
    return verb(path.parent, ["pretrain", "--config", str(path), *arguments])


@pytest.mark.parametrize("ways", ["", pytest.param("--async-save", marks=pytest.mark.full)])
def test_a_disk_that_fills_up_ends_the_training_and_costs_no_checkpoint(ways, small_disk, tmp_path, runs, train):
    run, path = tmp_path / "run", tmp_path / "config.yaml"
    small_disk(run, "size=4500k")
    content = yaml.safe_load((runs["waits"] / "config.yaml").read_text())
    path.write_text(yaml.safe_dump({**content, "run": str(run)}))
    ((status, errors),) = run_ranks(tmp_path / "output", 1, _fills_up, path, ["--", *ways.split()])
    said = [line for line in errors.splitlines() if line.startswith("cherry")]
    assert status == 2 and len(said) == 1 and "no space left for " in said[0] and "make room and run" in said[0]
    assert "Traceback" not in errors
    (*found, tracker) = checkpoints(tmp_path)
    assert tracker == TRACKER and found[-1] == f"iter_{int((run / 'checkpoints' / TRACKER).read_text()):07d}"
    assert found and all(damage(run / "checkpoints" / name) is None for name in found)
    small_disk(run, "size=64m")
    train(path, flags=ways)
    assert checkpoints(tmp_path)[-2] == "iter_0000006"


def _goes_read_only(path: Path, folder: Path) -> tuple[int, str]:
    from megatron.training import training

    step, steps = training.train_step, []

    def and_then(*args, **kwargs):
        steps.append(step(*args, **kwargs))
        if len(steps) == 3:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        return steps[-1]

    from cherry_megatron.platform import steps as ours

    ours._train_step = and_then
    return verb(path.parent, ["pretrain", "--config", str(path)])


@pytest.mark.full
def test_a_folder_that_goes_read_only_ends_the_training(small_disk, tmp_path, runs, train):
    run, path = tmp_path / "run", tmp_path / "config.yaml"
    small_disk(run / "checkpoints", "size=64m")
    content = yaml.safe_load((runs["waits"] / "config.yaml").read_text())
    path.write_text(yaml.safe_dump({**content, "run": str(run)}))
    ((status, errors),) = run_ranks(tmp_path / "output", 1, _goes_read_only, path, run / "checkpoints")
    said = [line for line in errors.splitlines() if line.startswith("cherry")]
    assert status == 2 and len(said) == 1 and "Read-only file system" in said[0] and "Traceback" not in errors
    assert checkpoints(tmp_path) == ["iter_0000001", "iter_0000002", TRACKER]
    status, errors = befallen(path, "", "--train-iters", "6")  # nor does it begin
    assert status == 2 and "may not be written" in errors
    small_disk(run / "checkpoints", "size=64m,rw")
    assert [step["iteration"] for step in train(path)] == [1, 2, 3, 4, 5, 6]
