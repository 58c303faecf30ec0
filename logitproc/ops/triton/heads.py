"""Kernels of output heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # tokens
ROWS = 32  # of a plane


@triton.jit
def _spread_kernel(
    scores, codes, mapping, extra, bias, out, width,
    BOOKS: tl.constexpr, EXTRA: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < width
    total = tl.zeros([BLOCK], tl.float32)
    for book in tl.static_range(BOOKS):
        code = tl.load(mapping + book * width + token, mask=inside, other=0)
        known = inside & (code >= 0) & (code < codes)
        total += tl.load(scores + row * codes + code, mask=known, other=0.0).to(tl.float32)
    if EXTRA:
        total += tl.load(extra + row * width + token, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + token, mask=inside, other=0.0)
    tl.store(out + row * width + token, total.to(out.dtype.element_ty), mask=inside)


def spread(scores: Tensor, mapping: Tensor, bias: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
    books, width = mapping.shape
    for term, shape in ((bias, (width,)), (extra, (*scores.shape[:-1], width))):
        if term is not None and (term.shape != shape or (term.requires_grad and torch.is_grad_enabled())):
            return NotImplemented
    out = scores.new_empty(*scores.shape[:-1], width)
    if out.numel():
        _spread_kernel[out.numel() // width, triton.cdiv(width, BLOCK)](
            scores.contiguous(), scores.shape[-1], mapping.contiguous(), None if extra is None else extra.contiguous(),
            bias, out, width, BOOKS=books, EXTRA=extra is not None, BIAS=bias is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return out


@triton.jit
def _plane_scores_kernel(
    t, whole, plane, codes, units, rows, out, n, groups, factor, LISTED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    state = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    row = place.to(tl.int64)
    if LISTED:
        row = tl.load(rows + place, mask=inside, other=0)
    byte = tl.arange(0, 64)
    column, quarter = 32 * (byte // 16) + byte % 16, byte // 16
    total = tl.zeros([BLOCK], tl.int64)
    for group in range(groups):
        at = (row * groups + group)[:, None]
        packed = tl.load(plane + at * 64 + byte, mask=inside[:, None], other=0).to(tl.int32)
        code = tl.load(codes + at * 4 + quarter, mask=inside[:, None], other=0).to(tl.int32)
        h = whole + (state * groups + group) * 128 + column
        dot = ((packed & 15) - 8) * tl.load(h).to(tl.int32) + ((packed >> 4) - 8) * tl.load(h + 16).to(tl.int32)
        total += tl.sum((code * dot).to(tl.int64), 1)
    scale = tl.load(units + row, mask=inside, other=0.0).to(tl.float64) * tl.load(t + state).to(tl.float64)
    tl.store(out + state * n + place, ((factor * total).to(tl.float64) * scale).to(tl.float32), mask=inside)


def plane_scores(
    t: Tensor, whole: Tensor, plane: Tensor, codes: Tensor, units: Tensor, factor: int, rows: Tensor | None = None
) -> Tensor:
    n = len(plane) if rows is None else len(rows)
    out = t.new_empty(len(t), n)
    if out.numel():
        _plane_scores_kernel[len(t), triton.cdiv(n, ROWS)](
            t, whole, plane, codes, units.view(torch.float32), None if rows is None else rows.contiguous(), out, n,
            plane.shape[1], factor, LISTED=rows is not None, BLOCK=ROWS,
        )  # fmt: skip
    return out
