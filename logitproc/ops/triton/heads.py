"""Kernels of output heads."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # tokens


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
    out = scores.new_empty(*scores.shape[:-1], width)
    if out.numel():
        _spread_kernel[out.numel() // width, triton.cdiv(width, BLOCK)](
            scores.contiguous(), scores.shape[-1], mapping.contiguous(), None if extra is None else extra.contiguous(),
            bias, out, width, BOOKS=books, EXTRA=extra is not None, BIAS=bias is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return out
