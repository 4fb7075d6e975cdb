"""What rank 0 finds is what all ranks go by."""

import os
from pathlib import Path

import pytest

from tests.conftest import run_ranks


def _answers(what: str) -> list[str]:
    import torch.distributed

    from cherry_megatron.errors import CherryError
    from cherry_megatron.ranks import as_first_rank

    torch.distributed.init_process_group("gloo")
    rank = os.environ["RANK"]

    def find() -> str:
        assert rank == "0"
        if what == "refuses":
            raise CherryError("because")
        if what == "cannot read":
            Path("/nowhere/file").read_text()
        return f"seen by {rank}"

    try:
        return [rank, as_first_rank(find)]
    except CherryError as error:
        return [rank, f"error: {error}"]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("finds", "seen by 0"),
        ("refuses", "error: because"),
        ("cannot read", "error: /nowhere/file: No such file or directory"),
    ],
)
def test_all_ranks_hear_what_the_first_finds(what, says, tmp_path):
    assert run_ranks(tmp_path, 2, _answers, what) == [["0", says], ["1", says]]
