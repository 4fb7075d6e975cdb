"""What is to be read of growing texts is read once, in order, in passes that end together and are not too large."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import run_ranks

LARGEST = 12  # tokens of a micro-batch


def cut(cases):
    from cherry_megatron.inference import passes

    passes.get_args = lambda: SimpleNamespace(micro_batch_size=2, seq_length=LARGEST // 2)
    return [list(passes.in_pieces(*case)) for case in cases]


def test_passes(tmp_path: Path):
    draw, cases = random.Random(3), []
    for _ in range(200):
        held = [draw.randint(0, 9) for _ in range(draw.randint(1, 5))]
        cases.append((held, [known + draw.randint(0, 30) for known in held], draw.randint(1, 6)))
    (found,) = run_ranks(tmp_path, 1, cut, cases)
    assert max(map(len, found)) > 3
    for (held, ends, least), pieces in zip(cases, found, strict=True):
        for row, (known, end) in enumerate(zip(held, ends, strict=True)):
            assert [place for _, spans in pieces for place in spans[row]] == list(range(known, end))
            assert all(spans[row].stop <= end - pieces[-1][0] for _, spans in pieces[:-1] if spans[row])
        for width, spans in pieces:
            assert max(map(len, spans)) == width
            assert width <= max(LARGEST // len(held), least)
        assert all(width >= least for width, _ in pieces[1:]), "the last of several has room for what is asked"


def fill(cases):
    from cherry_megatron.inference import passes

    found = []
    for width, rows, ranks, sharing, fp8, padded in cases:
        passes.get_args = lambda given=(ranks, sharing, fp8, padded): SimpleNamespace(
            tensor_model_parallel_size=given[0], sequence_parallel=given[1], fp8=given[2],
            moe_router_padding_for_fp8=given[3], moe_router_padding_for_quantization=False,
        )  # fmt: skip
        found.append(passes.filled(width, rows))
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_filled(padded, tmp_path: Path):
    """The fewest columns that ranks can share out; of what FP8 multiplies, all ranks' or each one's, 32 or more."""
    cases = [
        (width, rows, ranks, sharing, fp8, padded and fp8 is not None)
        for width in (1, 2, 31, 32, 33, 50)
        for rows in (1, 3, 4, 6, 40)
        for ranks in (1, 2, 3, 4)
        for sharing in (False, True)
        for fp8 in (None, "hybrid")
    ]

    def fits(columns, rows, ranks, sharing, fp8, of_each):
        over = ranks if sharing else 1
        tokens = columns // over * rows if of_each else columns * rows
        return columns % over == 0 and (fp8 is None or tokens % 32 == 0)

    (found,) = run_ranks(tmp_path, 1, fill, cases)
    for (width, *case), columns in zip(cases, found, strict=True):
        assert columns == next(n for n in range(width, 1000) if fits(n, *case)), (width, case)
