"""Kernels that read the tokens so far. A row is worked on by many programs, a block of its scores each."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..history import NGramBias, NGramTable, longest_match
from .rows import LOWEST

BLOCK = 1024  # scores


def with_unit_stride(scores: Tensor) -> Tensor:
    """Themselves where the scores of a row lie side by side, however far the next row is."""
    return scores if scores.stride(1) == 1 else scores.contiguous()


@triton.jit
def _count_smaller(keys, n, key):
    """How many of n ascending keys are smaller than `key`.

    Looks at 128 keys at a time: the search then waits for memory log_128 n times instead of log_2 n.
    """
    low = tl.full((), 0, tl.int64)
    span = low + n  # the answer is in [low, low + span]
    while span > 0:
        step = tl.cdiv(span, 128)
        at = tl.arange(0, 128) * step
        probes = tl.load(keys + low + at, mask=at < span, other=0)
        smaller = tl.sum(((at < span) & (probes < key)).to(tl.int64))  # the first so many probes
        high = low + tl.minimum(smaller * step, span)
        low = tl.where(smaller == 0, low, low + (smaller - 1) * step + 1)
        span = tl.where(smaller == 0, 0, high - low)
    return low


# --- n-grams ---


@triton.jit
def _look_up_kernel(
    tokens, stride, columns, symbols, vocabulary, keys, contexts, start, trust, factor, begins, ends, weights,
    ORDER: tl.constexpr, BOS: tl.constexpr, TRUST: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """begins, ends [rows, ORDER - 1]: the entries of the contexts that each text ends with; weights [rows]."""
    row = tl.program_id(0).to(tl.int64)
    parent = tl.full((), -1, tl.int64)
    longest = parent + contexts + 2
    after = parent  # the token after this one
    follower = parent  # and its symbol
    for n in tl.static_range(1, ORDER):
        token = tl.load(tokens + row * stride + columns - n)
        symbol = tl.load(symbols + tl.where(token < 0, vocabulary + 1, tl.minimum(token, vocabulary)))
        newest = symbol
        if BOS:
            starts = token < 0
            if n > 1:
                starts = starts & (after >= 0) & (follower != vocabulary)
            newest = tl.where(starts, vocabulary, symbol)
        after = token
        follower = symbol
        key = parent * (vocabulary + 2) + newest
        at = _count_smaller(keys, contexts, key)
        parent = tl.where(tl.load(keys + at) == key, at, contexts)
        longest = tl.where(parent < contexts, parent, longest)
        tl.store(begins + row * (ORDER - 1) + n - 1, tl.load(start + parent))
        tl.store(ends + row * (ORDER - 1) + n - 1, tl.load(start + parent + 1))
    weight = 1.0
    if TRUST:
        weight = tl.load(trust + longest)
    if FACTOR:
        weight = weight * tl.load(factor + row)
    tl.store(weights + row, weight)


@triton.jit
def _bias_kernel(
    source, stride, base, vocabulary, ids, values, begins, ends, weights, out, width,
    ORDER: tl.constexpr, SOURCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = weight * (base + entries), added to `source` if there is one."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    i = first + tl.arange(0, BLOCK)
    out += row * width
    weight = tl.load(weights + row)
    bias = weight * tl.load(base + i, mask=i < vocabulary, other=0.0)
    if SOURCE:
        bias += tl.load(source + row * stride + i, mask=i < width)
    tl.store(out + i, bias, mask=i < width)
    for n in tl.static_range(0, ORDER - 1):  # one after the other: contexts share tokens
        begin = tl.load(begins + row * (ORDER - 1) + n)
        count = tl.load(ends + row * (ORDER - 1) + n) - begin
        low = begin + _count_smaller(ids + begin, count, first)
        high = begin + _count_smaller(ids + begin, count, first + BLOCK)
        tl.debug_barrier()
        for at in range(low, high, 128):
            entry = at + tl.arange(0, 128)
            id = tl.load(ids + entry, mask=entry < high, other=0)
            value = weight * tl.load(values + entry, mask=entry < high, other=0.0)
            tl.store(out + id, tl.load(out + id, mask=entry < high) + value, mask=entry < high)


@triton.jit
def _top_kernel(scores, stride, tops, width, BLOCK: tl.constexpr):
    """tops [rows, blocks]: the largest score of each block."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(scores + row * stride + i, mask=i < width, other=-float("inf"))
    tl.store(tops + row * tl.num_programs(1) + block, tl.max(x))


@triton.jit
def _inside(x, i, row, tops, blocks, allowed, vocabulary, limit, LIMIT: tl.constexpr, BLOCKS: tl.constexpr):
    """Which tokens are biased: those that may be, and that are plausible."""
    inside = (i < vocabulary) & (tl.load(allowed + i, mask=i < vocabulary, other=0) != 0)
    if LIMIT:
        b = tl.arange(0, BLOCKS)
        top = tl.max(tl.load(tops + row * blocks + b, mask=b < blocks, other=LOWEST))
        inside = inside & (x - tl.maximum(top, LOWEST) > limit)
    return inside


@triton.jit
def _mean_score(x, bias, count, cold, weight, BLOCK: tl.constexpr):
    """The mean of x under exp(cold x + weight bias)."""
    top = tl.full((), LOWEST, tl.float32)
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        y = cold * tl.load(x + i, mask=i < count, other=0.0) + weight * tl.load(bias + i, mask=i < count, other=0.0)
        top = tl.maximum(top, tl.max(tl.where(i < count, y, LOWEST)))
    total = tl.full((), 0.0, tl.float32)
    first = total
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        score = tl.load(x + i, mask=i < count, other=0.0)
        y = cold * score + weight * tl.load(bias + i, mask=i < count, other=0.0)
        e = tl.where(i < count, tl.exp(y - top), 0.0)
        total += tl.sum(e)
        first += tl.sum(e * score)
    return first / tl.where(count > 0, total, 1.0)


@triton.jit
def _sharpen_kernel(
    scores, stride, bias, tops, blocks, allowed, vocabulary, limit, nats, room, width,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Put the `affordable_temperature` of each row into its bias; room [2, rows, width] is for what is biased."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    b = tl.arange(0, BLOCKS)
    top = tl.maximum(tl.max(tl.load(tops + row * blocks + b, mask=b < blocks, other=LOWEST)), LOWEST)
    known, its_bias = room + row * width, room + (rows + row) * width
    count = tl.full((), 0, tl.int32)
    for block in range(blocks):
        if tl.load(tops + row * blocks + block) - top > limit:
            i = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(scores + row * stride + i, mask=i < width, other=-float("inf"))
            inside = _inside(x, i, row, tops, blocks, allowed, vocabulary, limit, True, BLOCKS)
            at = count + tl.cumsum(inside.to(tl.int32), 0) - 1
            tl.store(known + at, x - top, mask=inside)
            tl.store(its_bias + at, tl.load(bias + row * width + i, mask=inside), mask=inside)
            count += tl.sum(inside.to(tl.int32))
    tl.debug_barrier()
    least = _mean_score(known, its_bias, count, 1.0, 0.0, BLOCK) - nats
    if _mean_score(known, its_bias, count, 1.0, 1.0, BLOCK) < least:
        low = tl.full((), 1e-6, tl.float32)
        high = tl.full((), 1.0, tl.float32)
        for _ in range(20):
            middle = (low + high) / 2
            fits = _mean_score(known, its_bias, count, 1 / middle, 1.0, BLOCK) >= least
            high = tl.where(fits, high, middle)
            low = tl.where(fits, middle, low)
        for block in range(blocks):
            if tl.load(tops + row * blocks + block) - top > limit:
                i = block * BLOCK + tl.arange(0, BLOCK)
                x = tl.load(scores + row * stride + i, mask=i < width, other=-float("inf"))
                inside = _inside(x, i, row, tops, blocks, allowed, vocabulary, limit, True, BLOCKS)
                g = tl.load(bias + row * width + i, mask=inside)
                tl.store(bias + row * width + i, g + (x - top) * (1 / low - 1), mask=inside)


@triton.jit
def _sums_kernel(
    scores, stride, bias, tops, allowed, vocabulary, limit, sums, width,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """sums [4, rows, blocks] over the tokens of a block that are biased: the largest score and the sum of exp; and
    of biased scores (LIMIT), or 0 and the sum of exp times bias."""
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(scores + row * stride + i, mask=i < width, other=-float("inf"))
    g = tl.load(bias + row * width + i, mask=i < width, other=0.0)
    inside = _inside(x, i, row, tops, blocks, allowed, vocabulary, limit, LIMIT, BLOCKS)
    x = tl.where(inside, x, -float("inf"))
    high = tl.maximum(tl.max(x), LOWEST)
    e = tl.exp(x - high)
    if LIMIT:
        biased_high = tl.maximum(tl.max(x + g), LOWEST)
        biased = tl.sum(tl.exp(x + g - biased_high))
    else:
        biased_high = 0.0
        biased = tl.sum(e * g)
    rows = tl.num_programs(0).to(tl.int64)
    out = sums + row * blocks + block
    tl.store(out, high)
    tl.store(out + rows * blocks, tl.sum(e))
    tl.store(out + 2 * rows * blocks, biased_high)
    tl.store(out + 3 * rows * blocks, biased)


@triton.jit
def _shift_kernel(
    scores, stride, tops, allowed, vocabulary, limit, sums, out, width,
    LIMIT: tl.constexpr, DROP: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """out, which holds the bias, becomes the biased scores: less the mean, or so that a set keeps its mass (LIMIT)."""
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    b = tl.arange(0, BLOCKS)
    rows = tl.num_programs(0).to(tl.int64)
    at = sums + row * blocks + b
    highs = tl.load(at, mask=b < blocks, other=LOWEST)
    high = tl.max(highs)
    total = tl.sum(tl.exp(highs - high) * tl.load(at + rows * blocks, mask=b < blocks, other=0.0))
    some = total > 0
    total = tl.where(some, total, 1.0)
    biased = tl.load(at + 3 * rows * blocks, mask=b < blocks, other=0.0)
    if LIMIT:
        biased_highs = tl.load(at + 2 * rows * blocks, mask=b < blocks, other=LOWEST)
        biased_high = tl.max(biased_highs)
        after = tl.sum(tl.exp(biased_highs - biased_high) * biased)
        shift = tl.where(some, tl.log(tl.where(some, after, 1.0) / total) + (biased_high - high), 0.0)
    else:
        shift = tl.sum(tl.exp(highs - high) * biased) / total

    i = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(scores + row * stride + i, mask=i < width, other=-float("inf"))
    g = tl.load(out + row * width + i, mask=i < width, other=0.0)
    inside = _inside(x, i, row, tops, blocks, allowed, vocabulary, limit, LIMIT, BLOCKS)
    result = tl.where(inside, x + (g - shift), x)
    if DROP:
        may = (i < vocabulary) & (tl.load(allowed + i, mask=i < vocabulary, other=0) != 0)
        result = tl.where(may & (inside == 0), -float("inf"), result)
    tl.store(out + row * width + i, result, mask=i < width)


def add_ngrams(
    scores: Tensor, tokens: Tensor, ngrams: NGramBias, factor: Tensor | None = None, *, centred: bool = False,
    plausibility: float = 0.0, drop: bool = False, clip: float = math.inf, budget: float = math.inf,
    surprisal: float = math.inf,
) -> Tensor:  # fmt: skip
    rows, width = scores.shape
    if clip < math.inf or budget < math.inf:
        return NotImplemented
    if tokens.shape[1] < max(table.order for table in ngrams.tables) - 1 or width < len(ngrams.allowed):
        return NotImplemented  # the kernel would read and write outside
    out = torch.empty(scores.shape, device=scores.device)
    if not out.numel():
        return out
    kept = plausibility > 0 or surprisal < math.inf  # the sum of the probabilities of what is biased
    scores, plain = with_unit_stride(scores), not (centred or kept)
    blocks = triton.cdiv(width, BLOCK)
    for number, table in enumerate(ngrams.tables):
        source = out if number else scores if plain else None
        _add_table(table, tokens, factor, source, out)
    if plain:
        return out
    sums, tops = scores.new_empty(4, rows, blocks), scores.new_empty(rows, blocks)
    limit = math.log(plausibility) - 1e-6 if plausibility else -math.inf
    sizes: dict[str, Any] = {"BLOCK": BLOCK, "BLOCKS": triton.next_power_of_2(blocks), "LIMIT": kept}
    about = (tops, ngrams.allowed, len(ngrams.allowed), limit, sums)
    if kept:
        _top_kernel[rows, blocks](scores, scores.stride(0), tops, width, BLOCK)
    if surprisal < math.inf:
        _sharpen_kernel[rows,](
            scores, scores.stride(0), out, tops, blocks, ngrams.allowed, len(ngrams.allowed), limit, float(surprisal),
            scores.new_empty(2, rows, width), width, BLOCK=BLOCK, BLOCKS=sizes["BLOCKS"],
        )  # fmt: skip
    _sums_kernel[rows, blocks](scores, scores.stride(0), out, *about, width, **sizes)
    _shift_kernel[rows, blocks](scores, scores.stride(0), *about, out, width, DROP=drop, **sizes)
    return out


def _add_table(table: NGramTable, tokens: Tensor, factor: Tensor | None, source: Tensor | None, out: Tensor) -> None:
    """out = source + the bias of one table."""
    rows, width = out.shape
    tokens = with_unit_stride(tokens)
    begins, ends = tokens.new_empty(2, rows, table.order)
    weights = out.new_empty(rows)
    _look_up_kernel[rows,](
        tokens, tokens.stride(0), tokens.shape[1], table.symbols, len(table.base), table.keys, len(table.keys) - 1,
        table.start, table.trust, None if factor is None else factor.contiguous(), begins, ends, weights,
        ORDER=table.order, BOS=table.bos, TRUST=table.trust is not None, FACTOR=factor is not None,
    )  # fmt: skip
    _bias_kernel[rows, triton.cdiv(width, BLOCK)](
        source, 0 if source is None else source.stride(0), table.base, len(table.base), table.ids, table.values,
        begins, ends, weights, out, width, ORDER=table.order, SOURCE=source is not None, BLOCK=BLOCK,
    )  # fmt: skip


# --- repetition ---


@triton.jit
def _loop_kernel(
    scores, stride, tokens, columns, generated, length, longest, factor, log_base, cap, out, out_stride, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tokens += row * columns
    first = columns - tl.minimum(tl.load(generated + row), columns)
    next = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # the tokens that what matches is followed by
    id = tl.load(tokens + next, mask=next < columns, other=-1)
    matching = (next > first) & (next < columns)
    match = tl.zeros([BLOCK], tl.int32)
    for back in range(1, longest + 1):
        newest = tl.load(tokens + columns - back, mask=columns - back >= first, other=-1)
        matching = matching & (next - back >= tl.where(newest < 0, columns, first))  # padding matches nothing
        matching = matching & (tl.load(tokens + next - back, mask=matching, other=-1) == newest)
        match += matching.to(tl.int32)
    lowered = (match >= length) & (id >= 0) & (id < width)
    nats = tl.minimum(factor * tl.exp((match - length).to(tl.float32) * log_base), cap)
    x = tl.load(scores + row * stride + id, mask=lowered, other=0.0)
    tl.atomic_min(out + row * out_stride + id, x - nats, mask=lowered)


def loop_guard(
    scores: Tensor, tokens: Tensor, generated: Tensor, strength: float, base: float, length: int, cap: float,
    *, in_place: bool = False,
) -> Tensor:  # fmt: skip
    rows, columns = tokens.shape
    if columns < 2 or scores.stride(1) != 1:
        return NotImplemented
    before, out = (scores.clone(), scores) if in_place else (scores, scores.clone())
    if out.numel():
        longest = min(columns - 1, longest_match(strength, base, length, cap))
        _loop_kernel[rows, triton.cdiv(columns, 128)](
            before, before.stride(0), tokens.contiguous(), columns, generated.contiguous(), length, longest,
            float(strength), math.log(base), float(cap), out, out.stride(0), scores.shape[1], BLOCK=128,
        )  # fmt: skip
    return out


@triton.jit
def _phrases_kernel(
    scores, stride, tokens, columns, generated, random, powers, breaks, keys, contexts, span, ids, nats, start,
    length, out, out_stride, ANCHOR: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = length + tl.program_id(1)  # of the last n symbols
    k = tl.arange(0, LONGEST)
    known = tl.load(generated + row)
    token = tl.load(tokens + row * columns + columns - 1 - k, mask=(k < n) & (k < columns), other=-1)
    nothing = start + 1
    symbol = tl.where((k < known) & (token >= 0) & (token < start), token, nothing)
    if ANCHOR:
        symbol = tl.where(k == known, start, symbol)
    broken = (symbol == nothing) | (tl.load(breaks + symbol) != 0)
    hash = tl.sum(tl.where(k < n, tl.load(random + symbol) * tl.load(powers + k, mask=k < n, other=0), 0))
    at = _count_smaller(keys, contexts, hash)
    if (tl.sum((broken & (k < n)).to(tl.int32)) == 0) & (tl.load(keys + at) == hash):
        begin = tl.load(span + 2 * at)
        end = begin + tl.load(span + 2 * at + 1)
        more = tl.load(nats + n - length)
        for first in range(begin, end, 128):
            entry = first + tl.arange(0, 128)
            id = tl.load(ids + entry, mask=entry < end, other=0)
            x = tl.load(scores + row * stride + id, mask=entry < end, other=0.0)
            tl.atomic_min(out + row * out_stride + id, x - more, mask=entry < end)


def lower_phrases(scores: Tensor, tokens: Tensor, generated: Tensor, index: Any, nats: Tensor) -> Tensor:
    if scores.stride(1) != 1 or index.start > scores.shape[1] or tokens.shape[1] < index.longest:
        return NotImplemented
    out = scores.clone()
    if out.numel():
        _phrases_kernel[len(scores), index.longest - index.length + 1](
            scores, scores.stride(0), tokens.contiguous(), tokens.shape[1], generated.contiguous(), index.random,
            index.powers, index.breaks, index.keys, len(index.keys) - 1, index.span, index.ids, nats.contiguous(),
            index.start, index.length, out, out.stride(0), ANCHOR=index.anchor,
            LONGEST=triton.next_power_of_2(index.longest),
        )  # fmt: skip
    return out
