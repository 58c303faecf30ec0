"""Kernel of methods/aligndistil.py."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import LOWEST, add_exp, blocks, read, side_by_side


@triton.jit
def _log_softmax(x, top, log_total):
    return (x - top) - log_total


@triton.jit
def _extrapolated_kernel(
    plus, minus, anchor, out, coefficient, width, constant, r, eps, low, high, implausible, anchor_weight,
    ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    plus += row * width
    minus += row * width
    anchor += row * width
    out += row * width
    plus_top = tl.full((), LOWEST, tl.float64)
    plus_total = tl.full((), 0.0, tl.float64)
    minus_top, minus_total = plus_top, plus_total
    anchor_top, anchor_total = plus_top, plus_total
    top, total = plus_top, plus_total
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        p, m, c = read(plus, i, width), read(minus, i, width), read(anchor, i, width)
        inside = (p > -float("inf")) & (m > -float("inf")) & (c > -float("inf"))
        plus_top, plus_total = add_exp(plus_top, plus_total, tl.where(inside, p, -float("inf")))
        minus_top, minus_total = add_exp(minus_top, minus_total, tl.where(inside, m, -float("inf")))
        anchor_top, anchor_total = add_exp(anchor_top, anchor_total, c)
    p_top, p_log = plus_top.to(tl.float32), tl.log(plus_total).to(tl.float32)
    m_top, m_log = minus_top.to(tl.float32), tl.log(minus_total).to(tl.float32)
    c_top, c_log = anchor_top.to(tl.float32), tl.log(anchor_total).to(tl.float32)

    a = constant
    if ADAPTIVE:
        variation = tl.full((), 0.0, tl.float64)
        for start in range(0, width, BLOCK):
            i = start + tl.arange(0, BLOCK)
            p, m, c = read(plus, i, width), read(minus, i, width), read(anchor, i, width)
            inside = (p > -float("inf")) & (m > -float("inf")) & (c > -float("inf"))
            apart = tl.exp(_log_softmax(p, p_top, p_log)) - tl.exp(_log_softmax(m, m_top, m_log))
            variation += tl.sum(tl.where(inside, tl.abs(apart), 0.0)).to(tl.float64)
        a = r * (variation / 2).to(tl.float32) + eps
    a = tl.minimum(tl.maximum(a, low), high)
    tl.store(coefficient + row, a)

    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        p, m, c = read(plus, i, width), read(minus, i, width), read(anchor, i, width)
        may = (p > -float("inf")) & (c > -float("inf")) & (c >= c_top - implausible)
        ratio = _log_softmax(p, p_top, p_log) - _log_softmax(m, m_top, m_log)
        d = tl.where(m > -float("inf"), tl.minimum(tl.maximum(ratio, -1e4), 1e4), 0.0)  # FARTHEST
        x = tl.where(may, anchor_weight * _log_softmax(c, c_top, c_log) + a * d, -float("inf"))
        top, total = add_exp(top, total, x)
        tl.store(out + i, x, mask=i < width)
    tl.debug_barrier()  # other threads of the program may have written what a thread reads
    left = total > 0  # a row with nothing left is the anchor
    z_top, z_log = tl.where(left, top.to(tl.float32), c_top), tl.where(left, tl.log(total).to(tl.float32), c_log)
    for start in range(0, width, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.where(left, read(out, i, width), read(anchor, i, width))
        tl.store(out + i, tl.where(x > -float("inf"), _log_softmax(x, z_top, z_log), -float("inf")), mask=i < width)


def extrapolated(
    plus: Tensor, minus: Tensor, anchor: Tensor, constant: float | None, r: float, eps: float,
    clamp: tuple[float, float], kl_cap: float | None, plausibility: float, anchor_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = side_by_side(plus, minus, anchor)
    if given is None or kl_cap is not None or not plus.numel():
        return NotImplemented
    out, a = torch.empty_like(given[0]), plus.new_empty(plus.shape[:-1])
    implausible = -math.log(plausibility) if plausibility else math.inf
    numbers = (constant or 0.0, r, eps, *clamp, implausible, anchor_weight)
    names = ("constant", "r", "eps", "low", "high", "implausible", "anchor_weight")
    _extrapolated_kernel[a.numel(),](
        *given, out, a, **dict(zip(names, map(float, numbers), strict=True)), ADAPTIVE=constant is None,
        **blocks(plus.shape[-1]),
    )  # fmt: skip
    return out, a
