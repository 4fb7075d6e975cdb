"""A mixture of whole CHERRY models: p(y|x) = sum_e g_e(x) p_e(y|x).

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A router gives every token a gate for each model. A text is read by its top k of the models, chosen once by the mean
gates over its first tokens, the prefix. What is returned as logits are logarithms of the mixture's probabilities.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_cherry import CherryConfig
from .modeling_cherry import CherryForCausalLM, CherryPreTrainedModel, kept, positions_of


class CherryMixtureConfig(CherryConfig):
    """A model's configuration, and how many of them there are."""

    model_type = "cherry_mixture"
    KEYS: ClassVar[dict[str, Any]] = {
        **CherryConfig.KEYS,
        "mixture_experts": 2,
        "mixture_top_k": 2,  # so many of them read a text
        "mixture_prefix": 64,  # tokens by which they are chosen
        "router_hidden": 64,
    }

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # without an own one, transformers would write another


class Router(nn.Module):
    """Gates from the last token and the mean of all so far."""

    def __init__(self, config: CherryMixtureConfig) -> None:
        super().__init__()
        r = config.router_hidden
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, r))
        self.inner = nn.Parameter(torch.randn(r, 2 * r) * (2 * r) ** -0.5)
        self.outer = nn.Parameter(torch.randn(config.mixture_experts, r) * 0.1 * r**-0.5)
        self.centre = nn.Parameter(torch.zeros(config.mixture_experts), requires_grad=False)

    def forward(self, tokens: Tensor, there: Tensor) -> Tensor:
        """Logarithms of the gates for the token after each one, [b, s, experts] in single precision.

        Args:
            tokens: [b, s].
            there: [b, s], false on padding.
        """
        now = F.embedding(tokens, self.embedding).float()
        count = there.cumsum(1).clamp(min=1).unsqueeze(-1)
        mean = (now * there.unsqueeze(-1)).cumsum(1) / count
        hidden = F.silu(F.linear(torch.cat((now, mean), -1), self.inner.float()))
        return (F.linear(hidden, self.outer.float()) - self.centre.float()).log_softmax(-1)


class MixtureCache(Cache):
    """What is kept of a batch: its tokens, which models read each text, and of each model the keys and values."""

    def __init__(self, experts: int) -> None:
        super().__init__(layers=[])
        self.tokens: Tensor | None = None  # [b, s]
        self.chosen: Tensor | None = None  # [b, experts]
        self.experts = [DynamicCache() for _ in range(experts)]  # of the rows that are a model's

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.tokens is None else self.tokens.shape[1]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beams are of one prompt, so they change places with others that the same models read."""
        assert self.tokens is not None and self.chosen is not None
        for cache, reads in zip(self.experts, self.chosen.unbind(1), strict=True):
            place = reads.cumsum(0) - 1
            if bool(reads.any()):
                cache.reorder_cache(place[beam_idx[reads]])  # type: ignore[arg-type]
        self.tokens, self.chosen = self.tokens[beam_idx], self.chosen[beam_idx]

    def crop(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("a mixture keeps what it has read; generate without assistant models")


class CherryMixtureForCausalLM(CherryPreTrainedModel, GenerationMixin):
    config: CherryMixtureConfig
    config_class = CherryMixtureConfig

    def __init__(self, config: CherryMixtureConfig) -> None:
        super().__init__(config)
        self.experts = nn.ModuleList([CherryForCausalLM(config) for _ in range(config.mixture_experts)])
        self.router = Router(config)
        self._tied_weights_keys = {
            f"experts.{number}.{one}": f"experts.{number}.{other}"
            for number in range(config.mixture_experts)
            for one, other in CherryForCausalLM._tied_weights_keys.items()
        }
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loops: int | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Log-probabilities [b, s, v], and with `labels` [b, s] the mean cross-entropy of the tokens named there.

        Tokens of the prefix have no loss: by them the models are chosen that predict them.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        learns = self.training and torch.is_grad_enabled()
        memory = self._cache_of(past_key_values if cache is None else cache) if use_cache and not learns else None
        past = memory.tokens if memory is not None and memory.tokens is not None else input_ids[:, :0]
        tokens, new = torch.cat((past, input_ids), 1), input_ids.shape[1]
        there = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        gates = self.router(tokens, there)
        in_prefix = there & (there.cumsum(1) <= self.config.mixture_prefix)
        chosen = (
            memory.chosen if memory is not None and memory.chosen is not None else self._choose(gates, in_prefix)
        )
        if memory is not None:
            memory.tokens, memory.chosen = tokens, chosen
        positions = positions_of(tokens[:, -new:], there, past.shape[1]) if position_ids is None else position_ids
        log_gates = gates.masked_fill(~chosen.unsqueeze(1), float("-inf")).log_softmax(-1)[:, -new:]
        asked = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        log_gates = log_gates[:, asked]
        found = log_gates.new_full((*log_gates.shape[:2], self.config.vocab_size), float("-inf"))
        positions = positions.expand(len(tokens), -1)
        for number, expert in enumerate(self.experts):
            rows = chosen[:, number].nonzero().flatten()
            if not len(rows):
                continue
            logits = expert(
                input_ids[rows], None if attention_mask is None else attention_mask[rows], positions[rows],
                use_cache=memory is not None, logits_to_keep=logits_to_keep, loops=loops,
                cache=None if memory is None else memory.experts[number],
            ).logits  # fmt: skip
            likely = logits.float().log_softmax(-1) + log_gates[rows, :, number, None]
            found = found.index_copy(0, rows, torch.logaddexp(found[rows], likely))
        loss = None
        if labels is not None:
            labels = labels.masked_fill(in_prefix[:, -new:], -100)
            loss = self.loss_function(logits=found, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=found, **kept(memory))

    def _cache_of(self, cache: Cache | None) -> MixtureCache:
        """The given cache, or a new one in place of the empty one that `generate` makes for single models."""
        if isinstance(cache, MixtureCache):
            return cache
        if cache is not None and cache.get_seq_length():
            raise ValueError("a mixture goes on from a MixtureCache alone")
        return MixtureCache(self.config.mixture_experts)

    def _choose(self, gates: Tensor, in_prefix: Tensor) -> Tensor:
        """Which models read each text, [b, experts]; gates: [b, s, experts], in_prefix: [b, s]."""
        shares = in_prefix / in_prefix.sum(1, keepdim=True).clamp(min=1)
        scores = (gates.exp() * shares.unsqueeze(-1)).sum(1)
        best = scores.argsort(dim=-1, descending=True, stable=True)[:, : self.config.mixture_top_k]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)

    def predict_ahead(self, input_ids: Tensor, loops: int | None = None) -> list[Tensor]:
        """As of a single model, but log-probabilities, mixed by the gates of the position that predicts."""
        there = torch.ones_like(input_ids, dtype=torch.bool)
        gates = self.router(input_ids, there)
        chosen = self._choose(gates, there & (there.cumsum(1) <= self.config.mixture_prefix))
        log_gates = gates.masked_fill(~chosen.unsqueeze(1), float("-inf")).log_softmax(-1)
        found, experts = [], list[Any](self.experts)
        for of_depth in zip(*(expert.predict_ahead(input_ids, loops) for expert in experts), strict=True):
            likely = [logits.float().log_softmax(-1) for logits in of_depth]
            shares = log_gates[:, : likely[0].shape[1]].unsqueeze(-2).unbind(-1)  # [b, s - n, 1] of each model
            found.append(torch.stack([p + g for p, g in zip(likely, shares, strict=True)]).logsumexp(0))
        return found
