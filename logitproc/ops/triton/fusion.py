"""Kernels of methods/fusion.py and of the solver in tilt.py."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import LOWEST, add_exp, blocks, read, side_by_side

FORBIDDEN = tl.constexpr(-1e30)  # a score that is not above it, or NaN, is a mask
DEAD = tl.constexpr(1e-6)  # nats


@triton.jit
def _shifted(x, base, y, i, width, reference):
    """(scores of x, d = y - base - reference, which tokens all allow); d is 0 where one does not."""
    x, base, y = read(x, i, width), read(base, i, width), read(y, i, width)
    inside = (x > FORBIDDEN) & (base > FORBIDDEN) & (y > FORBIDDEN)
    return x, tl.where(inside, (y - base) - reference, 0.0), inside


@triton.jit
def _first_choice(x, base, y, width, BLOCK: tl.constexpr):
    """The first of the tokens that x likes best among those that all allow; -1 without any."""
    best = tl.full((), FORBIDDEN, tl.float32)
    first = tl.full((), -1, tl.int32)
    for start in range(0, width, BLOCK):
        scores, _, inside = _shifted(x, base, y, start + tl.arange(0, BLOCK), width, 0.0)
        scores = tl.where(inside, scores, -float("inf"))
        high = tl.max(scores)
        first = tl.where(high > best, start + tl.argmax(scores, 0), first)
        best = tl.maximum(best, high)
    return first


# --- newton ---


@triton.jit
def _moments(scores, host, base, expert, width, offset, reference, a, BLOCK: tl.constexpr):
    """(ln z, mean, variance) of d under softmax(scores - offset + a d), float64, on the tokens that all allow."""
    top = tl.full((), LOWEST, tl.float64)
    total = tl.full((), 0.0, tl.float64)
    first = total
    second = total
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        _, d, inside = _shifted(host, base, expert, i, width, reference)
        x = tl.where(inside, (read(scores, i, width) - offset) + a * d, -float("inf"))
        high = tl.maximum(tl.max(x), LOWEST)
        w = tl.exp(x - high)
        most = tl.maximum(top, high.to(tl.float64))
        old, new = tl.exp(top - most), tl.exp(high.to(tl.float64) - most)
        total = total * old + tl.sum(w).to(tl.float64) * new
        first = first * old + tl.sum(w * d).to(tl.float64) * new
        second = second * old + tl.sum(w * d * d).to(tl.float64) * new
        top = most
    mean = first / total
    return top + tl.log(total), mean, tl.maximum(second / total - mean * mean, 0.0)


@triton.jit
def _divergence(host, base, expert, width, offset, reference, a, log_z, mean, R: tl.constexpr, F: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """(R, F or J of the tilt a, its derivative)."""
    z, m, variance = _moments(host, host, base, expert, width, offset, reference, a, BLOCK)
    a = a.to(tl.float64)
    if R:
        f, slope = a * m - (z - log_z), a * variance
    elif F:
        f, slope = (z - log_z) - a * mean, m - mean
    else:
        f, slope = a * (m - mean), m - mean + a * variance
    return tl.maximum(f, 0.0), slope


@triton.jit
def _newton_kernel(
    host, base, expert, out, numbers, flags, width, low, high, steps, R: tl.constexpr, F: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    host += row * width
    base += row * width
    expert += row * width
    choice = tl.maximum(_first_choice(host, base, expert, width, BLOCK), 0)
    offset, at_base, at_expert = tl.load(host + choice), tl.load(base + choice), tl.load(expert + choice)
    reference = at_expert - at_base
    log_z, mean, variance = _moments(host, host, base, expert, width, offset, reference, 0.0, BLOCK)
    small_z, small, small_variance = _moments(base, host, base, expert, width, 0.0, reference, 0.0, BLOCK)
    tuned_z, tuned, tuned_variance = _moments(expert, host, base, expert, width, 0.0, reference, 0.0, BLOCK)
    # d is 0 at the first choice, where ln q_t - ln q is then less than d by ln E_Q exp d.
    ratio = (at_base.to(tl.float64) - small_z) - (at_expert.to(tl.float64) - tuned_z)
    change, kl, reverse_kl = tuned - small, tuned - ratio, ratio - small
    kl, reverse_kl = tl.where(kl < 0, 0.0, kl), tl.where(reverse_kl < 0, 0.0, reverse_kl)  # NaN stays
    dead = ((change >= DEAD) & (variance > 0)) == 0  # also for NaN: a row without a common token
    if R:
        nats = kl
    elif F:
        nats = reverse_kl
    else:
        nats = tl.maximum(change, 0.0)

    high = tl.full((), 0.0, tl.float32) + high
    goal = tl.sqrt(2 * nats)
    a = goal / tl.sqrt(variance)
    if not (R or F):
        a = a / 1.4142135623730951
    a = tl.where(a < high, a, tl.where(a >= high, high, 0.0)).to(tl.float32)  # 0 for NaN
    lower = tl.full((), 0.0, tl.float64)
    upper = tl.full((), float("inf"), tl.float64)
    beyond = tl.full((), 0, tl.int1)
    step = tl.full((), 0, tl.int32)
    going = dead == 0
    while going:
        f, slope = _divergence(host, base, expert, width, offset, reference, a, log_z, mean, R, F, BLOCK)
        here = a.to(tl.float64)
        beyond = (a == high) & (f < nats)
        s = tl.sqrt(2 * f)
        lower = tl.where(f <= nats, here, lower)
        upper = tl.where(f >= nats, here, upper)
        least = tl.minimum(upper, high.to(tl.float64))
        next = here - (s - goal) * s / slope
        next = tl.where((upper == float("inf")) & ((next < high) == 0), high.to(tl.float64), next)
        inside = (next >= lower) & (next <= upper)
        next = tl.where(inside, next, (lower + least) / 2)
        a = tl.where(beyond, a, next.to(tl.float32))
        step += 1
        near = tl.abs(s - goal) <= 3e-4 * goal
        going = (step < steps) & ((beyond | near) == 0)
        if (step == steps) & ((beyond | near) == 0):  # still on its way to `high`
            f, slope = _divergence(host, base, expert, width, offset, reference, high, log_z, mean, R, F, BLOCK)
            beyond = f < nats
            a = tl.where(beyond, high, a)
    a = tl.where(dead, 0.0, tl.maximum(a, low))

    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        scores, d, common = _shifted(host, base, expert, i, width, reference)
        fused = tl.where(read(expert, i, width) > FORBIDDEN, scores + a * d, -float("inf"))
        tl.store(out + row * width + i, tl.where(a == 0, scores, fused), mask=i < width)
    tl.store(numbers + row, a)
    tl.store(numbers + rows + row, kl.to(tl.float32))
    tl.store(numbers + 2 * rows + row, reverse_kl.to(tl.float32))
    tl.store(flags + row, beyond)
    tl.store(flags + rows + row, dead)


def fuse_one(
    host: Tensor, base: Tensor, expert: Tensor, points: range | None, target: str, low: float, high: float, steps: int
) -> tuple[Tensor, ...]:
    given = side_by_side(host, base, expert)
    if given is None or points is not None or not host.numel():
        return NotImplemented
    rows, width = host.shape
    out, numbers = torch.empty_like(given[0]), host.new_empty(3, rows)
    flags = torch.empty(2, rows, dtype=torch.bool, device=host.device)
    _newton_kernel[rows,](
        *given, out, numbers, flags, low=float(low), high=float(high), steps=steps, R=target == "R", F=target == "F",
        **blocks(width),
    )  # fmt: skip
    alpha, kl, reverse_kl = numbers[:, :, None]
    return out, alpha, kl, reverse_kl, flags[0], flags[1, :, None]


# --- mixture ---


@triton.jit
def _coefficient(k, A: tl.constexpr):
    a = 0.0
    for j in tl.static_range(len(A)):
        a = tl.where(k == j, A[j], a)
    return a


@triton.jit
def _component(x, base, y, i, width, a, reference, UPSCALED: tl.constexpr):
    """x + a d; upscaled where x and y allow a token, else where y, the expert, does or a is 0."""
    scores, d, _ = _shifted(x, base, y, i, width, reference)
    may = read(y, i, width) > FORBIDDEN
    may = may & (scores > FORBIDDEN) if UPSCALED else may | (a + 0 * d == 0)
    return tl.where(may, scores + a * d, -float("inf"))


@triton.jit
def _sums_kernel(
    host, base, expert, sums, parts, first_part, width, A: tl.constexpr, UPSCALED: tl.constexpr, BLOCK: tl.constexpr
):
    """sums [4, rows, parts]: of the components of one expert the top, ln of the sum of exp less the top, the value of
    y - base that d is less by, and whether there is one: else it is the host."""
    row, k, rows = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0).to(tl.int64)
    host += row * width
    base += row * width
    expert += row * width
    x, y = (expert, host) if UPSCALED else (host, expert)
    a = _coefficient(k, A)
    choice = _first_choice(x, base, y, width, BLOCK)
    reference = tl.where(choice < 0, 0.0, tl.load(y + tl.maximum(choice, 0)) - tl.load(base + tl.maximum(choice, 0)))
    top = tl.full((), LOWEST, tl.float64)
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        top, total = add_exp(top, total, _component(x, base, y, i, width, a, reference, UPSCALED))
    there = (total > 0) if UPSCALED else (choice >= 0)
    at = sums + row * parts + first_part + k
    tl.store(at, top.to(tl.float32))
    tl.store(at + rows * parts, tl.log(total).to(tl.float32))
    tl.store(at + 2 * rows * parts, reference)
    tl.store(at + 3 * rows * parts, there.to(tl.float32))


@triton.jit
def _log_p(host, base, expert, i, width, at, number, first, a, UPSCALED: tl.constexpr):
    """ln of what a component gives the tokens i; its sums are at `at`, `number` apart, those of the host at `first`."""
    there = tl.load(at + 3 * number) > 0
    x, y = (expert, host) if UPSCALED else (host, expert)
    scores = _component(x, base, y, i, width, a, tl.load(at + 2 * number), UPSCALED)
    own = (scores - tl.load(at)) - tl.load(at + number)
    return tl.where(there, own, (read(host, i, width) - tl.load(first)) - tl.load(first + number))


@triton.jit
def _mix_kernel(
    host, base, expert, sums, parts, first_part, log_w, out, width, A: tl.constexpr, UPSCALED: tl.constexpr,
    MORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = ln (exp(out) + sum over the components of one expert of w_j P_j); with MORE there is such an `out`."""
    row, number = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64) * parts
    host += row * width
    base += row * width
    expert += row * width
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    best = read(out + row * width, i, width) if MORE else tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.where(best > -float("inf"), 1.0, 0.0)
    for k in tl.static_range(len(A)):
        at = sums + row * parts + first_part + k
        x = _log_p(host, base, expert, i, width, at, number, sums + row * parts, A[k], UPSCALED)
        x += tl.load(log_w + row * parts + first_part + k)
        x = tl.where(x > -float("inf"), x, -float("inf"))  # NaN: a row without a token, or a weight of 0 for it
        most = tl.maximum(tl.maximum(best, x), LOWEST)
        total = total * tl.exp(best - most) + tl.exp(x - most)
        best = tl.maximum(best, x)
    mixed = tl.where(best > -float("inf"), best + tl.log(tl.where(total > 0, total, 1.0)), -float("inf"))
    tl.store(out + row * width + i, mixed, mask=i < width)


@triton.jit
def _likelihood_kernel(
    host, base, expert, sums, parts, first_part, tokens, out, width, A: tl.constexpr, UPSCALED: tl.constexpr
):
    row, k, number = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0).to(tl.int64) * parts
    at = row * parts + first_part + k
    i = tl.maximum(tl.load(tokens + row), 0)
    found = _log_p(host + row * width, base + row * width, expert + row * width, i, width, sums + at, number,
                   sums + row * parts, _coefficient(k, A), UPSCALED)  # fmt: skip
    tl.store(out + at, tl.where(found == found, found, 0.0))  # 0 for NaN


class _Mixture:
    """The components of a mixture in groups, those of one expert and kind, and their sums."""

    def __init__(self, scores: list[Tensor], alphas: Sequence[float], betas: Sequence[float]):
        host, base, *experts = scores
        groups: list[tuple[Tensor, Sequence[float], bool]] = [(host, (0.0,), False)]
        groups += [(expert, betas, True) for expert in experts] if betas else []
        groups += [(expert, alphas, False) for expert in experts] if alphas else []
        self.parts = sum(len(a) for _, a, _ in groups)
        self.sums = host.new_empty(4, len(host), self.parts)
        self.groups: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        at = 0
        for expert, a, is_upscaled in groups:
            about = (host, base, expert, self.sums, self.parts, at)
            options = {"A": tuple(map(float, a)), "UPSCALED": is_upscaled}
            _sums_kernel[len(host), len(a)](*about, **options, **blocks(host.shape[1]))
            self.groups.append((about, options))
            at += len(a)


def mixture(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], alphas: Sequence[float], betas: Sequence[float],
    log_weights: Tensor,
) -> Tensor:  # fmt: skip
    given = side_by_side(host, base, *experts)
    if given is None or not host.numel():
        return NotImplemented
    m, log_w, out = _Mixture(given, alphas, betas), log_weights.log_softmax(-1).contiguous(), torch.empty_like(given[0])
    sizes = blocks(host.shape[1])
    for number, (about, options) in enumerate(m.groups):
        grid = len(host), triton.cdiv(host.shape[1], sizes["BLOCK"])
        _mix_kernel[grid](*about, log_w, out, MORE=number > 0, **options, **sizes)
    return out


def log_likelihoods(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], alphas: Sequence[float], betas: Sequence[float],
    tokens: Tensor,
) -> Tensor:  # fmt: skip
    given = side_by_side(host, base, *experts)
    if given is None or not host.numel():
        return NotImplemented
    m, tokens = _Mixture(given, alphas, betas), tokens.contiguous()
    out = host.new_empty(len(host), m.parts)
    for about, options in m.groups:
        _likelihood_kernel[len(host), len(options["A"])](*about, tokens, out, host.shape[1], **options)
    return out
