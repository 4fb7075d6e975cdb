"""From logits to a token: temperature, the likeliest k, the likeliest that make up a share p."""

import torch
from torch import Tensor

from cherry_megatron.inference.options import Generation


def shares_of(logits: Tensor, options: Generation) -> Tensor:
    """What `drawable` leaves of softmax(logits / temperature); at 0 the likeliest has it all.

    Args:
        logits: [..., v].
        options: temperature, top_k, top_p.

    Returns:
        [..., v] of float64, on the device of the logits.
    """
    # A model that has diverged speaks noise here: its losses tell, and a monitor must not end its training.
    logits = logits.double().nan_to_num()
    if options.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    shares = ((logits - logits.amax(-1, keepdim=True)) / options.temperature).softmax(-1)
    return drawable(shares, options.top_k, options.top_p)


def pick(shares: Tensor, options: Generation, generator: torch.Generator) -> int:
    """One of the tokens.

    Torch draws one token as the largest of shares over exponential variates, a Gumbel-max draw. So with a generator
    in the same state similar logits mostly give the same token, on which drafting rests (see draft.py).

    Args:
        shares: [v], of `shares_of` with the same options.
        options: at temperature 0 nothing is drawn.
        generator: of the draw.
    """
    if options.temperature == 0:
        return int(shares.argmax())
    return int(torch.multinomial(shares, 1, generator=generator))


def drawable(shares: Tensor, top_k: int, top_p: float) -> Tensor:
    """Shares of the tokens that may be drawn, 0 of all others; they need not add up to 1.

    Args:
        shares: of all tokens, [..., v]. Of equal ones the first counts as the likelier.
        top_k: so many of the likeliest may be drawn (Fan et al. 2018); 0 for all.
        top_p: of these the fewest likeliest that have at least this part of their sum (nucleus sampling, Holtzman
            et al. 2020, arXiv 1904.09751); 1 for all.
    """
    if top_k == 0 and top_p == 1:
        return shares
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[..., top_k:] = 0
    if top_p < 1:
        likelier = ordered.cumsum(-1) - ordered
        beyond = likelier >= top_p * ordered.sum(-1, keepdim=True)
        beyond[..., 0] = False  # also where the smallest top_p makes the right side 0
        ordered[beyond] = 0
    return torch.zeros_like(shares).scatter(-1, order, ordered)
