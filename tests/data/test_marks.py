"""Marks that are not what was written, or belong to something else, are refused in one sentence."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run_ranks


def _write(folder: Path) -> None:
    from cherry_megatron.data.marks import Marks, fingerprint, write_marks

    (folder / "text.idx").write_bytes(b"index")
    (folder / "text.bin").write_bytes(bytes(range(200)))
    marks = Marks("some", "by hand", "1", 100, 80, 20, fingerprint(folder / "text"))
    write_marks(folder / "text", marks, np.array([60, 40], np.int32), [np.arange(100) % 5 == 0])


@pytest.fixture
def marked(tmp_path: Path) -> Path:
    run_ranks(tmp_path / "logs", 1, _write, tmp_path)
    return tmp_path / "text"


def test_what_is_written_is_read(marked):
    from cherry_megatron.data.marks import read_marks, verify_marks

    marks = read_marks(marked, "some")
    assert (marks.marked, marks.rho, marks.selector) == (20, 0.25, "by hand")
    verify_marks(marked, "some")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


def test_damaged_marks(marked):
    from cherry_megatron.data.marks import read_marks, verify_marks
    from cherry_megatron.errors import CherryError

    damage(Path(f"{marked}.some.bin"))
    read_marks(marked, "some")  # does not read them all
    with pytest.raises(CherryError, match="is damaged"):
        verify_marks(marked, "some")


def test_other_tokens(marked):
    from cherry_megatron.data.marks import read_marks
    from cherry_megatron.errors import CherryError

    damage(Path(f"{marked}.bin"))
    with pytest.raises(CherryError, match="belongs to other tokens"):
        read_marks(marked, "some")
