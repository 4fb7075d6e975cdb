"""The order in which a save reaches the disk, and what a save beside the training writes.

What is named by a file or folder is on the disk before it is named.
"""

import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cherry_megatron.storage.tracker import TRACKER
from tests.conftest import _train, run_ranks


def _traced(path: Path, flags: list[str]) -> list[tuple[str, ...]]:
    """A training; what it had flushed and renamed, in order."""
    found: list[tuple[str, ...]] = []
    fsync = os.fsync

    def sync(file: int) -> None:
        fsync(file)
        found.append(("flushed", str(Path(f"/proc/self/fd/{file}").readlink())))

    def watch(event: str, arguments: tuple) -> None:
        if event == "os.rename":
            found.append(("renamed", *map(str, arguments[:2])))

    os.fsync = sync
    sys.addaudithook(watch)
    _train(path, [], flags)
    return found


@pytest.mark.parametrize("flags", ["", pytest.param("--async-save", marks=pytest.mark.full)])
def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_that_before_it_counts(
    flags, tmp_path, write_config
):
    path = write_config(tmp_path, megatron={"train-iters": 2, "save-interval": 1, "lr-warmup-iters": 0})
    (found,) = run_ranks(tmp_path / "output", 1, _traced, path, flags.split())
    saved = tmp_path / "run/checkpoints"
    end = -1
    for step in (1, 2):
        begin, folder, hidden = end + 1, saved / f"iter_000000{step}", saved / f".iter_000000{step}.partial"
        named = found.index(("renamed", str(hidden), str(folder)), begin)
        names = [event for event in found[named:] if event[0] == "renamed" and event[2] == str(saved / TRACKER)]
        end = found.index(names[0], named)
        before = {event[1] for event in found[begin:named] if event[0] == "flushed"}
        # integrity.json got its name by a rename of its own.
        files = {str(hidden / file.name) for file in folder.iterdir() if file.name != "integrity.json"}
        assert ("renamed", str(saved / TRACKER)) not in {(e[0], e[-1]) for e in found[begin:named]}
        assert len(files) > 4 and files | {str(hidden)} <= before
        assert any(".integrity.json." in file for file in before)
        between = [event[1] for event in found[named:end] if event[0] == "flushed"]
        assert between[0] == str(saved) and between[-1] == names[0][1], "the folder's name, the tracker's content"
        assert ("flushed", str(saved)) in found[end:]


def _scheduled(may_write: threading.Event, tensor: torch.Tensor, written: list[torch.Tensor]):
    """A save by a thread of one tensor, which it reads when it may."""
    from cherry_megatron.platform.saving import _Thread

    def write(_rank, buckets, _results):
        may_write.wait()
        ((_, _, (_, ((_, given),))),) = buckets
        written.append(given.clone())

    caller = _Thread()
    caller.schedule_async_call(
        SimpleNamespace(async_fn=write, async_fn_args=(0, [("path", "name", ([], [(None, tensor)]))], None))
    )
    return caller


def test_a_save_beside_the_training_writes_what_was_there_when_it_began():
    may_write, tensor, written = threading.Event(), torch.arange(6.0), []
    caller = _scheduled(may_write, tensor, written)
    tensor.add_(1)  # the next step
    may_write.set()
    caller.close()
    assert torch.equal(written[0], torch.arange(6.0))


def _done_by_turns() -> list[bool]:
    """What a rank is told before rank 1 may write, and after."""
    from cherry_megatron.platform.machine import prepare

    prepare()
    torch.distributed.init_process_group("gloo")
    may_write, written = threading.Event(), []
    caller = _scheduled(may_write, torch.ones(1), written)
    if torch.distributed.get_rank() == 0:
        may_write.set()
        caller._thread.join()
    found = [caller.is_current_async_call_done()]
    may_write.set()
    while not found[-1]:
        found.append(caller.is_current_async_call_done())
    return [found[0], caller._thread is None]


def test_a_save_beside_the_training_is_done_when_that_of_every_rank_is(tmp_path):
    assert run_ranks(tmp_path, 2, _done_by_turns) == [[False, True]] * 2
