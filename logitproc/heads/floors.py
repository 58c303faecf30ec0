"""What ties cost: bounds on a head whose tokens share codes, known before anything is trained.

All tokens of a code have one logit, so P(v | h) = P(code | h) / n(v) with n(v) the tokens of the code of v, and

    CE = CE_cluster + E[ln n(v)]

whatever the codes are: the second term, the tie floor, depends on the mapping and on how common tokens are.
"""

import torch
from torch import Tensor

from ..checks import whole


def tie_floor(p: Tensor, mapping: Tensor) -> float:
    """E[ln n(v)] nats: p [V] sums to 1 (shares of tokens in a text), mapping [V] int holds the code of each."""
    sizes = torch.bincount(mapping.long())
    return float((p.double() * sizes[mapping.long()].double().log()).sum())


def tie_floor_min(p: Tensor, codes: int) -> float:
    """The smallest `tie_floor` that any mapping to `codes` codes can have (a lower bound), nats.

    With x_v = 1 / n(v), every mapping has sum x = K and 0 < x <= 1. sum p ln x is concave; its maximum is
    x_v = min(1, p_v / L): tokens above the level L have a code of their own, all other codes the same mass.
    0 at K = V; it never grows with K; ln(V/K) for uniform p.

    Raises ValueError unless 1 <= codes <= V.
    """
    check_codes(codes, len(p))
    sorted_p = p.double().sort(descending=True).values
    if codes >= int((sorted_p > 0).sum()):
        return 0.0
    # With T singletons, L = (mass of the others) / (K - T); the right T is the first whose next token is below L.
    rest = sorted_p.flip(0).cumsum(0).flip(0)[:codes]
    level = rest / torch.arange(codes, 0, -1, dtype=torch.float64, device=p.device)
    singles = int((sorted_p[:codes] > level).cumprod(0).sum())
    tail = sorted_p[singles:]
    tail = tail[tail > 0]
    return float((tail * (level[singles] / tail).log()).sum().clamp(min=0))


def check_codes(codes: int, tokens: int) -> None:
    """Raise ValueError unless a codebook of so many codes makes sense."""
    whole("codes", codes, 1)
    if codes > tokens:
        raise ValueError(f"{codes} codes are more than the {tokens} tokens of the vocabulary; take fewer.")
