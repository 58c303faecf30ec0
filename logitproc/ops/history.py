"""Operations on scores that depend on the tokens so far, in plain torch; `reference` holds the others.

tokens int64 [rows, length] are ids, oldest first; -1 stands for "no token".
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from .dispatch import op
from .reference import within_budget

# --- n-grams ---


@dataclass(frozen=True, eq=False)
class NGramTable:
    """What n-grams add to scores, nats: after a text, token i gets base[i], and the value of (h, i) for each context h
    of 1 to order - 1 tokens that the text ends with; the sum times the trust in the longest h.

    The C contexts of all lengths are numbered through, shorter ones first; C is "not found", C + 1 the empty context.
    """

    order: int
    base: Tensor  # float32 [V]
    symbols: Tensor  # int64 [V + 2]: what ids stand for in contexts; of any id >= V at V, of -1 at the end
    bos: bool  # a text that does not begin with the symbol V (start of a document) is preceded by one
    keys: Tensor  # int64 [C + 1], ascending: (context without its oldest, or -1) (V + 2) + oldest; a guard at the end
    start: Tensor  # int64 [C + 2]: entries of context c are start[c] to start[c + 1]; C has none
    ids: Tensor  # int64 [E + 1], ascending in a context; the last one fills
    values: Tensor  # float32 [E + 1]; the last is 0
    longest: int  # most entries of a context
    trust: Tensor | None  # float32 [C + 2]; None for 1 everywhere

    def __post_init__(self) -> None:
        if len(self.ids) and not 0 <= int(self.ids.min()) <= int(self.ids.max()) < len(self.base):
            raise ValueError(f"The n-grams hold ids outside their vocabulary of {len(self.base)} tokens.")

    def bias(self, tokens: Tensor) -> Tensor:
        """What the n-grams add after tokens [rows, >= order - 1], [rows, V]."""
        contexts = self.contexts(tokens)
        bias = self.base.repeat(len(tokens), 1)
        bias.index_put_(*self._entries(contexts), accumulate=True)
        if self.trust is None:
            return bias
        none = len(self.keys) - 1
        known = (contexts < none).sum(0, keepdim=True)  # 0: the empty context is the longest that matches
        longest_match = torch.nn.functional.pad(contexts, (0, 0, 1, 0), value=none + 1).gather(0, known)
        return bias.mul_(self.trust.take(longest_match).T)

    def contexts(self, tokens: Tensor) -> Tensor:
        """The context of each order from 2 on after tokens [rows, >= order - 1], int64 [order - 1, rows]."""
        vocabulary, none = len(self.base), len(self.keys) - 1
        tokens = tokens[:, tokens.shape[1] - self.order + 1 :]
        symbols = self.symbols[tokens.clamp(-1, vocabulary)]
        if self.bos:
            symbols = _start_of_text(symbols, tokens, vocabulary)
        found: list[Tensor] = []
        for n in range(1, self.order):
            parent = found[-1] if found else -1
            key = parent * (vocabulary + 2) + symbols[:, -n]
            at = torch.searchsorted(self.keys, key)
            found.append(torch.where(self.keys.take(at) == key, at, none))
        return torch.stack(found) if found else tokens.new_empty(0, len(tokens))

    def _entries(self, contexts: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """((row, id), value) of every entry of contexts [order - 1, rows], three flat lists."""
        start = self.start.take(contexts).flatten()
        length = self.start.take(contexts + 1).flatten() - start
        if contexts.device.type == "cpu":
            source = torch.repeat_interleave(length)
            at = (start - length.cumsum(0) + length).take(source) + torch.arange(len(source))
        else:  # only the GPU knows how many there are, and asking would wait for it: fill up to the longest
            reach = torch.arange(self.longest, device=contexts.device)
            source = torch.arange(len(start), device=contexts.device).repeat_interleave(self.longest)
            at = torch.where(reach < length[:, None], start[:, None] + reach, len(self.ids) - 1).flatten()
        rows = torch.arange(contexts.shape[1], device=contexts.device).repeat(contexts.shape[0])
        return (rows.take(source), self.ids.take(at)), self.values.take(at)


def _start_of_text(symbols: Tensor, tokens: Tensor, bos: int) -> Tensor:
    """Put the symbol `bos` before the first token of a text that does not begin with it."""
    absent = tokens < 0
    present_next = torch.nn.functional.pad(~absent[:, 1:], (0, 1), value=True)
    next_symbol = torch.nn.functional.pad(symbols[:, 1:], (0, 1), value=0)
    return torch.where(absent & present_next & (next_symbol != bos), bos, symbols)


@dataclass(frozen=True, eq=False)
class NGramBias:
    """The tables that are added up, on one device, and the tokens that they may change."""

    tables: tuple[NGramTable, ...]  # of one vocabulary
    allowed: Tensor  # bool [V]; tables hold 0 for other tokens

    def to(self, device: torch.device) -> Self:
        """Itself where it is there already."""
        if self.allowed.device == device:
            return self
        return replace(self, tables=tuple(_moved(t, device) for t in self.tables), allowed=self.allowed.to(device))


def _moved(table: Any, device: torch.device) -> Any:
    """A dataclass with its tensors on a device."""
    return replace(table, **{k: v.to(device) for k, v in vars(table).items() if isinstance(v, Tensor)})


@op
def add_ngrams(
    scores: Tensor, tokens: Tensor, ngrams: NGramBias, factor: Tensor | None = None, *, centred: bool = False,
    plausibility: float = 0.0, drop: bool = False, clip: float = math.inf, budget: float = math.inf,
    surprisal: float = math.inf,
) -> Tensor:  # fmt: skip
    """scores + bias in a new tensor: scores [rows, width >= V], tokens [rows, >= order - 1]; other options nats.

    factor        [rows, 1], by which the bias of each row is multiplied
    centred       less its mean under softmax(scores) over the tokens that may be biased. A constant there is
                  invisible to a softmax over all tokens, but not beside tokens that get no bias
    plausibility  alpha: only tokens with p >= alpha max p are biased, and so that the sum of their probabilities
                  stays (Li et al., "Contrastive Decoding", arXiv:2210.15097, eq. 2)
    drop          the tokens that are not plausible are forbidden
    clip          bound on |bias|
    budget        bound on KL(result, scores), kept by scaling the bias of a row down
    surprisal     bound on the rise of E[-ln p] among the tokens that may be biased, kept by sharpening: their scores
                  are divided by the `affordable_temperature`, and the sum of their probabilities stays
    """
    beyond = scores.shape[1] - len(ngrams.allowed)
    bias = torch.stack([table.bias(tokens) for table in ngrams.tables]).sum(0).to(scores.dtype)
    bias = torch.nn.functional.pad(bias if factor is None else bias * factor, (0, beyond))
    allowed = inside = torch.nn.functional.pad(ngrams.allowed, (0, beyond))
    kept = plausibility > 0 or surprisal < math.inf  # the sum of the probabilities inside
    if kept:
        above = scores - scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)  # all may be -inf
        inside = allowed & (above > (math.log(plausibility) - 1e-6 if plausibility else -math.inf))
    if not (centred or kept or clip < math.inf or budget < math.inf):
        return scores + bias
    within = scores.masked_fill(~inside, -torch.inf)
    p = within.softmax(-1).nan_to_num_()  # NaN where nothing is inside
    if centred:
        bias -= torch.linalg.vecdot(p, bias)[:, None]
    bias = torch.where(inside, bias.clamp_(-clip, clip), 0.0)
    if budget < math.inf:
        bias *= within_budget(within if plausibility else scores, bias, budget).nan_to_num_()
    if surprisal < math.inf:
        temperature = affordable_temperature(within, bias, surprisal)
        bias = torch.where(inside, above / temperature - above + bias, 0.0)
    if kept:
        bias -= torch.linalg.vecdot(p, bias.exp()).log().nan_to_num_()[:, None]
    out = torch.where(inside, scores + bias, scores)
    return out.masked_fill_(allowed & ~inside, -torch.inf) if drop else out


def affordable_temperature(scores: Tensor, bias: Tensor, nats: float) -> Tensor:
    """T [rows, 1], the largest in (0, 1] with E_q[-ln p] <= E_p[-ln p] + nats; 1 for a row without a finite score.

    p = softmax(scores), q = softmax(scores / T + bias), scores and bias [rows, width]. E_q[-ln p] grows with T (its
    derivative by -1/T is the variance of ln p), so bisection is safe. Of all q that keep the bound this one has the
    largest E_q[bias] - KL(q, p); without the bound that is softmax(scores + bias), and 1/T - 1 is its multiplier.
    """
    scores = scores - scores.amax(-1, keepdim=True)
    finite = scores.masked_fill(scores == -torch.inf, 0.0)
    mean = lambda logits: torch.linalg.vecdot(logits.softmax(-1), finite)[:, None]  # of ln p but for a constant
    least = mean(scores) - nats
    low, high = torch.full_like(least, 1e-6), torch.ones_like(least)
    whole = mean(scores + bias) >= least
    for _ in range(20):
        middle = (low + high) / 2
        fits = mean(scores / middle + bias) >= least
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.where(whole | least.isnan(), 1.0, low)


# --- repetition ---


@op
def loop_guard(
    scores: Tensor, tokens: Tensor, generated: Tensor, strength: float, base: float, length: int, cap: float,
    *, in_place: bool = False,
) -> Tensor:  # fmt: skip
    """DRY: scores [rows, width] - min(cap, strength base^(L - length)) nats where L >= length.

    L(i) is the length of the longest suffix of the last `generated` [rows] tokens of each row that occurred earlier
    among them followed by i. Source: "DRY: a modern repetition penalty", text-generation-webui pull request 5677.
    """
    columns = tokens.shape[1]
    if columns < 2:
        return scores
    age = torch.arange(columns, 0, -1, device=tokens.device)
    tokens = torch.where(age <= generated[:, None], tokens, -1)
    longest = min(columns - 1, longest_match(strength, base, length, cap))
    earlier = torch.nn.functional.pad(tokens[:, :-1], (longest - 1, 0), value=-1)
    newest = tokens[:, -longest:].masked_fill(tokens[:, -longest:] < 0, -2)  # padding matches nothing
    match = torch.zeros_like(tokens[:, 1:], dtype=torch.int32)  # of what ends before each token but the first
    for back in range(longest - 1, -1, -1):
        start = longest - 1 - back
        match = (match + 1) * (earlier[:, start : start + columns - 1] == newest[:, -1 - back, None])
    nats = ((match.float() - length) * math.log(base)).exp_().mul_(strength).clamp_(max=cap)
    following = tokens[:, 1:]
    penalised = (match >= length) & (following >= 0) & (following < scores.shape[1])
    following, nats = torch.where(penalised, following, 0), torch.where(penalised, nats, 0.0)
    lowered = scores.gather(1, following) - nats
    return (scores.scatter_reduce_ if in_place else scores.scatter_reduce)(1, following, lowered, "amin")


@functools.cache
def longest_match(strength: float, base: float, length: int, cap: float) -> int:
    """The L from which the penalty of `loop_guard` is its cap."""
    return length + max(0, math.ceil(math.log(cap / strength) / math.log(base)))
