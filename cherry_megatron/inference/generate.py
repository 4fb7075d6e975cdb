"""Free generation with the training model, under its parallel layout.

Every new token takes a full forward pass over the text so far: slow, but the code that was trained is the code that
speaks. The recurrent stack keeps no keys and values between passes yet.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.training import get_args
from torch import Tensor

from cherry_megatron.inference.prompts import check_fit
from cherry_megatron.model.seeding import seed_of

MULTIPLE = 64  # of the length of a pass: FP8 wants multiples of 16, kernels are fastest at larger ones


def generate(
    model: list[torch.nn.Module],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperature: float,
    seed: int,
    end: int,
) -> list[list[int]]:
    """Continue prompts, with as many loops as the stack is set to. Every rank must call it, with the same values.

    Data-parallel replicas share out the prompts. A continuation depends on the model, its prompt, and what is asked
    here; not on the layout, nor on the other prompts.

    Args:
        model: chunks of this rank.
        prompts: token ids of each, at least one.
        new_tokens: at most so many for each.
        temperature: of the distribution that tokens are drawn from; 0 takes the likeliest.
        seed: of the draws.
        end: the token that ends a text.

    Returns:
        The new tokens of each prompt, on every rank; `end` is the last where a text ended by itself.

    Raises:
        CherryError: if a prompt and its new tokens are longer than --seq-length.
    """
    check_fit(prompts, new_tokens, get_args().seq_length, "generation")
    replicas = mpu.get_data_parallel_group()
    rows = [Row(list(prompt), end) for prompt in prompts[replicas.rank() :: replicas.size()]]
    with _evaluating(model):
        for _ in range(new_tokens):
            going = [row for row in rows if not row.ended]
            if not going:
                break
            logits = _next_logits(model, [row.tokens for row in going])
            for row, token in zip(going, _choose(logits, going, temperature, seed), strict=True):
                row.tokens.append(token)
    found: list[list[list[int]]] = [[] for _ in range(replicas.size())]
    torch.distributed.all_gather_object(found, [row.tokens[row.given :] for row in rows], group=replicas)
    return [found[number % len(found)][number // len(found)] for number in range(len(prompts))]


class Row:
    """A text that grows.

    Attributes:
        tokens: so far.
        given: number of the prompt's.
    """

    def __init__(self, prompt: list[int], end: int) -> None:
        self.tokens, self.given, self._end = prompt, len(prompt), end

    @property
    def ended(self) -> bool:
        """Whether the text has come to its end."""
        return len(self.tokens) > self.given and self.tokens[-1] == self._end

    def draw(self, seed: int) -> torch.Generator:
        """The generator of the next token: from the seed, the prompt and the position alone."""
        name = f"{self.tokens[: self.given]}/{len(self.tokens)}"
        return torch.Generator().manual_seed(seed_of(seed, name))


@contextmanager
def _evaluating(model: list[torch.nn.Module]) -> Iterator[None]:
    modes = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk, mode in zip(model, modes, strict=True):
            chunk.train(mode)


def _pass_length(needed: int) -> int:
    """Attention is causal: what stands behind a text does not change it, so a pass need not be a whole sequence."""
    multiple = math.lcm(MULTIPLE, mpu.get_tensor_model_parallel_world_size())  # sequence parallelism cuts it
    return min(-(-needed // multiple) * multiple, get_args().seq_length)


def _next_logits(model: list[torch.nn.Module], texts: list[list[int]]) -> Tensor | None:
    """The logits after the last token of each text, [n, v], on the last pipeline stage."""
    length = _pass_length(max(map(len, texts)))
    batches = -(-len(texts) // get_args().micro_batch_size)
    size = -(-len(texts) // batches)
    spare = batches * size - len(texts)
    filled = torch.zeros(len(texts) + spare, length, dtype=torch.long, device=torch.cuda.current_device())
    for row, text in zip(filled, texts, strict=False):
        row[: len(text)] = torch.tensor(text, device=row.device)
    last = torch.tensor([len(text) - 1 for text in texts] + [0] * spare, device=filled.device)
    found = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=zip(filled.split(size), last.split(size), strict=True),
        model=model,
        num_microbatches=batches,
        seq_length=length,
        micro_batch_size=size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not mpu.is_pipeline_last_stage():
        return None
    # Each rank has its part of the vocabulary.
    logits: Tensor = gather_from_tensor_model_parallel_region(torch.cat(found))
    return logits[: len(texts)]


def _forward_step(batches: Iterator[tuple[Tensor, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Any]:
    tokens, last = next(batches)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None), partial(_logits_at, last)


def _logits_at(last: Tensor, logits: Tensor, non_loss_data: bool) -> Tensor:
    """logits: [b, s, v]; those at one position of each text, [b, v]."""
    assert non_loss_data
    return logits[torch.arange(len(last), device=last.device), last].float()


def _choose(logits: Tensor | None, rows: list[Row], temperature: float, seed: int) -> list[int]:
    """The next token of each text, the same on all ranks of a replica; logits: [n, v] on the last stage."""
    chosen = torch.empty(len(rows), dtype=torch.long)
    if logits is not None:
        for number, (row, likely) in enumerate(zip(rows, logits.cpu(), strict=True)):
            chosen[number] = pick(likely, temperature, row.draw(seed))
    shared = chosen.to(torch.cuda.current_device())
    group = mpu.get_model_parallel_group()
    torch.distributed.broadcast(shared, group=group, group_src=group.size() - 1)  # a rank of the last stage
    tokens: list[int] = shared.tolist()
    return tokens


def pick(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """One of the tokens, drawn from the softmax of logits / temperature; at 0 the likeliest. logits: [v]."""
    # A model that has diverged speaks noise here: its losses tell, and a monitor must not end its training.
    logits = logits.double().nan_to_num()
    if temperature == 0:
        return int(logits.argmax())
    shares = ((logits - logits.max()) / temperature).softmax(0)
    return int(torch.multinomial(shares, 1, generator=generator))
