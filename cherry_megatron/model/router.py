"""The router of a mixture: how likely each expert is for the next token, from the tokens so far.

A cumulative mean of token embeddings, the last embedding beside it, and one hidden layer. The mean is the simplest
summary of a text that is causal by construction and costs one cumulative sum; a topic, which is what whole models
can divide between them, shows in it. It is small enough to be replicated on every rank.
"""

import torch
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from cherry_megatron.model.options import Mixture
from cherry_megatron.model.seeding import seeded


class Router(MegatronModule):
    """Gates of every token.

    Args:
        config: Megatron's configuration of an expert.
        mixture: how many gates, and the width r.
        vocabulary: rows of the embedding.
        seed: initial weights depend on it alone.

    Attributes:
        centre: [experts], taken off the logits; no weight. Frequent words are in every sequence, and what a fresh
            router says of them would make the same experts the favourites of nearly all sequences.
    """

    centre: Tensor

    def __init__(self, config: TransformerConfig, mixture: Mixture, vocabulary: int, seed: int) -> None:
        super().__init__(config)
        with seeded(seed, "router"):
            drawn = {name: torch.randn(shape) * std for name, (shape, std) in mixture.router(vocabulary).items()}
        self.embedding = torch.nn.Parameter(drawn["embedding"].to(config.params_dtype))
        self.inner = torch.nn.Parameter(drawn["inner"].to(config.params_dtype))
        self.outer = torch.nn.Parameter(drawn["outer"].to(config.params_dtype))
        self.register_buffer("centre", torch.zeros(mixture.experts))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logarithms of the gates for the token after each one.

        Args:
            tokens: [b, s].

        Returns:
            [b, s, experts] float32; what stands at t depends on tokens up to t alone.
        """
        now = F.embedding(tokens, self.embedding).float()  # [b, s, r]
        count = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).unsqueeze(-1)
        mean = now.cumsum(1) / count
        hidden = F.silu(F.linear(torch.cat((now, mean), -1), self.inner.float()))
        return (F.linear(hidden, self.outer.float()) - self.centre.float()).log_softmax(-1)

    def centre_on(self, log_gates: Tensor) -> None:
        """Take off what all sequences have in common.

        Args:
            log_gates: [rows, experts], the mean of each sequence.
        """
        common = log_gates.mean(0)
        # Gates do not depend on the mean over experts, and it would cost digits in BF16.
        self.centre.add_(common - common.mean())
