"""What of growing texts goes into one pass, and how it stands in it."""

import math
from collections.abc import Iterator, Sequence

import torch
from megatron.training import get_args
from torch import Tensor

FP8_MULTIPLE = 32  # of the tokens of a pass: 16 is enough for all recipes but MXFP8


def in_pieces(held: Sequence[int], ends: Sequence[int], least: int) -> Iterator[tuple[int, list[range]]]:
    """Cut what is to be read of each text into passes, none with more tokens than a micro-batch of training.

    The passes end together: the last one holds the last positions of all texts.

    Args:
        held: positions of each text that are read already.
        ends: how far each is to be read.
        least: columns that the last pass may have in any case.

    Yields:
        The columns of a pass, and the positions of each text in it.
    """
    held = list(held)
    left = max(end - known for known, end in zip(held, ends, strict=True))
    args = get_args()
    most = max(args.micro_batch_size * args.seq_length // len(held), least)
    while left > 0:
        width = (left - 1) % most + 1
        yield (
            width,
            [
                range(max(end - left, known), max(end - left + width, known))
                for known, end in zip(held, ends, strict=True)
            ],
        )
        left -= width


def placed(parts: Sequence[Sequence[int]], width: int) -> Tensor:
    """Tokens of each text in the last columns of a pass, [b, s]; what fills it up on the left is never read."""
    found = torch.zeros(len(parts), width, dtype=torch.long)
    for row, part in zip(found, parts, strict=True):
        row[width - len(part) :] = torch.tensor(part, dtype=torch.long)
    return found.to(torch.cuda.current_device())


def filled(width: int, rows: int) -> int:
    """Columns, at least so many, that sequence parallelism can cut and FP8 can multiply.

    Experts inside layers are given tokens of each rank's own, in multiples too where the router fills them up.
    """
    args = get_args()
    ranks = args.tensor_model_parallel_size if args.sequence_parallel else 1
    fp8 = FP8_MULTIPLE // math.gcd(FP8_MULTIPLE, rows) if args.fp8 else 1
    padded = args.moe_router_padding_for_fp8 or args.moe_router_padding_for_quantization
    multiple = ranks * fp8 if padded else math.lcm(ranks, fp8)
    return -(-width // multiple) * multiple
