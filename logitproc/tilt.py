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
LAST = 0.03  # how long the last step of `match` may be


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


def least(
    family: Family, kl: Tensor, reverse_kl: Tensor, low: float, high: float, points: range, steps: int = 12
) -> Tensor:
    """a in [low, high], [rows], with the least L of `grid`: never more than at the best of its `points`.

    One direction. Bisects the sign of L' = 2 (R - kl) R' + 2 (F - reverse_kl) F' between that point's neighbours.
    """
    best, loss = grid(family, kl, reverse_kl, points)
    left, right = (best - 0.1).clamp(min=low), (best + 0.1).clamp(max=high)
    for _ in range(steps):
        a = (left + right) / 2
        (r, r_slope), (f, f_slope) = divergence(family, "R", a), divergence(family, "F", a)
        r, f = r - kl, f - reverse_kl
        rises = r * r_slope + f * f_slope > 0
        left, right = torch.where(rises, left, a), torch.where(rises, a, right)
    return torch.where(r.square() + f.square() <= loss, a, best)


def match(
    family: Family, mean: Tensor, low: Tensor, high: Tensor, ridge: float, centre: float, steps: int = 32
) -> Tensor:
    """a [rows, T] in [low, high] [rows, T] that minimises G = A(a) - a . mean + ridge / 2 |a - centre|^2.

    mean [rows, T] is the mean of d that P_a should have. Convex: the gradient is mu - mean + ridge (a - centre), the
    Hessian Sigma + ridge. Each pass over the scores gives all three at a trial. One where G is not above the least so
    far by more than rounding is taken, and the next is Newton's step from there, without the coordinates that push
    against their bound, as far as the next bound, at most 1 in any coordinate. Otherwise the next is a quarter of the
    step that failed. A row is done with a step so short that the error left is rounding, or that gains no more than
    that; the latter is not taken where it is long: G is flat there, as far as one can see.
    """
    double = family.d.dtype is torch.float64
    noise, near, flat = (1e-12, 1e-7, 1e-20) if double else (1e-5, 3e-4, 1e-8)
    best = trial = torch.full_like(mean, centre).clamp(low, high)
    least, step = torch.full_like(family.log_z, torch.inf), torch.zeros_like(mean)
    done = ~(family.log_z > -torch.inf)  # rows without a token, NaN too
    for _ in range(steps):
        log_z, mu, sigma = joint_moments(family, trial)
        value = log_z - (trial * mean).sum(-1) + ridge / 2 * (trial - centre).square().sum(-1)
        gradient = mu - mean + ridge * (trial - centre)
        frozen = ((trial <= low) & (gradient > 0)) | ((trial >= high) & (gradient < 0))
        newton, gain = newton_step(gradient, sigma, ridge, noise, frozen)
        length = newton.abs().amax(-1)
        room = (torch.where(newton < 0, low, high) - trial) / newton
        room = torch.where(room > 0, room, torch.inf).amin(-1)  # on a bound already: clamped
        fraction = torch.minimum(room, 1 / length).clamp(max=1)
        taken = ~done & (value <= least + noise)
        best, least = torch.where(taken[:, None], trial, best), torch.where(taken, value, least)
        step = torch.where(taken[:, None], fraction[:, None] * newton, step / 4)
        trial = torch.where(done[:, None], trial, (best + step).clamp(low, high))
        done = done | (taken & ((length <= near) | (gain <= flat)))
        trial = torch.where((done & ((trial - best).abs().amax(-1) > LAST))[:, None], best, trial)
        if done.device.type == "cpu" and bool(done.all()):
            break
    return torch.where(done[:, None], trial, best)


def newton_step(
    gradient: Tensor, covariance: Tensor, ridge: float, noise: float, frozen: Tensor
) -> tuple[Tensor, Tensor]:
    """(step of the coordinates that are not frozen [rows, T], twice what it gains in the quadratic model [rows])."""
    gradient, free = gradient.masked_fill(frozen, 0.0), (~frozen).to(gradient.dtype)
    variance = covariance.diagonal(dim1=1, dim2=2)
    hessian = covariance * free[:, :, None] * free[:, None]
    hessian = hessian + torch.diag_embed(1 - free + max(ridge, 1e-9) + noise * variance)  # regular when rounded, too
    step = -torch.linalg.solve_ex(hessian, gradient[..., None])[0].squeeze(-1)
    return step, -(gradient * step).sum(-1)


def joint_moments(family: Family, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logsumexp of log_w + a . d [rows], mean [rows, T] and covariance [rows, T, T] of d under P_a); a [rows, T]."""
    x = torch.baddbmm(family.log_w[:, None], a[:, None], family.d)
    top = x.amax(-1, keepdim=True)
    w = x.sub_(top).exp_()
    total = w.sum(-1, keepdim=True)
    mean = w @ family.d.mT / total
    second = (w * family.d) @ family.d.mT / total
    return (top + total.log())[:, 0, 0], mean[:, 0], second - mean.mT @ mean
