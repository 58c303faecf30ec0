"""Weights in two planes of 4 bits, and scores from one plane with a proved error.

With a scale s for each group of 128 columns, q = round(w / s) in [-127, 127], in halves q = 16 hi + lo:

    plane 1    w1 = (16 hi + 7.5) s             hi in -8..7, stored as u = hi + 8
    plane 2    w2 = (16 hi + lo) s = q s        what plane 2 adds is (lo - 7.5) s, lo in 0..15

so both planes hold numbers u in 0..15 that stand for (2 unit u - offset) s / 2 with whole unit and offset. States are
rounded to 16 bits. Products and their sums over a lane of 8 columns are then exact in int32, which is what makes the
error of a score provable (see `planes.cpp`, and `_plain` for the same in plain torch).
"""

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

GROUP = 128
HIGH, LOW = (16, 241), (1, 15)  # (unit, offset) of the planes
_SMALLEST = 2.0**-60  # scale of a group of zeros: plane 1 is then nearly zero too
_EPSILON = 2.0**-24
_STATE = 32512  # 127 * 256: the largest 16-bit state whose parts fit in 8 bits each

logger = logging.getLogger(__name__)


class Planes(NamedTuple):
    """high and low [V, groups, 64] uint8, scales [V, groups] int16 (bits of bfloat16).

    [V] float32, never below: `first` and `second`, ||w - w1|| and ||w - w2|| plus what float32 may add per unit of
    ||h||; `norms`, the norms of w and of what stands for it.
    """

    high: Tensor
    low: Tensor
    scales: Tensor
    first: Tensor
    second: Tensor
    norms: Tensor


def rounding(columns: int) -> float:
    """gamma: the error of a float32 dot product of so many columns, relative to sum |h_i w_i|, with room for two."""
    return 2 * (columns + 8) * _EPSILON


@torch.no_grad()
def split(weight: Tensor) -> Planes:
    """The planes of weight [V, d]; norms in float64, rounded up."""
    return Planes(*map(torch.cat, zip(*(_split(rows.double()) for rows in weight.split(64)), strict=True)))


def _split(w: Tensor) -> tuple[Tensor, ...]:
    columns, gamma = w.shape[1], rounding(w.shape[1])
    groups = torch.nn.functional.pad(w, (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
    scales = _up((groups.abs().amax(-1) / 127).clamp(min=_SMALLEST), torch.bfloat16)
    s = scales.double()[..., None]
    q = (groups / s).round()
    hi = (q / 16).floor()
    lo = q - 16 * hi
    inside = lambda values: (values * s).flatten(1)[:, :columns]
    w1, added, w2 = inside(16 * hi + 7.5), inside(lo - 7.5), inside(q)
    norm = lambda values: values.norm(dim=1)
    first = norm(w - w1) + gamma * norm(w1)
    second = norm(w - w2) + gamma * (norm(w1) + norm(added) + norm(w2))
    norms = torch.maximum(norm(w), norm(w1) + norm(added))
    bounds = [_up(bound * (1 + 1e-6), torch.float32) for bound in (first, second, norms)]
    return _pack(hi + 8), _pack(lo), scales.view(torch.int16), *bounds


def _pack(u: Tensor) -> Tensor:
    u = u.to(torch.uint8)
    return u[..., :64] | u[..., 64:] << 4


def unpack(plane: Tensor) -> Tensor:
    """u [V, groups, 128] uint8 of a packed plane."""
    return torch.cat([plane & 15, plane >> 4], -1)


def _up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, never below the value."""
    low = values.to(dtype)
    return torch.where(low.double() < values, torch.nextafter(low, low.new_tensor(torch.inf)), low)


class States(NamedTuple):
    """States [b, d] in 16 bits: t (256 high + low). `norms` bounds ||h||, `lost` what rounding took away."""

    high: Tensor  # [b, groups, 128] int8
    low: Tensor
    t: Tensor  # [b] float32
    norms: Tensor  # [b] float64
    lost: Tensor  # [b] float64


def round_states(hidden: Tensor) -> States:
    """hidden [b, d] float; a state of zeros, or one that is not finite, becomes zeros."""
    h = hidden.double().nan_to_num(0.0, 0.0, 0.0)
    t = (h.abs().amax(1) / _STATE).float().clamp(min=1e-30)
    q = (h / t.double()[:, None]).round().clamp(-_STATE, _STATE)
    high = ((q + 128) / 256).floor()
    pad = lambda x: (
        torch.nn.functional.pad(x, (0, -h.shape[1] % GROUP)).unflatten(1, (-1, GROUP)).to(torch.int8)
    )
    lost = (h - q * t.double()[:, None]).norm(dim=1)
    return States(pad(high), pad(q - 256 * high), t, h.norm(dim=1) * (1 + 1e-6), lost * (1 + 1e-6))


def scores(
    plane: Tensor, scales: Tensor, states: States, kind: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """(2 unit u - offset) s / 2 . h, float32: [b, V], or [b, n] for the rows [b, n] of each state."""
    native = _native() if plane.device.type == "cpu" else None
    return (_plain if native is None else functools.partial(_compiled, native))(
        plane, scales, states, kind, rows
    )


def _plain(
    plane: Tensor, scales: Tensor, states: States, kind: tuple[int, int], rows: Tensor | None
) -> Tensor:
    unit, offset = kind
    h = states.t[:, None] * (256.0 * states.high.float() + states.low.float()).flatten(1)
    out = []
    for block in range(0, len(plane) if rows is None else rows.shape[1], 8192):
        part = slice(block, block + 8192)
        at = part if rows is None else rows[:, part]
        s = scales[at].view(torch.bfloat16).float()[..., None] / 2
        w = (((2 * unit) * unpack(plane[at]).float() - offset) * s).flatten(-2)  # exact: 8 bits times 8 bits
        out.append(h @ w.T if rows is None else (w @ h[..., None])[..., 0])
    return torch.cat(out, -1)


def _compiled(
    native: Any, plane: Tensor, scales: Tensor, states: States, kind: tuple[int, int], rows: Tensor | None
) -> Tensor:
    (unit, offset), (batch, groups) = kind, states.high.shape[:2]
    whole = 256 * states.high.int() + states.low.int()
    lanes = offset * whole.unflatten(-1, (2, 16, 4)).sum((-3, -1), dtype=torch.int32)
    n = len(plane) if rows is None else rows.shape[1]
    out = torch.empty(batch, n)
    held = [plane, scales, states.high, states.low, lanes, states.t, rows, out]
    held = [None if tensor is None else tensor.contiguous() for tensor in held]
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in held]
    native(
        *pointers,
        *map(ctypes.c_int64, (n, groups, batch)),
        *map(ctypes.c_int32, (unit, torch.get_num_threads())),
    )
    return out


@functools.cache
def _native() -> Any:
    """`planes.cpp`, compiled at first use for this machine; None, and one line in the log, where that cannot be."""
    from torch.utils import cpp_extension

    try:
        path: Any = cpp_extension.load(
            "logitproc_planes", str(Path(__file__).with_name("planes.cpp")), is_python_module=False,
            extra_cflags=["-O3", "-march=native", "-std=c++17"],
        )  # fmt: skip
        return ctypes.CDLL(str(path)).plane_scores
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        logger.warning("planes.cpp could not be compiled, exact heads will be slow: %s", reason)
        return None
