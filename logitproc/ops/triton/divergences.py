"""Losses, and how far apart two distributions are: kernels of reference.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import LOWEST, add_exp, blocks, read, side_by_side

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _nll_kernel(scores, targets, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * width
    top = tl.full((), LOWEST, tl.float64)
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, width, BLOCK):
        top, total = add_exp(top, total, read(scores, start + tl.arange(0, BLOCK), width))
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < width)
    found = tl.log(total) - (tl.load(scores + target, mask=inside, other=float("nan")).to(tl.float64) - top)
    tl.store(out + row, tl.where(total > 0, found, float("nan")).to(tl.float32))


def nll(scores: Tensor, target: Tensor) -> Tensor:
    if not scores.numel() or target.dtype != torch.int64:
        return NotImplemented
    out = scores.new_empty(len(scores))
    _nll_kernel[len(scores),](scores.contiguous(), target.contiguous(), out, **blocks(scores.shape[1]))
    return out


@triton.jit
def _statistics(row, width, BLOCK: tl.constexpr):
    """(top, ln of the sum of exp less the top, the first most probable token) of a row, in float64."""
    top = tl.full((), LOWEST, tl.float32)
    best = tl.full((), 0, tl.int64)
    for start in range(0, width, BLOCK):
        x = read(row, start + tl.arange(0, BLOCK), width)
        high = tl.max(x)
        best = tl.where(high > top, start + tl.argmax(x, 0).to(tl.int64), best)
        top = tl.maximum(top, high)
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, width, BLOCK):
        x = read(row, start + tl.arange(0, BLOCK), width)
        total += tl.sum(tl.exp(x.to(tl.float64) - top.to(tl.float64)))
    return top.to(tl.float64), tl.where(total > 0, tl.log(total), float("nan")), best


@triton.jit
def _jensen_shannon(p, q, d):
    """What a token adds to JS, nats: (p + q) / 2 times d tanh(d / 2) / 2 - ln cosh(d / 2), which is never negative."""
    most, least, both, dd = tl.maximum(p, q), tl.minimum(p, q), p + q, d * d
    near = 1.0 / 576 + dd * (-17.0 / 92160 + dd * (31.0 / 1612800))
    near = both * dd * (1.0 / 8 + dd * (-1.0 / 64 + dd * near))
    far = both * tl.log(2 * most / tl.where(both == 0, 1.0, both)) - tl.abs(d) * least
    far = tl.where(least == 0, most * LN2, far)  # d may be infinite
    return tl.where(both == 0, 0.0, 0.5 * tl.where(tl.abs(d) < 0.0625, near, far))


@triton.jit
def _divergences_kernel(base, processed, sums, best, width, BLOCK: tl.constexpr):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    base += row * width
    processed += row * width
    p_top, p_log, p_best = _statistics(base, width, BLOCK)
    q_top, q_log, q_best = _statistics(processed, width, BLOCK)
    js = tl.full((), 0.0, tl.float64)
    kl, reverse_kl, tv = js, js, js
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        log_p = (read(base, i, width).to(tl.float64) - p_top) - p_log
        log_q = (read(processed, i, width).to(tl.float64) - q_top) - q_log
        p, q, d = tl.exp(log_p), tl.exp(log_q), log_q - log_p
        js += tl.sum(_jensen_shannon(p, q, d))
        kl += tl.sum(tl.where(q == 0, 0.0, q * d))
        reverse_kl -= tl.sum(tl.where(p == 0, 0.0, p * d))
        tv += tl.sum(tl.abs(p - q))
    tl.store(sums + row, js)
    tl.store(sums + rows + row, kl)
    tl.store(sums + 2 * rows + row, reverse_kl)
    tl.store(sums + 3 * rows + row, tv / 2)
    tl.store(best + row, p_best)
    tl.store(best + rows + row, q_best)


def divergences(base: Tensor, processed: Tensor) -> tuple[Tensor, ...]:
    given = side_by_side(base, processed)
    if given is None or not base.numel():
        return NotImplemented
    sums = torch.empty(4, len(base), dtype=torch.float64, device=base.device)
    best = torch.empty(2, len(base), dtype=torch.int64, device=base.device)
    _divergences_kernel[len(base),](*given, sums, best, **blocks(base.shape[1]))
    return *sums, *best
