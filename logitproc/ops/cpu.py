"""Kernels for tensors on a CPU: the C++ sources behind functions with the names and arguments of the operations."""

import ctypes
import functools
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import native
from .history import NGramBias, NGramTable, longest_match


@functools.cache
def library() -> Any:
    """`cpu.cpp`; None where it cannot be compiled."""
    return native.load(Path(__file__).with_name("cpu.cpp"))


def call(name: str, *arguments: Any) -> None:
    """Run a C++ function on numbers, contiguous tensors or None, and arrays; the number of threads comes last.

    An argument has the same kind at every call: its C type is that of the first.
    """
    kernel = getattr(library(), name)
    if kernel.argtypes is None:
        kernel.argtypes = [*map(_c_type, arguments), ctypes.c_int64]
    kernel(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments], torch.get_num_threads())


def _c_type(argument: Any) -> Any:
    return {int: ctypes.c_int64, bool: ctypes.c_int64, float: ctypes.c_float}.get(type(argument), ctypes.c_void_p)


def rows_of(like: Tensor, *others: Tensor) -> list[Tensor] | None:
    """All tensors as contiguous rows; None unless they are float32 tensors of one shape that need no gradient."""
    for other in others:
        if other.shape != like.shape or other.dtype != like.dtype or other.device != like.device:
            return None
        if type(other) is not Tensor or (other.requires_grad and torch.is_grad_enabled()):
            return None
    return [tensor.contiguous() for tensor in (like, *others)]


def _are_tokens(tokens: Tensor, scores: Tensor) -> bool:
    """Whether there is one token of the vocabulary for each row of scores."""
    if tokens.dtype != torch.int64 or tokens.shape != scores.shape[:1]:
        return False
    return not len(tokens) or 0 <= int(tokens.min()) <= int(tokens.max()) < scores.shape[1]


def nll(scores: Tensor, target: Tensor) -> Tensor:
    if not _are_tokens(target, scores):
        return NotImplemented  # torch says what is wrong
    scores, out = scores.contiguous(), scores.new_empty(len(scores))
    call("nll", scores, target.contiguous(), out, *scores.shape)
    return out


def within_budget(scores: Tensor, bias: Tensor, nats: float) -> Tensor:
    given = rows_of(scores, bias)
    if given is None or not scores.numel():
        return NotImplemented
    s = torch.empty(*scores.shape[:-1], 1)
    call("within_budget", *given, s, s.numel(), scores.shape[-1], float(nats))
    return s


def divergences(base: Tensor, processed: Tensor) -> tuple[Tensor, ...]:
    given = rows_of(base, processed)
    if given is None or not base.shape[1]:
        return NotImplemented
    sums = torch.empty(4, len(base), dtype=torch.float64)
    best = torch.empty(2, len(base), dtype=torch.int64)
    call("divergences", *given, sums, best, *base.shape)
    return *sums, *best


def extrapolated(
    plus: Tensor, minus: Tensor, anchor: Tensor, constant: float | None, r: float, eps: float,
    clamp: tuple[float, float], kl_cap: float | None, plausibility: float, anchor_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = rows_of(plus, minus, anchor)
    if given is None or not plus.numel():
        return NotImplemented
    out, a = torch.empty(plus.shape), torch.empty(plus.shape[:-1])
    cap, implausible = math.inf if kl_cap is None else kl_cap, -math.log(plausibility) if plausibility else math.inf
    numbers = (math.nan if constant is None else constant, r, eps, *clamp, cap, implausible, anchor_weight)
    call("extrapolated", *given, out, a, a.numel(), plus.shape[-1], *map(float, numbers))
    return out, a


def fuse_one(
    host: Tensor, base: Tensor, expert: Tensor, points: range | None, target: str, low: float, high: float, steps: int
) -> tuple[Tensor, ...]:
    given = rows_of(host, base, expert)
    if given is None or not host.shape[1]:
        return NotImplemented
    fusion = _empty_fusion(given[0], 1)
    first, count = (0, 0) if points is None else (points[0], len(points))
    call("fuse_one", *given, *fusion, *host.shape, first, count, ord(target), float(low), float(high), steps)
    return fusion


def fuse_match(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], weights: Tensor, bounds: Sequence[tuple[float, float]],
    kind: str, ridge: float, centre: float, steps: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    given, count = rows_of(host, base, *experts), len(experts)
    if given is None or not host.shape[1] or len(bounds) not in (1, count):
        return NotImplemented
    if weights.dtype != torch.float32 or weights.shape != (len(host), count):
        return NotImplemented
    fusion = _empty_fusion(given[0], count)
    limits = _floats([side for pair in bounds for side in pair] * (count // len(bounds)))
    call("fuse_match", *given[:2], _pointers(given[2:]), weights.contiguous(), limits, *fusion, *host.shape, count,
         kind == "shift", float(ridge), float(centre), steps)  # fmt: skip
    return fusion


def _empty_fusion(host: Tensor, count: int) -> tuple[Tensor, ...]:
    """Room for the fields of `fusion.Fusion`."""
    alpha, kl, reverse_kl = (torch.empty(len(host), count) for _ in range(3))
    beyond, dead = torch.empty(len(host), dtype=torch.bool), torch.empty(len(host), count, dtype=torch.bool)
    return torch.empty_like(host), alpha, kl, reverse_kl, beyond, dead


def mixture(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], alphas: Sequence[float], betas: Sequence[float],
    log_weights: Tensor,
) -> Tensor:  # fmt: skip
    parts = 1 + len(experts) * (len(alphas) + len(betas))
    if log_weights.dtype != torch.float32 or log_weights.shape != (len(host), parts):
        return NotImplemented
    return _mixture("mixture", host, base, experts, alphas, betas, log_weights, torch.empty(host.shape))


def log_likelihoods(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], alphas: Sequence[float], betas: Sequence[float],
    tokens: Tensor,
) -> Tensor:  # fmt: skip
    if not _are_tokens(tokens, host):
        return NotImplemented  # torch says what is wrong
    out = torch.empty(len(host), 1 + len(experts) * (len(alphas) + len(betas)))
    return _mixture("log_likelihoods", host, base, experts, alphas, betas, tokens, out)


def _mixture(
    name: str, host: Tensor, base: Tensor, experts: Sequence[Tensor], alphas: Sequence[float],
    betas: Sequence[float], about_rows: Tensor, out: Tensor,
) -> Tensor:  # fmt: skip
    given = rows_of(host, base, *experts)
    if given is None or not host.shape[1]:
        return NotImplemented
    call(name, *given[:2], _pointers(given[2:]), _floats(alphas), _floats(betas), about_rows.contiguous(), out,
         *host.shape, len(experts), len(alphas), len(betas))  # fmt: skip
    return out


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _floats(values: Sequence[float]) -> Any:
    return (ctypes.c_float * len(values))(*values)


# --- history ---


class _Table(ctypes.Structure):
    """`Table` of history.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("base", "symbols", "keys", "start", "ids", "values", "trust")),
        *((name, ctypes.c_int64) for name in ("vocabulary", "contexts", "order", "bos")),
    ]


class _Bias(ctypes.Structure):
    """`Bias` of history.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tables", "spans")),
        *((name, ctypes.c_int64) for name in ("two", "count")),
    ]


class _Tables:
    """What the kernel reads of a bias."""

    made: ClassVar[dict[int, "_Tables"]] = {}  # by the identity of a bias, while it lives

    def __init__(self, ngrams: NGramBias):
        step = torch.nn.functional.pad(ngrams.allowed.int(), (1, 1)).diff()
        self.spans = torch.stack([(step == 1).nonzero()[:, 0], (step == -1).nonzero()[:, 0]], 1)
        self.tables = (_Table * len(ngrams.tables))(*map(_table, ngrams.tables))
        where = ctypes.addressof(self.tables), self.spans.data_ptr()
        self.bias = (_Bias * 1)(_Bias(*where, len(self.tables) > 1, len(self.spans)))
        self.reach, self.vocabulary = max(table.order for table in ngrams.tables) - 1, len(ngrams.allowed)

    @classmethod
    def of(cls, ngrams: NGramBias) -> "_Tables":
        found = cls.made.get(id(ngrams))
        if found is None:
            found = cls.made[id(ngrams)] = cls(ngrams)
            weakref.finalize(ngrams, cls.made.pop, id(ngrams))
        return found


def _table(table: NGramTable) -> _Table:
    tensors = (table.base, table.symbols, table.keys, table.start, table.ids, table.values, table.trust)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    return _Table(*pointers, len(table.base), len(table.keys) - 1, table.order, table.bos)


def add_ngrams(
    scores: Tensor, tokens: Tensor, ngrams: NGramBias, factor: Tensor | None = None, *, centred: bool = False,
    plausibility: float = 0.0, drop: bool = False, clip: float = math.inf, budget: float = math.inf,
    surprisal: float = math.inf,
) -> Tensor:  # fmt: skip
    native = _Tables.of(ngrams)
    if clip < math.inf or budget < math.inf or len(native.tables) > 2:
        return NotImplemented
    (rows, width), reach = scores.shape, tokens.shape[1]
    if reach < native.reach or width < native.vocabulary:
        return NotImplemented  # the kernel would read and write outside
    scores = scores if scores.is_contiguous() else scores.contiguous()
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()  # the last columns of a history, often
    out = torch.empty_like(scores)
    limit = math.log(plausibility) - 1e-6 if plausibility else -math.inf
    rule = 2 if plausibility or surprisal < math.inf else int(centred)
    call("add_ngrams", scores, tokens, tokens.stride(0), factor if factor is None else factor.contiguous(),
         native.bias, rule, limit, float(surprisal), drop, out, reach, rows, width)  # fmt: skip
    return out


def loop_guard(
    scores: Tensor, tokens: Tensor, generated: Tensor, strength: float, base: float, length: int, cap: float,
    *, in_place: bool = False,
) -> Tensor:  # fmt: skip
    if tokens.shape[1] < 2 or not scores.is_contiguous():
        return NotImplemented
    out = scores if in_place else scores.clone()
    call("loop_guard", tokens.contiguous(), generated.contiguous(), float(strength), float(base), length, float(cap),
         longest_match(strength, base, length, cap), out, tokens.shape[1], *scores.shape)  # fmt: skip
    return out


def lower_phrases(scores: Tensor, tokens: Tensor, generated: Tensor, index: Any, nats: Tensor) -> Tensor:
    if index.start > scores.shape[1] or tokens.shape[1] < index.longest:
        return NotImplemented
    scores, out = scores.contiguous(), torch.empty_like(scores, memory_format=torch.contiguous_format)
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    call("lower_phrases", scores, tokens, tokens.stride(0), generated.contiguous(), index.random, index.powers,
         index.breaks, index.keys, index.span, index.ids, nats.contiguous(), index.start, len(index.keys) - 1,
         index.length, index.longest, index.anchor, out, tokens.shape[1], *scores.shape)  # fmt: skip
    return out


# --- heads ---


def share_logits(scores: Tensor, mapping: Tensor, weights: Tensor, codes: int, bias: Tensor | None = None) -> Tensor:
    if mapping.dtype != torch.int32 or weights.dtype != torch.float32:
        return NotImplemented
    scores, tokens = scores.contiguous(), min(len(mapping), scores.shape[1])
    out = torch.empty_like(scores)
    bias = None if bias is None else bias.contiguous()
    call("share_logits", scores, mapping.contiguous(), weights.contiguous(), bias, out, tokens, codes, *scores.shape)
    return out


def spread(scores: Tensor, mapping: Tensor, bias: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
    if scores.dtype is torch.float16 or mapping.dtype != torch.int32 or not scores.numel():
        return NotImplemented
    (books, width), codes = mapping.shape, scores.shape[-1]
    for term, shape in ((bias, (width,)), (extra, (*scores.shape[:-1], width))):
        if term is not None and (term.shape != shape or (term.requires_grad and torch.is_grad_enabled())):
            return NotImplemented
    out = scores.new_empty(*scores.shape[:-1], width)
    given, *more = (None if x is None else x.float().contiguous() for x in (scores, bias, extra))
    call("spread", given, mapping.contiguous(), *more, out, scores.numel() // codes, books, codes, width,
         out.dtype is torch.bfloat16)  # fmt: skip
    return out


def plane_scores(
    t: Tensor, whole: Tensor, plane: Tensor, codes: Tensor, units: Tensor, factor: int, rows: Tensor | None = None
) -> Tensor:
    rows = None if rows is None else rows.contiguous()
    out = t.new_empty(len(t), len(plane) if rows is None else len(rows))
    call("plane_scores", plane, codes, units, whole, t, rows, out, out.shape[1], plane.shape[1], len(t), factor)
    return out


def hold_in_large_pages(tensor: Tensor) -> None:
    """Ask the system to hold a tensor in pages of 2 MiB, which are read faster by half. A wish, and no operation."""
    if library() is not None and tensor.device.type == "cpu":
        call("hold_in_large_pages", tensor, tensor.nbytes)
