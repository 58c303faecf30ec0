"""Exponential tilts P_a ~ p exp(a . d) of a distribution: how far they lie from it, and which a lies how far.

With A(a) = ln E_p[exp(a . d)], mu(a) the mean and Sigma(a) the covariance of d under P_a, and mu0 = mu(0):

    R(a) = KL(P_a || p) = a . mu - A     F(a) = KL(p || P_a) = A - a . mu0     J = R + F = a . (mu - mu0)

R, F and J do not decrease along a ray from 0; A and F are convex, R saturates at -ln p(where d is largest). A
constant in d changes no tilt, but is subtracted from itself: for small divergences in float32, d should be small
where p is large.

All rows are solved at once, in the dtype given. On a GPU the number of iterations is fixed, so that nothing waits
for it; on a CPU they end when every row is done.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Target = Literal["R", "F", "J"]
HEADROOM = 40.0  # nats; exp(2 * 40) fits float32
BLOCK = 1 << 17  # scores
TRIALS = (1.0, 0.5, 0.25, 0.125, 0.03125, 0.00390625)  # the last ones are for peaked rows


class Family(NamedTuple):
    """p and the directions d of some rows; the least that the solvers need."""

    log_w: Tensor  # [rows, V], ln p + log_z; at most 0, -inf outside the support
    log_z: Tensor  # [rows]
    d: Tensor  # [rows, T, V], finite everywhere, also outside the support
    mean: Tensor  # [rows, T], mu0

    def one(self, t: int) -> "Family":
        """That of direction t alone."""
        return self._replace(d=self.d[:, t : t + 1], mean=self.mean[:, t : t + 1])


class Moments(NamedTuple):
    """Of a softmax and T directions."""

    log_z: Tensor  # [rows], logsumexp of the scores
    mean: Tensor  # [rows, T]
    variance: Tensor  # [rows, T]


def moments(scores: Tensor, d: Tensor, a: Tensor | None = None) -> Moments:
    """Of softmax(scores + a d): scores [rows, V], d [rows, T, V], a [rows] or none; with a, T = 1.

    One exp a token. On a CPU in blocks of columns, whose temporary results stay in its cache.
    """
    parts = []
    for block in blocks(scores):
        x, directions = scores[:, block], d[:, :, block].unbind(1)
        if a is not None:
            x = torch.addcmul(x, directions[0], a[:, None])
        top = x.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).min)  # a block may be forbidden
        w = (x - top if a is None else x.sub_(top)).exp_()
        sums = [top, w.sum(-1, keepdim=True)]
        for direction in directions:
            term = w * direction if len(directions) > 1 else w.mul_(direction)
            sums.append(term.sum(-1, keepdim=True))
            sums.append(term.mul_(direction).sum(-1, keepdim=True))
        parts.append(torch.cat(sums, -1))
    found = torch.stack(parts)
    top = found[..., :1].amax(0)
    found = (found[..., 1:] * (found[..., :1] - top).exp()).sum(0)
    total, first, second = found[:, :1], found[:, 1::2], found[:, 2::2]
    mean = first / total
    return Moments((top + total.log()).squeeze(-1), mean, (second / total - mean.square()).clamp(min=0))


def blocks(scores: Tensor) -> list[slice]:
    """The columns of scores [rows, V] in parts of about `BLOCK` scores; on a GPU in one part."""
    rows, width = scores.shape
    step = max(1, BLOCK // max(1, rows)) if scores.device.type == "cpu" else width
    return [slice(start, start + step) for start in range(0, width, step)]


def divergence(family: Family, target: Target, a: Tensor) -> tuple[Tensor, Tensor]:
    """(R, F or J of P_a, its derivative along the only direction), each [rows]; a [rows]."""
    m, mean0 = moments(family.log_w, family.d, a), family.mean[:, 0]
    mean, variance, log_z = m.mean[:, 0], m.variance[:, 0], m.log_z - family.log_z
    if target == "R":
        return (a * mean - log_z).clamp(min=0), a * variance
    if target == "F":
        return (log_z - a * mean0).clamp(min=0), mean - mean0
    return (a * (mean - mean0)).clamp(min=0), mean - mean0 + a * variance


def root(
    family: Family, variance: Tensor, nats: Tensor, target: Target, high: float, steps: int = 12
) -> tuple[Tensor, Tensor]:
    """(a in [0, high] with R, F or J = nats, whether it lies beyond high), each [rows]; one direction.

    variance [rows] is that of d under p. A row whose divergence at `high` is below `nats` by more than rounding
    gets exactly `high`.

    Newton on s = sqrt(2 f), nearly linear in a, from the a of small shifts. A step beyond `high` goes to `high`,
    once; one that leaves the bracket known so far bisects it. A row is done with the step after s was near its
    goal, which squares the relative error; from then on it stays.
    """
    goal = (2 * nats).sqrt()
    a = goal / variance.sqrt() / (2**0.5 if target == "J" else 1.0)
    a = a.nan_to_num(0.0).clamp(max=high)
    low, upper = torch.zeros_like(a), torch.full_like(a, torch.inf)
    beyond = done = torch.zeros_like(a, dtype=torch.bool)
    near = 1e-8 if a.dtype is torch.float64 else 3e-4
    for _ in range(steps):
        f, slope = divergence(family, target, a)
        s = (2 * f).sqrt()
        beyond = beyond | (~done & (a == high) & (f < nats))
        low, upper = torch.where(f <= nats, a, low), torch.where(f >= nats, a, upper)
        step = a - (s - goal) * s / slope
        step = torch.where(upper.isinf(), step.nan_to_num(high, high).clamp(max=high), step)
        inside = (step >= low) & (step <= upper)  # false for NaN
        a = torch.where(done | beyond, a, torch.where(inside, step, (low + upper.clamp(max=high)) / 2))
        done = done | beyond | ((s - goal).abs() <= near * goal)
        if a.device.type == "cpu" and bool(done.all()):
            break
    else:  # some row may still be on its way to `high`
        top = torch.full_like(a, high)
        late = ~done & (divergence(family, target, top)[0] < nats)
        a, beyond = torch.where(late, top, a), beyond | late
    return a, beyond


def grid(family: Family, kl: Tensor, reverse_kl: Tensor, points: range) -> tuple[Tensor, Tensor]:
    """(a, L(a)) for the first a among k / 10, k in `points`, with the least L = (R - kl)^2 + (F - reverse_kl)^2.

    One direction, kl and reverse_kl [rows]. One exp a token serves all points: w exp((k + 1) u / 10) is
    w exp(k u / 10) times exp(u / 10), where u is d less what would overflow, a constant that R and F do not see.
    """
    d = family.d[:, 0]
    excess = (d.amax(-1) - HEADROOM).clamp(min=0)
    u, mean0 = d - excess[:, None], family.mean[:, 0] - excess
    ratio = (u / 10).exp_()
    e = torch.add(family.log_w, u, alpha=points[0] / 10).exp_()
    losses = []
    for k in points:
        z, a = e.sum(-1), k / 10
        mean, log_z = (e * u).sum(-1) / z, z.log() - family.log_z
        losses.append((a * mean - log_z - kl).square() + (log_z - a * mean0 - reverse_kl).square())
        e *= ratio
    loss = torch.stack(losses, -1).nan_to_num(torch.inf)
    best = loss.argmin(-1, keepdim=True)  # the first one on ties
    found = (best.squeeze(-1) + points[0]).to(d.dtype) / 10
    return found, loss.gather(-1, best).squeeze(-1)


def match(
    family: Family, mean: Tensor, low: Tensor, high: Tensor, ridge: float, centre: float, steps: int = 12
) -> Tensor:
    """a [rows, T] in [low, high] [rows, T] that minimises G = A(a) - a . mean + ridge / 2 |a - centre|^2.

    mean [rows, T] is the mean of d that P_a should have. Convex: the gradient is mu - mean + ridge (a - centre), the
    Hessian Sigma + ridge. Newton steps without the coordinates that push against their bound, at most 1 long in
    any coordinate, and the best of six fractions of each; a whole one where G would change by no more than rounding.
    A row whose step was that small stays.
    """
    d, identity = family.d, torch.eye(family.d.shape[1], dtype=family.d.dtype, device=family.d.device)
    noise = 1e-12 if d.dtype is torch.float64 else 1e-5
    within = lambda a: torch.minimum(torch.maximum(a, low), high)
    tilted = lambda a: torch.baddbmm(family.log_w[:, None], a[:, None], d).squeeze(1)

    def objective(a: Tensor) -> Tensor:
        return tilted(a).logsumexp(-1) - (a * mean).sum(-1) + ridge / 2 * (a - centre).square().sum(-1)

    a = within(torch.full_like(mean, centre))
    value, done = objective(a), torch.zeros_like(mean[:, :1], dtype=torch.bool)
    for _ in range(steps):
        q = tilted(a).softmax(-1)[:, None]
        mu = (q @ d.mT).squeeze(1)
        gradient = mu - mean + ridge * (a - centre)
        frozen = ((a <= low) & (gradient > 0)) | ((a >= high) & (gradient < 0))
        free = (~frozen).to(d.dtype)
        hessian = (q * d) @ d.mT - mu[:, :, None] * mu[:, None] + max(ridge, 1e-9) * identity
        hessian = hessian * free[:, :, None] * free[:, None] + torch.diag_embed(1 - free)
        step = -torch.linalg.solve_ex(hessian, (gradient * free)[..., None])[0].squeeze(-1)
        step = step / step.abs().amax(-1, keepdim=True).clamp(min=1)
        close = -(gradient * step).sum(-1, keepdim=True) <= noise
        best, least = a, value
        for fraction in TRIALS:
            trial = within(a + fraction * step)
            now = objective(trial)
            better = now < least
            best, least = torch.where(better[:, None], trial, best), torch.where(better, now, least)
        best = torch.where(close, within(a + step), best)
        best, value = torch.where(done, a, best), least
        done = done | (close & ((best - a).abs().amax(-1, keepdim=True) <= noise))
        a = best
        if a.device.type == "cpu" and bool(done.all()):
            break
    return a
