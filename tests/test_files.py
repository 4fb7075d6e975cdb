"""Writing at once, and locks."""

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from cherry_megatron.errors import CherryError
from cherry_megatron.files import add_line, is_locked, lock_or_refuse, read_lines, write_atomically


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "file"
    for content in ("first", "둘째"):
        write_atomically(path, content)
        assert path.read_text() == content and list(tmp_path.iterdir()) == [path]


def test_lines_that_were_torn_are_passed_over(tmp_path):
    (tmp_path / "lines").write_bytes(b'{"a": 1}\n\x00\xff\xfe\n{"a"\n{"a": 2}\n\x00\x00')
    assert list(read_lines(tmp_path / "lines")) == [{"a": 1}, {"a": 2}]


def test_a_line_that_is_added_is_on_the_disk_and_spoils_no_other(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(Path(f"/proc/self/fd/{file}").readlink()))
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"half')
    add_line(path, {"a": 2})
    add_line(path, {"a": 3})
    assert list(read_lines(path)) == [{"a": 1}, {"a": 2}, {"a": 3}] and flushed == [path] * 2


def test_a_lock_is_held_until_its_file_is_closed(tmp_path):
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    lock_or_refuse(first, "busy", tmp_path)
    with pytest.raises(CherryError, match="busy"):
        lock_or_refuse(second, "busy", tmp_path)
    os.close(first)
    lock_or_refuse(second, "busy", tmp_path)
    os.close(second)


def test_looking_whether_a_file_is_locked_keeps_nobody_out(tmp_path):
    path = tmp_path / "lock"
    assert is_locked(path) is False
    with path.open("w") as file:
        assert is_locked(path) is False
        lock_or_refuse(file.fileno(), "busy", path)
        assert is_locked(path) is True
        with path.open() as another, pytest.raises(CherryError, match="busy"):
            lock_or_refuse(another.fileno(), "busy", path)
    with path.open() as looks, path.open("w") as file:
        fcntl.flock(looks, fcntl.LOCK_SH)
        threading.Timer(0.02, fcntl.flock, (looks, fcntl.LOCK_UN)).start()
        lock_or_refuse(file.fileno(), "busy", path)


def test_a_file_system_that_does_not_lock_is_said_and_is_not_taken_for_another_run(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(CherryError, match=r"cannot lock .* use a file system that locks"):
        lock_or_refuse(0, "busy", tmp_path)
