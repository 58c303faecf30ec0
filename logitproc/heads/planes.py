"""Weights in two planes of 4 bits, and scores from one plane with a proved error.

With a scale for each 32 columns, q = round(w / scale) in -136..119, in halves q = 16 hi + lo:

    plane 1    w1 = 16 hi scale            hi in -8..7, stored as hi + 8
    plane 2    w2 = (16 hi + lo) scale     what plane 2 adds is lo scale, lo in -8..7, stored as lo + 8

The scale is a code in -127..127 times the unit of the row. Its sign gives the longer side of the range to the weight
of largest magnitude. States are rounded to 16 bits. A score is then a sum of integers times two numbers, so it is
exact but for its last rounding, and all kernels of `plane_scores` agree bit for bit.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..ops import cpu
from ..ops.dispatch import op

GROUP, QUARTER = 128, 32  # columns that 64 bytes hold, and that share a scale
_LEAST, _LARGEST = -136, 119  # of q
_CODES = 127
_EPSILON = 2.0**-24
_STATE = 32512  # 127 * 256: the largest 16-bit state whose parts fit in 8 bits each


class Planes(NamedTuple):
    """What stands for weight [V, d], with groups = ceil(d / 128).

    high, low    [V, groups, 64] uint8
    codes        [V, groups, 4] int8
    units        [V], scale = code * unit
    first, second, norms    [V], never below ||w - w1||, ||w - w2|| and each of ||w||, ||w1||, ||w2||

    The last four are float32 numbers as their int32 bits: `model.to(bfloat16)` must not round a certificate.
    """

    high: Tensor
    low: Tensor
    codes: Tensor
    units: Tensor
    first: Tensor
    second: Tensor
    norms: Tensor

    @classmethod
    def empty(cls, columns: int, rows: int) -> Self:
        groups = -(-columns // GROUP)
        halves = [torch.zeros(rows, groups, GROUP // 2, dtype=torch.uint8) for _ in range(2)]
        codes = torch.zeros(rows, groups, GROUP // QUARTER, dtype=torch.int8)
        numbers = [torch.zeros(rows, dtype=torch.int32) for _ in range(4)]
        return cls(*[*halves, codes, *numbers])

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor) -> Self:
        """The planes of weight [V, d]."""
        return cls(*map(torch.cat, zip(*(_split(rows.double()) for rows in weight.split(64)), strict=True)))

    def settle(self) -> None:
        """Move what is read whole to large pages, where that can be done: it is then read faster by half."""
        for tensor in (self.high, self.low, self.codes):
            cpu.hold_in_large_pages(tensor)


def rounding(columns: int) -> float:
    """gamma: the error of a float32 dot product of so many columns, relative to sum |h_i w_i|, with room for two."""
    return 2 * (columns + 8) * _EPSILON


def _split(w: Tensor) -> tuple[Tensor, ...]:
    columns = w.shape[1]
    parts = torch.nn.functional.pad(w, (0, -columns % GROUP)).unflatten(1, (-1, GROUP // QUARTER, QUARTER))
    above, below = parts.amax(-1), -parts.amin(-1)
    sign = torch.where(above > below, -1.0, 1.0)  # of the scale: the larger side meets q < 0
    least = torch.maximum(torch.maximum(above, below) / -_LEAST, torch.minimum(above, below) / _LARGEST)
    units = _up((least.flatten(1).amax(1) / _CODES).clamp(min=1e-30), torch.float32)
    unit = units.double()[:, None, None]
    codes = sign * (least / unit).ceil().clamp(max=_CODES)
    scale = (codes * unit)[..., None]
    q = (parts / scale).nan_to_num(0.0, 0.0, 0.0).round().clamp(_LEAST, _LARGEST)
    hi = ((q + 8) / 16).floor()
    w1, w2 = (x.flatten(1)[:, :columns] for x in (16 * hi * scale, q * scale))
    norm = lambda values: values.norm(dim=1)
    norms = torch.maximum(norm(w), torch.maximum(norm(w1), norm(w2)))
    bounds = [_up(bound * (1 + 1e-6), torch.float32) for bound in (norm(w - w1), norm(w - w2), norms)]
    numbers = [x.view(torch.int32) for x in (units, *bounds)]
    return _pack(hi + 8), _pack(q - 16 * hi + 8), codes.to(torch.int8), *numbers


def _pack(u: Tensor) -> Tensor:
    """[V, groups, 64] of u [V, groups, 4, 32]: a byte holds columns 32 s + k and 32 s + 16 + k."""
    first, second = u.to(torch.uint8).unflatten(-1, (2, 16)).unbind(-2)
    return (first | second << 4).flatten(-2)


def unpack(plane: Tensor) -> Tensor:
    """hi or lo, [V, groups, 4, 32] int8, of a packed plane."""
    packed = plane.unflatten(-1, (GROUP // QUARTER, 16))
    return torch.stack([packed & 15, packed >> 4], -2).flatten(-2).to(torch.int8) - 8


def _up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, never below the value."""
    low = values.to(dtype)
    return torch.where(low.double() < values, torch.nextafter(low, low.new_tensor(torch.inf)), low)


class States(NamedTuple):
    """States [b, d] as whole * t. `norms` bounds ||h||, `lost` what rounding took away."""

    whole: Tensor  # [b, groups * 128] int16
    t: Tensor  # [b] float32
    norms: Tensor  # [b] float64
    lost: Tensor  # [b] float64

    def one(self, i: int) -> "States":
        return States(*(value[i : i + 1] for value in self))


def round_states(hidden: Tensor) -> States:
    """hidden [b, d] float; a state of zeros, or one that is not finite, becomes zeros."""
    h = hidden.double().nan_to_num(0.0, 0.0, 0.0)
    t = (h.abs().amax(1) / _STATE).float().clamp(min=1e-30)
    exact = t.double()[:, None]
    whole = (h / exact).round()
    lost = (h - whole * exact).norm(dim=1)
    whole = torch.nn.functional.pad(whole, (0, -h.shape[1] % GROUP)).to(torch.int16)
    return States(whole, t, h.norm(dim=1) * (1 + 1e-6), lost * (1 + 1e-6))


def scores(planes: Planes, half: str, states: States, rows: Tensor | None = None) -> Tensor:
    """h . w1 of the rounded states ("high"), or what plane 2 adds to it ("low"): [b, V], of rows [n] only [b, n]."""
    plane, factor = getattr(planes, half), 16 if half == "high" else 1
    return plane_scores(states.t, states.whole, plane, planes.codes, planes.units, factor, rows)


@op
def plane_scores(
    t: Tensor, whole: Tensor, plane: Tensor, codes: Tensor, units: Tensor, factor: int, rows: Tensor | None = None
) -> Tensor:
    """factor (t whole) . (u code unit) of all rows of a plane, [b, V], or of rows [n], [b, n]: float32, rounded once.

    t [b] and whole [b, groups * 128] as in `States`, the others as in `Planes`.
    """
    rows = torch.arange(len(plane), device=plane.device) if rows is None else rows
    h, out = whole.double(), []
    for at in rows.split(2048):
        weights = unpack(plane[at]).double() * codes[at][..., None]
        sums = factor * (h @ weights.flatten(1).T)  # exact: whole numbers below 2^53
        out.append((sums * (units[at].view(torch.float32).double() * t.double()[:, None])).float())
    return torch.cat(out, 1) if out else t.new_empty(len(t), 0)
