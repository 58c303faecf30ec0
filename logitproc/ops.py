"""Operations on distributions that several methods share, in plain torch. Rows are the last axis."""

import torch
from torch import Tensor


def plausible(p: Tensor, alpha: float) -> Tensor:
    """bool, as p [..., width]: p >= alpha max p (Li et al., "Contrastive Decoding", arXiv:2210.15097, eq. 2)."""
    return p >= alpha * p.amax(-1, keepdim=True)


def within_budget(scores: Tensor, bias: Tensor, nats: float, steps: int = 24) -> Tensor:
    """s [..., 1], the largest s in [0, 1] with KL(softmax(scores + s bias), softmax(scores)) <= nats.

    KL grows with s (its derivative is s Var_q(bias)), so bisection is safe; s = 1 where that fits.
    """
    log_p = scores.log_softmax(-1)

    def divergence(s: Tensor) -> Tensor:
        log_q = (scores + s * bias).log_softmax(-1)
        return torch.where(log_q > -torch.inf, log_q.exp() * (log_q - log_p), 0.0).sum(-1, keepdim=True)

    low, high = torch.zeros_like(scores[..., :1]), torch.ones_like(scores[..., :1])
    whole = divergence(high) <= nats
    for _ in range(steps):
        middle = (low + high) / 2
        fits = divergence(middle) <= nats
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.where(whole, 1.0, low)
