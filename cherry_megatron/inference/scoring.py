"""How likely texts are: log-likelihoods of continuations, by the training model under its parallel layout."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core import mpu
from megatron.training import get_args
from torch import Tensor

from cherry_megatron.errors import CherryError
from cherry_megatron.inference.generate import evaluating
from cherry_megatron.inference.mixture import readers
from cherry_megatron.inference.reader import Reads

# Positions whose logits are looked at in one go; each has the whole vocabulary, in float32.
POSITIONS = 2048
type Pair = tuple[Sequence[int], Sequence[int]]  #: a context and its continuation, as tokens
type Score = tuple[float, bool]  #: the continuation's log-likelihood, and whether it is the likeliest


class Read:
    """A text that is read once, for all continuations that differ in their last token alone.

    Attributes:
        tokens: context and continuation but for the last token.
        count: tokens of the continuation.
        pairs: the numbers of those that it is read for.
    """

    def __init__(self, tokens: tuple[int, ...], count: int, pairs: list[int]) -> None:
        self.tokens, self.count, self.pairs = tokens, count, pairs


def score(
    model: list[torch.nn.Module],
    pairs: Sequence[Pair],
    loops: int,
    done: Callable[[int], object] = lambda _: None,
) -> list[Score]:
    """log p(continuation | context) of each pair. Every rank must call it, with the same values.

    Data-parallel replicas share out the texts, as in `generate`. A mixture chooses its experts from the context.

    Args:
        model: chunks of this rank.
        pairs: token ids of context and continuation, at least one each, together at most --seq-length + 1.
        loops: how often the core is walked.
        done: called with a number of pairs whenever this replica has scored them.

    Returns:
        On every rank: natural logarithm, summed over the continuation's tokens, and whether each of these is the
        likeliest one.

    Raises:
        CherryError: if one is not a number.
    """
    read, replicas = readers(model)
    found: dict[int, Score] = {}
    with evaluating(model):
        for batch in _batches(_once(pairs)[replicas.rank() :: replicas.size()]):
            reader = read(len(batch), max(len(text.tokens) for text in batch), loops)
            found |= _score(reader, batch, pairs)
            done(sum(len(text.pairs) for text in batch))
    everybodys: list[dict[int, Score]] = [{}] * replicas.size()
    torch.distributed.all_gather_object(everybodys, found, group=replicas)
    scores = {number: scored for theirs in everybodys for number, scored in theirs.items()}
    if any(total != total for total, _ in scores.values()):
        raise CherryError("the model's log-likelihoods are not finite; this checkpoint cannot be evaluated")
    return [scores[number] for number in range(len(pairs))]


def _once(pairs: Sequence[Pair]) -> list[Read]:
    """What is to be read, those of one shape side by side, the longest first."""
    longest = get_args().seq_length
    numbers = defaultdict(list)
    for number, (context, continuation) in enumerate(pairs):
        tokens = (*context, *continuation[:-1])
        assert context and continuation and len(tokens) <= longest, (len(context), len(continuation))
        numbers[tokens, len(continuation)].append(number)
    texts = [Read(tokens, count, given) for (tokens, count), given in numbers.items()]
    return sorted(texts, key=lambda text: (text.count, len(text.tokens)), reverse=True)


def _batches(texts: Sequence[Read]) -> Iterator[list[Read]]:
    """Texts with continuations of one length, as many at once as a micro-batch of training has room for."""
    args = get_args()
    batch: list[Read] = []
    for text in texts:
        # The first of a batch is its longest.
        if batch and (
            text.count != batch[0].count
            or len(batch) >= args.micro_batch_size * args.seq_length // len(batch[0].tokens)
        ):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _score(reader: Reads, batch: Sequence[Read], pairs: Sequence[Pair]) -> dict[int, Score]:
    numbers = [number for text in batch for number in text.pairs]
    rows = [row for row, text in enumerate(batch) for _ in text.pairs]
    wanted = torch.tensor([list(pairs[number][1]) for number in numbers])  # [m, count]
    count, at_once = batch[0].count, max(POSITIONS // len(batch), 1)
    device = torch.cuda.current_device()
    found = torch.zeros(len(numbers), 2, dtype=torch.float64, device=device)  # sum, tokens that are the likeliest
    for start in range(0, count, at_once):
        end = min(start + at_once, count)
        texts = [text.tokens[: len(text.tokens) - count + end] for text in batch]
        logits = reader.logits_after(texts, end - start)
        if logits is not None:
            found += _of_part(logits, torch.tensor(rows, device=device), wanted[:, start:end].to(device))
    group = mpu.get_model_parallel_group()
    torch.distributed.broadcast(found, group=group, group_src=group.size() - 1)  # a rank of the last stage
    return {number: (total, hits == count) for number, (total, hits) in zip(numbers, found.tolist(), strict=True)}


def _of_part(logits: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
    """The sum of log-probabilities, and how many tokens are the likeliest, [m, 2].

    Args:
        logits: of some positions of each text, [n, c, v].
        rows: the text of each continuation, [m].
        wanted: tokens of each continuation, [m, c].
    """
    likely = logits[rows[:, None], torch.arange(wanted.shape[1], device=rows.device), wanted]
    likely = likely - logits.logsumexp(-1)[rows]
    hits = logits.argmax(-1)[rows] == wanted
    return torch.stack((likely.double().sum(1), hits.double().sum(1)), 1)
