"""What is to be read of growing texts is read once, in order, in passes that end together and are not too large."""

import random
from pathlib import Path
from types import SimpleNamespace

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
