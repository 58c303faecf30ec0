"""What kernels that work on whole rows share: one program a row, which goes through it block by block."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # scores
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # in place of -inf, which has no difference to itself


def side_by_side(like: Tensor, *others: Tensor) -> list[Tensor] | None:
    """All tensors as contiguous rows; None unless they are float32 tensors of one shape and device."""
    if any((x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device) for x in others):
        return None
    return [x.contiguous() for x in (like, *others)]


def blocks(width: int) -> dict[str, Any]:
    return {"width": width, "BLOCK": min(BLOCK, triton.next_power_of_2(width))}


@triton.jit
def read(row, i, width):
    return tl.load(row + i, mask=i < width, other=-float("inf"))


@triton.jit
def add_exp(top, total, x):
    """(top, sum of exp(score - top)) of a row after the block x; both float64, at first LOWEST and 0."""
    high = tl.maximum(tl.max(x), LOWEST)  # a block may be forbidden
    most = tl.maximum(top, high.to(tl.float64))
    total *= tl.exp(top - most)
    total += tl.exp(high.to(tl.float64) - most) * tl.sum(tl.exp(x - high)).to(tl.float64)
    return most, total
