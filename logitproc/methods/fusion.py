"""Logit fusion: move a large model as far as a small one was moved by fine-tuning, or weigh the candidates.

Fan et al., "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion", arXiv:2406.15480 (2024);
Liu et al., "Tuning Language Models by Proxy", arXiv:2401.08565 (`mode="static"`). With the host's scores z, the
small base's z_S and the small experts' z_t,

    d_t = z_t - z_S        z' = z + sum over t of alpha_t d_t        P, Q, Q_t, P' = softmax of z, z_S, z_t, z'
    c1_t = KL(Q_t || Q)    c2_t = KL(Q || Q_t)      R = KL(P' || P)      F = KL(P || P')      J = R + F

    static   alpha as given
    grid     argmin (R - c1)^2 + (F - c2)^2 over alpha = 0, .1, ..., 2: the paper's rule, section 3.1
    newton   R = c1, F = c2 or J = c1 + c2, a root
    select   the paper's rule for several experts: the grid of each against the mean of the c_t, best one acts
    match    argmin KL(sum over t of w_t Q_t || P'), convex ("level"); or mean of d shifted as it was ("shift")
    mixture  z' = ln sum over j of w_j P_j, components P, Q_t and static fusions, w_j by how well each predicted
             the text so far: on any text the loss is at most that of the best component plus ln M nats

Differs from the paper: alpha is solved for anew at every step (read literally, the printed loop freezes it);
temperature acts after fusion; everything but `static`, `grid` and `select`. The mixture is Vovk's and Cover's;
its fixed share is Herbster and Warmuth, "Tracking the Best Expert", Machine Learning 32 (1998).
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import tilt
from ..ops import plausible, within_budget

Mode = Literal["static", "grid", "newton", "select", "match", "mixture"]
Kind = Literal["level", "shift"]
FORBIDDEN = -1e30  # a score below it is a mask, whatever finite number a model uses for one
DEAD = 1e-6  # nats; an expert closer to its base than this says nothing
GRID = 10  # points a unit
CACHED = 1 << 18  # scores; on a CPU, rows are solved so many at a time, to stay in its caches


# --- math ---


class Fusion(NamedTuple):
    """Fused scores and how they came about; T experts."""

    scores: Tensor  # [rows, V]
    alpha: Tensor  # [rows, T]
    kl: Tensor  # [rows, T], c1 = KL(Q_t || Q)
    reverse_kl: Tensor  # [rows, T], c2 = KL(Q || Q_t)
    beyond: Tensor  # bool [rows]: the root lies beyond the bound
    dead: Tensor  # bool [rows, T]: the expert equals its base here


class Shifts(NamedTuple):
    """d on the tokens that host, base and all experts allow, less its value at the host's first choice; 0 elsewhere."""

    d: Tensor  # [rows, T, V]
    first: Tensor  # int64 [rows, 1], the host's first choice among these tokens
    inside: Tensor | None  # bool [rows, V]; None when all tokens are
    blocked: Tensor | None  # bool [rows, T, V]: forbidden by expert t


class Divergences(NamedTuple):
    """What the solvers aim at; distributions renormalised on the common support."""

    variance: Tensor  # [rows, T], of d_t under P
    expert_mean: Tensor  # [rows, T, T], E_{Q_s} d_t
    base_mean: Tensor  # [rows, T], E_Q d_t
    kl: Tensor  # [rows, T], c1 = KL(Q_t || Q)
    reverse_kl: Tensor  # [rows, T], c2 = KL(Q || Q_t)
    change: Tensor  # [rows, T], c1 + c2 = E_{Q_t} d_t - E_Q d_t, without their cancellation


def fuse(host: Tensor, base: Tensor, experts: Sequence[Tensor], mode: Mode = "newton", *,
         target: tilt.Target = "J", bounds: Sequence[tuple[float, float]] = ((0.0, 2.0),),
         kind: Kind = "level", weights: Tensor | None = None, ridge: float = 1e-3, centre: float = 0.0,
         steps: int = 12) -> Fusion:  # fmt: skip
    """Solve for one alpha an expert and row, and fuse; every mode but `static` and `mixture`.

    Shapes: host, base and each expert [rows, V], float32 or float64, where -inf or less than -1e30 forbids a
    token; weights [rows, T], of the experts in `match`, equal if left out. bounds has one (low, high), or one an
    expert. grid and newton take one expert. ridge and centre as in `tilt.match`.

    A constant added to a row of any input changes no softmax. Tokens are compared on the common support. A row
    with alpha 0 is the host's, bit for bit: so is one whose experts equal the base (up to a constant), and one
    without a token that all allow. What the host forbids, or an expert with another alpha, is forbidden; where
    only the base forbids, d is 0.
    """
    options = (mode, target, bounds, kind, ridge, centre, steps)
    on_cpu = host.device.type == "cpu"
    rows = max(1, torch.get_num_threads() * CACHED // host.shape[1] if on_cpu else len(host))
    part = lambda x, i: None if x is None else x[i : i + rows]
    parts = [
        _fuse(part(host, i), part(base, i), [e[i : i + rows] for e in experts], part(weights, i), *options)
        for i in range(0, max(1, len(host)), rows)
    ]
    return parts[0] if len(parts) == 1 else Fusion(*map(torch.cat, zip(*parts, strict=True)))


def _fuse(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], weights: Tensor | None, mode: Mode, target: tilt.Target,
    bounds: Sequence[tuple[float, float]], kind: Kind, ridge: float, centre: float, steps: int,
) -> Fusion:  # fmt: skip
    s = shifts(host, base, experts)
    family, c = _measure(host, base, experts, s)
    rows, count = c.kl.shape
    bounds = list(bounds) * (count if len(bounds) == 1 else 1)
    beyond = torch.zeros(rows, dtype=torch.bool, device=host.device)
    dead = ~((c.change >= DEAD) & (c.variance > 0))  # true for NaN: a row without a common token
    if mode == "newton":
        goal = {"R": c.kl, "F": c.reverse_kl, "J": c.change}[target][:, 0].clamp(min=0)
        low, high = bounds[0]
        a, beyond = tilt.root(family, c.variance[:, 0], goal, target, high, steps)
        a = a.clamp(min=low)[:, None]
    elif mode == "match":
        w = torch.full_like(c.kl, 1 / count) if weights is None else weights.to(c.kl.dtype)
        goal = (w[:, None] @ c.expert_mean).squeeze(1)
        if kind == "shift":
            goal = goal + family.mean - c.base_mean
        low, high = (c.kl.new_tensor(side).expand(rows, count) for side in zip(*bounds, strict=True))
        a = tilt.match(family, goal, low, high, ridge, centre, steps)
    else:  # grid; for several experts select: each on its grid against the mean of the divergences, the best acts
        kl, reverse_kl = c.kl.mean(1), c.reverse_kl.mean(1)
        found = [tilt.grid(family.one(t), kl, reverse_kl, _points(*bounds[t])) for t in range(count)]
        best, loss = (torch.stack(part, 1) for part in zip(*found, strict=True))
        a = best * torch.nn.functional.one_hot(loss.argmin(1), count)
    a = torch.where(dead, 0.0, a)
    return Fusion(shift(host, s, a), a, c.kl, c.reverse_kl, beyond & ~dead[:, 0], dead)


def shifts(host: Tensor, base: Tensor, experts: Sequence[Tensor]) -> Shifts:
    """See `fuse` for the shapes."""
    d = torch.stack([e - base for e in experts], 1) if len(experts) > 1 else (experts[0] - base)[:, None]
    allowed = torch.stack([x.amin() for x in (host, base, *experts)]).amin() > FORBIDDEN  # false for NaN
    if host.device.type == "cpu" and bool(allowed):
        first = host.max(-1, keepdim=True).indices
        return Shifts(d.sub_(d.gather(-1, _each(first, d))), first, None, None)
    blocked = torch.stack([~(e > FORBIDDEN) for e in experts], 1)
    inside = (host > FORBIDDEN) & (base > FORBIDDEN) & ~blocked.any(1)
    first = host.masked_fill(~inside, -torch.inf).max(-1, keepdim=True).indices
    outside = ~inside[:, None]
    d.masked_fill_(outside, 0.0).sub_(d.gather(-1, _each(first, d))).masked_fill_(outside, 0.0)
    return Shifts(d, first, inside, blocked)


def _each(index: Tensor, d: Tensor) -> Tensor:
    return index[:, None].expand(-1, d.shape[1], -1)


def shift(host: Tensor, s: Shifts, alpha: Tensor) -> Tensor:
    """host + sum over t of alpha_t d_t, where no expert with alpha_t other than 0 forbids; alpha [rows, T]."""
    if s.d.shape[1] == 1:
        out = torch.addcmul(host, s.d[:, 0], alpha)
    else:
        out = torch.baddbmm(host[:, None], alpha[:, None], s.d).squeeze(1)
    if s.blocked is None or s.inside is None:
        return out
    forbidden = (s.blocked & (alpha != 0)[:, :, None]).any(1)
    out = out.masked_fill(forbidden, -torch.inf)
    return torch.where(s.inside.any(-1, keepdim=True), out, host)


def _measure(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], s: Shifts
) -> tuple[tilt.Family, Divergences]:
    """The host's tilts, and how far each expert lies from the base."""
    d = s.d.unbind(1)

    def read(scores: Tensor) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor]:
        if s.inside is not None:
            scores = scores.masked_fill(~s.inside, -torch.inf)
        log_w, w, total = tilt.weights(scores)
        terms = [w * x for x in d]
        mean = torch.stack([x.sum(-1) for x in terms], 1) / total[:, None]
        return log_w, total, terms, mean, log_w.gather(-1, s.first).squeeze(-1) - total.log()

    log_w, total, terms, mean, _ = read(host)
    square = torch.stack([x.mul_(y).sum(-1) for x, y in zip(terms, d, strict=True)], 1) / total[:, None]
    family = tilt.Family(log_w, total.log(), s.d, mean)
    *_, base_mean, base_first = read(base)
    parts = [read(expert)[-2:] for expert in experts]
    expert_mean = torch.stack([x for x, _ in parts], 1)
    own = expert_mean.diagonal(dim1=1, dim2=2)
    ratio = base_first[:, None] - torch.stack([x for _, x in parts], 1)  # ln E_Q exp d_t, as d_t is 0 at `first`
    c = Divergences(square - mean.square(), expert_mean, base_mean, (own - ratio).clamp(min=0),
                    (ratio - base_mean).clamp(min=0), own - base_mean)  # fmt: skip
    return family, c


def _points(low: float, high: float) -> range:
    """k such that k / 10 lies in [low, high]."""
    return range(math.ceil(low * GRID - 1e-9), math.floor(high * GRID + 1e-9) + 1)


# --- mixture ---


def mix(components: Sequence[Tensor], log_weights: Tensor) -> Tensor:
    """ln sum over j of w_j softmax(component_j), [rows, V]; components [rows, V] each, log_weights [rows, M].

    One component is returned as it came. Identical components give their common softmax.
    """
    if len(components) == 1:
        return components[0]
    out = components[0].log_softmax(-1).add_(log_weights[:, :1])
    for j, scores in enumerate(components[1:], 1):
        out = torch.logaddexp(out, scores.log_softmax(-1).add_(log_weights[:, j : j + 1]))
    return out


def updated(log_weights: Tensor, log_likelihood: Tensor, share: float) -> Tensor:
    """Weights after a token: w_j ~ w_j pi_j(token), then w_j = (1 - share) w_j + share / M; ln, [rows, M].

    log_likelihood [rows, M] holds ln pi_j(token). A component that gave the token probability 0 has weight 0, and
    with a share recovers. A token that no component of any weight thought possible makes all weights equal.
    """
    count = log_weights.shape[1]
    w = (log_weights + log_likelihood).log_softmax(-1).nan_to_num(nan=-math.log(count), neginf=-torch.inf)
    if not share:
        return w
    even = torch.full_like(w, math.log(share / count))
    return torch.logaddexp(w + math.log1p(-share), even)
