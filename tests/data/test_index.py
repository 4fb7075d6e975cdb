"""An index that is not what was written is seen, wherever it differs."""

from pathlib import Path

import numpy as np
import pytest

from cherry_megatron.data import index
from cherry_megatron.data.index import is_index
from tests.conftest import run_ranks


def _write(path: Path, dtype: str) -> None:
    from cherry_megatron.data.marks import write_index

    write_index(path, np.array([3, 0, 5, 2, 7], np.int32), np.dtype(dtype))


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_any_changed_byte_is_seen(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_BLOCK", 2)
    path = tmp_path / "text.idx"
    run_ranks(tmp_path, 1, _write, path, dtype)
    whole = path.read_bytes()
    assert len(whole) == 34 + 12 * 5 + 8 * 6 and is_index(path, 5, 17, np.dtype(dtype))
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not is_index(path, 5, 17, np.dtype(dtype)), place
