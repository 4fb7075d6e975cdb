"""From logits to a token: temperature, the likeliest k, the likeliest that make up a share p."""

import torch
from torch import Tensor

from cherry_megatron.config import Generation


def pick(logits: Tensor, options: Generation, generator: torch.Generator) -> int:
    """One of the tokens, drawn from what `drawable` leaves of softmax(logits / temperature); at 0 the likeliest.

    Torch draws one token as the largest of shares over exponential variates, a Gumbel-max draw. So with a generator
    in the same state similar logits mostly give the same token, on which drafting rests (see draft.py).

    Args:
        logits: [v].
        options: temperature, top_k, top_p.
        generator: of the draw.
    """
    # A model that has diverged speaks noise here: its losses tell, and a monitor must not end its training.
    logits = logits.double().nan_to_num()
    if options.temperature == 0:
        return int(logits.argmax())
    shares = ((logits - logits.max()) / options.temperature).softmax(0)
    return int(torch.multinomial(drawable(shares, options.top_k, options.top_p), 1, generator=generator))


def drawable(shares: Tensor, top_k: int, top_p: float) -> Tensor:
    """Shares of the tokens that may be drawn, 0 of all others; they need not add up to 1.

    Args:
        shares: of all tokens, [v]. Of equal ones the first counts as the likelier.
        top_k: so many of the likeliest may be drawn (Fan et al. 2018); 0 for all.
        top_p: of these the fewest likeliest that have at least this part of their sum (nucleus sampling, Holtzman
            et al. 2020, arXiv 1904.09751); 1 for all.
    """
    if top_k == 0 and top_p == 1:
        return shares
    ordered, order = shares.sort(descending=True, stable=True)
    if top_k:
        ordered[top_k:] = 0
    if top_p < 1:
        likelier = ordered.cumsum(0) - ordered
        ordered[likelier >= top_p * ordered.sum()] = 0
    return torch.zeros_like(shares).scatter(0, order, ordered)
