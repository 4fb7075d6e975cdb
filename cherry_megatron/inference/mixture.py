"""Texts through a mixture: each expert reads those that it was chosen for, and the next token is drawn from all.

    log p(y|x) = logsumexp_e(log g_e(x) + log p_e(y|x))

A text's experts are chosen once, from its prompt as far as the prefix reaches. Ranks with other experts read the
same texts, and exchange log-probabilities of the whole vocabulary: one row a token, unlike training.
"""

from collections.abc import Callable, Sequence

import torch
from megatron.core import mpu
from megatron.training import get_args
from torch import Tensor

from cherry_megatron.inference.reader import Reader, Reads
from cherry_megatron.model.choice import top
from cherry_megatron.model.experts import routers_of
from cherry_megatron.model.mixture import MixtureModel, mixture_of


class MixtureReader:
    """As Reader, of a mixture. The router reads whole texts in every pass; it is small.

    Args:
        mixture: on this rank.
        rows, longest, loops, depths: as Reader's.
    """

    def __init__(self, mixture: MixtureModel, rows: int, longest: int, loops: int, depths: int = 0) -> None:
        self._mixture, self._sizes, self._depths = mixture, (longest, loops, depths), depths
        self._chosen: Tensor | None = None  # [n, experts]
        self._readers: dict[int, Reader] = {}
        self._places: dict[int, list[int]] = {}  # of the texts that an expert here reads

    def logits_after(self, texts: Sequence[Sequence[int]], count: int) -> Tensor:
        """As Reader's; log-probabilities."""
        gates = self._gates(texts)
        if self._chosen is None:
            self._choose(gates, [len(text) - count + 1 for text in texts])
        last = torch.stack([of[len(text) - count : len(text)] for of, text in zip(gates, texts, strict=True)])
        return self._mixed(last, texts, lambda reader, theirs: reader.logits_after(theirs, count))

    def logits_ahead(self, texts: Sequence[Sequence[int]], drafted: int) -> Tensor:
        """As Reader's; log-probabilities, with the gates of the position that predicts, as in training."""
        back = min(drafted + 1, self._depths)
        gates = self._gates(texts)
        last = torch.stack([of[len(text) - 1 - back] for of, text in zip(gates, texts, strict=True)])
        return self._mixed(last.unsqueeze(1), texts, lambda reader, theirs: reader.logits_ahead(theirs, drafted))

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some texts alone."""
        if self._chosen is None:
            return
        self._chosen = self._chosen[list(rows)]
        for expert, places in list(self._places.items()):
            staying = [place for place, row in enumerate(places) if row in rows]
            self._places[expert] = [new for new, row in enumerate(rows) if row in places]
            if staying:
                self._readers[expert].keep(staying)
            else:
                del self._places[expert], self._readers[expert]

    def _mixed(
        self,
        gates: Tensor,
        texts: Sequence[Sequence[int]],
        logits_of: Callable[[Reader, list[Sequence[int]]], Tensor | None],
    ) -> Tensor:
        """Log-probabilities of the mixture, [n, count, v].

        Args:
            gates: [n, count, experts], logarithms, of all experts.
            texts: all rows.
            logits_of: what an expert says of its texts, [its rows, count, v].
        """
        assert self._chosen is not None
        log_gates = gates.masked_fill(~self._chosen.unsqueeze(1), float("-inf")).log_softmax(-1)
        found = gates.new_full((*gates.shape[:2], get_args().padded_vocab_size), float("-inf"))
        for expert, places in self._places.items():
            logits = logits_of(self._readers[expert], [texts[place] for place in places])
            assert logits is not None  # there are no pipeline stages
            likely = logits.log_softmax(-1) + log_gates[places, :, expert, None]
            found[places] = found[places].logaddexp(likely)
        return self._together(found)

    def _gates(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Logarithms of the gates, [n, longest text, experts]; the same on all tensor-parallel ranks."""
        tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = torch.tensor(text)  # what is behind a text changes no gate within it
        gates: Tensor = self._mixture.router(tokens.to(torch.cuda.current_device()))
        torch.distributed.broadcast(gates, group=self._mixture.pg_collection.tp, group_src=0)
        return gates

    def _choose(self, gates: Tensor, prompts: Sequence[int]) -> None:
        """gates: [n, s, experts]; prompts: tokens of each."""
        scores = torch.cat(
            [self._mixture.scores(of[None, :given]) for of, given in zip(gates, prompts, strict=True)]
        )
        self._chosen = top(scores, self._mixture.options.top_k)
        for name, expert in self._mixture.experts.items():
            places = self._chosen[:, int(name)].nonzero().flatten().tolist()
            if places:
                self._places[int(name)] = places
                self._readers[int(name)] = Reader([expert], len(places), *self._sizes)

    def _together(self, found: Tensor) -> Tensor:
        """With what the experts on other ranks say."""
        group = self._mixture.pg_collection.ep
        peak = found.clone()
        torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX, group=group)
        shares = (found - peak).exp()
        torch.distributed.all_reduce(shares, group=group)
        return peak + shares.log()


def readers(model: list[torch.nn.Module]) -> tuple[Callable[..., Reads], torch.distributed.ProcessGroup]:
    """What reads texts with this model, from the arguments of Reader but the model.

    Returns:
        It, and the group of the ranks that can share out texts.
    """
    mixture = mixture_of(model[0])
    if mixture is None:
        return lambda *sizes: Reader(model, *sizes), _apart_from_experts(model)
    return lambda *sizes: MixtureReader(mixture, *sizes), mixture.pg_collection.expt_dp


def _apart_from_experts(model: list[torch.nn.Module]) -> torch.distributed.ProcessGroup:
    """The group of ranks whose passes do not meet: data-parallel ones, with experts inside layers a part of them.

    Ranks that exchange tokens in a layer `E` must make the same passes. The rules see to it that those are whole
    tensor-parallel groups, or the other way round (expert_rules.py).
    """
    if any(True for chunk in model for _ in routers_of(chunk)):
        exchanging = mpu.get_expert_tensor_and_model_parallel_group().size()
        if exchanging > mpu.get_tensor_model_parallel_world_size():
            return mpu.get_expert_data_parallel_group()
    return mpu.get_data_parallel_group()
