"""Operations on scores in plain torch: what each kernel of the same name must return. Rows are the last axis."""

import torch
from torch import Tensor

from .dispatch import op


@op
def nll(scores: Tensor, target: Tensor) -> Tensor:
    """-ln softmax(scores)[target], nats: scores [rows, V], target int64 [rows] -> [rows].

    Infinite for a target of -inf; NaN for a row without a finite score.
    """
    return torch.nn.functional.cross_entropy(scores, target, reduction="none")


@op
def divergences(base: Tensor, processed: Tensor) -> tuple[Tensor, ...]:
    """(JS, KL(q || p), KL(p || q), TV, best of p, best of q), [rows] each; p, q = softmax of the scores [rows, V].

    JS and KL in nats, best int64: the most probable token. With d = ln(q/p), taken as 0 where both are forbidden,
    and h = ln((1 + exp(-|d|)) / 2),

        JS = -(1/2) sum_v [ (p + q) h + p max(d, 0) + q max(-d, 0) ]

    which neither overflows nor loses small divergences, and is exactly 0 for equal scores. A weight of 0
    makes its term 0, whatever d is. Sums over the vocabulary are float64. NaN for a row without a finite score.
    """
    log_p, log_q = base.double().log_softmax(-1), processed.double().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    d = torch.where((p == 0) & (q == 0), 0.0, log_q - log_p)
    h = (torch.expm1(-d.abs()) / 2).log1p()
    js = -0.5 * (((p + q) * h).sum(-1) + _expect(p, d.clamp(min=0)) + _expect(q, (-d).clamp(min=0)))
    tv = (p - q).abs().sum(-1) / 2
    return js, _expect(q, d), _expect(p, -d), tv, base.argmax(-1), processed.argmax(-1)


def _expect(weight: Tensor, value: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight * value).sum(-1)


def plausible(p: Tensor, alpha: float) -> Tensor:
    """bool, as p [..., width]: p >= alpha max p (Li et al., "Contrastive Decoding", arXiv:2210.15097, eq. 2)."""
    return p >= alpha * p.amax(-1, keepdim=True)


@op
def within_budget(scores: Tensor, bias: Tensor, nats: float) -> Tensor:
    """s [..., 1], the largest s in [0, 1] with KL(softmax(scores + s bias), softmax(scores)) <= nats.

    KL grows with s (its derivative is s Var_q(bias)), so bisection is safe; s = 1 where that fits.
    """
    log_p = scores.log_softmax(-1)

    def divergence(s: Tensor) -> Tensor:
        log_q = torch.addcmul(log_p, bias, s).log_softmax(-1)
        log_ratio = (log_q - log_p).nan_to_num_(0.0)  # NaN where both are -inf
        return torch.linalg.vecdot(log_q.exp_(), log_ratio)[..., None]

    low, high = torch.zeros_like(scores[..., :1]), torch.ones_like(scores[..., :1])
    whole = divergence(high) <= nats
    for _ in range(20):
        middle = (low + high) / 2
        fits = divergence(middle) <= nats
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.where(whole, 1.0, low)
