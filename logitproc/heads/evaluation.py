"""What a head costs: its predictions beside those of the dense head, on hidden states of a text."""

import math
from typing import NamedTuple

import torch
from torch import nn

from .calibration import Calibration


class Figures(NamedTuple):
    """Means over the states of a text; nats where not said otherwise."""

    perplexity_ratio: float  # exp(CE of the head - CE of the dense head)
    perplexity: float  # of the dense head
    kl: float  # KL(dense || head)
    agreement: float  # how often both find the same token most probable
    distinct: int  # different tokens that the head finds most probable
    distinct_dense: int
    tokens: int


@torch.no_grad()
def evaluate(head: nn.Module, calibration: Calibration) -> Figures:
    """Compare `head` with the dense head that the calibration was collected from."""
    device = calibration.weight.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    seen = torch.zeros(2, len(calibration.weight), dtype=torch.bool, device=device)
    for states, labels, logits in calibration.logits():
        approximate = calibration.seen(head(states))
        log_p = logits.log_softmax(-1)
        log_q = approximate.to(logits.dtype).log_softmax(-1)
        labels = labels.to(device)[:, None]
        kl = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
        ours, theirs = approximate.argmax(-1), logits.argmax(-1)
        seen[0, ours], seen[1, theirs] = True, True
        parts = (-log_q.gather(1, labels), -log_p.gather(1, labels), kl, ours == theirs)
        sums += torch.stack([part.double().sum() for part in parts])
    ce, dense, kl, agreement = (sums / len(calibration.states)).tolist()
    ratio = math.exp(ce - dense) if ce - dense < 700 else math.inf
    ours, theirs = seen.sum(1).tolist()
    return Figures(ratio, math.exp(dense), kl, agreement, ours, theirs, len(calibration.states))
