"""N-gram style injection: add to the logits what an n-gram model of a style corpus says.

Ahmed, "Limits of n-gram Style Control for LLMs via Logit-Space Injection", arXiv:2601.16224 (2026); the
printed rule (section 2.2) is `rule="paper"`. It pushes a model *away* from the corpus: ln P <= 0 and only
tokens of the corpus change, so everything the corpus never said gains. The other rules mend that.

    z' = z + strength * g        g of token i after the last n - 1 tokens, nats:
    paper     sum over orders n that hold i of  w_n ln P_n(i)          P_n add-k; 0 elsewhere
    lift      sum over orders n that hold i of  w_n ln((C_n(i) + k) / k)
    backoff   ln P(i), interpolated modified Kneser-Ney, every token
    ratio     ln P_style(i) - ln P_background(i), both Kneser-Ney

Differs from the paper: everything but `paper` with its defaults; see `NGramStyleLogitsProcessor`.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from torch import Tensor

from ..checks import in_range, name_and_number, one_of
from ..ops import within_budget
from ..prior import NGramPrior, default_weights, symbol_table
from ..processor import Processor, trailing
from ..registry import register

Rule = Literal["paper", "lift", "backoff", "ratio"]
# What a parameter left out (None) becomes. `backoff`: chosen by `eval/study.py`, see eval/RESULTS.md. The others are
# the bare formulas; `paper` at the strength that the paper found best.
OFF: dict[str, Any] = {"confidence": "none", "plausibility": 0.0, "guard": 0.0}
DEFAULTS: dict[str, dict[str, Any]] = {
    "paper": {"strength": 0.1, **OFF},
    "lift": {"strength": 0.2, **OFF},
    "backoff": {"strength": 1.0, "confidence": "wb", "plausibility": 0.01, "guard": 2.0},
    "ratio": {"strength": 0.2, **OFF},
}
BY_RULE: Any = None
SPARSE = ("paper", "lift")  # the rules that leave most tokens alone
LOWEST = -22.0  # ln of a probability that rounds to 0: a bias steers, it forbids nothing, and exp(4 * 22) is finite
FOLLOWERS = 512  # the paper keeps so many next tokens of each context


# --- math ---


class Bias(NamedTuple):
    """strength * g of some rows as what is added up: a weighted row of `basis` for each prior, and E entries."""

    basis: Tensor  # float32 [priors + 1, width]; the last row is 1 for tokens that may be biased, else 0
    weights: list[Tensor]  # float32 [rows, 1] each, of the first rows of the basis
    row: Tensor  # int64 [E]
    id: Tensor  # int64 [E]
    value: Tensor  # float32 [E]

    def added_to(self, scores: Tensor, out: Tensor | None = None) -> Tensor:
        """scores + strength * g [rows, width], in `out` if given: fresh memory costs more than arithmetic."""
        return self._rest(torch.addcmul(scores, self.weights[0], self.basis[0], out=out))

    def dense(self) -> Tensor:
        """strength * g [rows, width]."""
        return self._rest(self.weights[0] * self.basis[0])

    def _rest(self, out: Tensor) -> Tensor:
        for weight, part in zip(self.weights[1:], self.basis[1:], strict=False):
            out.addcmul_(weight, part)
        return out.index_put_((self.row, self.id), self.value, accumulate=True)

    def times(self, factor: Tensor) -> "Bias":
        """Each row times its factor [rows, 1]."""
        weights = [weight * factor for weight in self.weights]
        return self._replace(weights=weights, value=self.value * factor[self.row, 0])

    def centred(self, p: Tensor) -> "Bias":
        """Less its mean under p [rows, width] over the tokens that may be biased; p need not sum to 1.

        A constant in g is invisible to a softmax over all tokens, but not beside tokens that get no bias.
        """
        # One dot product a row: a matrix product would round a row by how many stand beside it.
        *means, mass = (torch.linalg.vecdot(p, part) for part in self.basis)
        total = torch.zeros_like(mass)
        total.index_put_((self.row,), p[self.row, self.id] * self.value, accumulate=True)
        for weight, mean in zip(self.weights, means, strict=True):
            total.addcmul_(weight[:, 0], mean)
        # No mass to speak of, or a row without a finite score: nothing is biased, so any finite mean does.
        mean = torch.where(mass > 1e-6, total / mass, 0.0)
        return self._replace(weights=[*self.weights, -mean[:, None]])


class BiasTable:
    """strength * g of one rule for one prior, on one device: a value for each token, and for each n-gram.

    The value of an n-gram is what its context h adds to its token: for the sparse rules the term of that order,
    for the dense ones ln p(i given h) - ln b(h) - ln p(i given h without its oldest token). Kneser-Ney backs off
    by p(i given h) = b(h) p(i given the shorter h) where h does not hold i, so all contexts together give ln p
    but for the sum of their ln b, which is the same for every token.

    The C contexts of all orders are numbered through; C is "not found" and C + 1 the empty context.
    """

    def __init__(self, prior: NGramPrior, rule: Rule, k: float, weights: Sequence[float] | None,
                 confidence: str, exempt: list[int], bos: bool, strength: float):  # fmt: skip
        self.order, self.width, self.bos = prior.order, prior.vocab_size, bos
        trust = _confidence(prior, confidence)
        base, values = _sparse(prior, rule, k, weights, trust) if rule in SPARSE else _dense(prior)
        base[exempt] = 0.0
        keys, lengths, ids, kept = [], [], [], []
        first, parents = -1, 0  # the number of the first parent; in keys the empty context is -1
        for o, value in zip(prior.orders[1:], values, strict=True):
            keys.append((first + o.parent) * (self.width + 2) + o.oldest)
            keep = (value != 0) & ~np.isin(o.ids, exempt)
            lengths.append(np.bincount(o.context[keep], minlength=len(o.keys)))
            ids.append(o.ids[keep])
            kept.append(value[keep] * strength)
            first, parents = parents, parents + len(o.keys)
        length = np.concatenate([*lengths, [0]]).astype(np.int64)
        self.longest = int(length.max())
        self.base = torch.from_numpy(base * strength).float()  # [V]
        self.symbols = torch.from_numpy(symbol_table(prior, bos))
        self.keys = torch.from_numpy(np.concatenate([*keys, [np.iinfo(np.int64).max]]))  # [C + 1], ascending
        self.none = torch.tensor(len(self.keys) - 1)
        self.length = torch.from_numpy(length)  # [C + 1], of each context's row of entries
        self.start = self.length.cumsum(0) - self.length
        self.ids = torch.from_numpy(np.concatenate([*ids, [0]]).astype(np.int64))  # [E + 1], the last for filling
        self.values = torch.from_numpy(np.concatenate([*kept, [0.0]])).float()
        self.trust: Tensor | None = None  # float32 [C + 2]; the terms of the sparse rules hold theirs
        if rule not in SPARSE and confidence != "none":
            self.trust = torch.from_numpy(np.concatenate([*trust[1:], [1.0], trust[0]])).float()

    def to(self, device: torch.device) -> Self:
        """Move once; later calls with the same device cost nothing."""
        if self.keys.device != device:
            vars(self).update({k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})
        return self

    def look_up(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(weight [rows, 1] of `base`, row, id and value of the entries) after tokens [rows, length]."""
        contexts = self.contexts(tokens)
        row, id, value = self.entries(contexts)
        if self.trust is None:
            return value.new_ones(len(tokens), 1), row, id, value
        known = (contexts < self.none).sum(0, keepdim=True)  # 0: the empty context is the longest that matches
        longest_match = torch.nn.functional.pad(contexts, (0, 0, 1, 0), value=len(self.keys)).gather(0, known)
        weight = self.trust.take(longest_match).T
        return weight, row, id, value * weight[row, 0]

    def contexts(self, tokens: Tensor) -> Tensor:
        """The context of each order from 2 on after tokens [rows, length], int64 [order - 1, rows]."""
        symbols = self.symbols[tokens.clamp(-1, self.width)]
        if self.bos:
            symbols = _start_of_text(symbols, tokens, self.width)
        found: list[Tensor] = []
        for n in range(1, self.order):
            parent = found[-1] if found else -1
            key = parent * (self.width + 2) + symbols[:, -n]
            at = torch.searchsorted(self.keys, key)
            found.append(torch.where(self.keys.take(at) == key, at, self.none))
        return torch.stack(found) if found else tokens.new_empty(0, len(tokens))

    def entries(self, contexts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(row, id, value) of every entry of contexts [order - 1, rows], three flat lists."""
        start, length = self.start.take(contexts).flatten(), self.length.take(contexts).flatten()
        if contexts.device.type == "cpu":
            source = torch.repeat_interleave(length)
            at = (start - length.cumsum(0) + length).take(source) + torch.arange(len(source))
        else:  # only the GPU knows how many there are, and asking would wait for it: fill up to the longest
            reach = torch.arange(self.longest, device=contexts.device)
            source = torch.arange(len(start), device=contexts.device).repeat_interleave(self.longest)
            at = torch.where(reach < length[:, None], start[:, None] + reach, len(self.ids) - 1).flatten()
        rows = torch.arange(contexts.shape[1], device=contexts.device).repeat(contexts.shape[0])
        return rows.take(source), self.ids.take(at), self.values.take(at)


def _sparse(
    prior: NGramPrior, rule: Rule, k: float, weights: Sequence[float] | None, trust: list[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """g of order 1 [V], and the term of each n-gram of each longer order."""
    weights = default_weights(prior.order) if weights is None else weights
    totals, kept = prior.totals(), prior.kept(FOLLOWERS)
    values = []
    for n, o in enumerate(prior.orders):
        count, context = prior.counts[n] + k, o.context  # type: ignore[index]
        if rule == "paper":
            term = np.log(count / (totals[n] + k * prior.vocab_size)[context])
        else:
            term = np.log(count / k)
        values.append(np.where(kept[n], weights[n] * trust[n][context] * term, 0.0))
    base = np.zeros(prior.vocab_size)
    base[prior.orders[0].ids] = values[0]
    return base, values[1:]


def _dense(prior: NGramPrior) -> tuple[np.ndarray, list[np.ndarray]]:
    """ln p of order 1 [V], and for each n-gram of each longer order what its context adds to that."""
    kn = prior.kneser_ney
    log_prob, log_backoff = ([np.maximum(x, LOWEST) for x in logs] for logs in (kn.log_prob, kn.log_backoff))
    base = np.full(prior.vocab_size, max(kn.log_unseen, LOWEST))
    base[prior.orders[0].ids] = log_prob[0]

    def after(n: int, contexts: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """ln p of ids [E] after contexts [E] of order n + 1."""
        if n == 0:
            return base[ids]
        entry = prior.find_entries(n, contexts, ids)
        value, absent = log_prob[n][entry], np.flatnonzero(entry < 0)  # absent where an ARPA file was pruned
        if len(absent):
            contexts, shorter = contexts[absent], prior.orders[n].parent[contexts[absent]]
            value[absent] = log_backoff[n][contexts] + after(n - 1, shorter, ids[absent])
        return value

    values = []
    for n, o in enumerate(prior.orders[1:], 1):
        context = o.context
        values.append(log_prob[n] - log_backoff[n][context] - after(n - 1, o.parent[context], o.ids))
    return base, values


def _confidence(prior: NGramPrior, rule: str) -> list[np.ndarray]:
    """Trust in each context, [C] per order, in [0, 1]: N/(N + d) or Witten-Bell's N/(N + followers)."""
    if rule == "none":
        return [np.ones(len(o.keys)) for o in prior.orders]
    totals = prior.totals()
    name, d = name_and_number(rule)
    if name == "wb":
        return [t / (t + np.diff(o.indptr)) for t, o in zip(totals, prior.orders, strict=True)]
    return [t / (t + d) for t in totals]


def _start_of_text(symbols: Tensor, tokens: Tensor, bos: int) -> Tensor:
    """Put `<s>` before the first token of a text that does not begin with it."""
    absent = tokens < 0
    present_next = torch.nn.functional.pad(~absent[:, 1:], (0, 1), value=True)
    next_symbol = torch.nn.functional.pad(symbols[:, 1:], (0, 1), value=0)
    return torch.where(absent & present_next & (next_symbol != bos), bos, symbols)


def plausible_part(scores: Tensor, alpha: float, barred: Tensor) -> Tensor:
    """p where p >= alpha max p, 0 elsewhere and for the ids `barred`; up to a factor for each row.

    Li et al., "Contrastive Decoding", arXiv:2210.15097, eq. 2.
    """
    lowest = torch.finfo(scores.dtype).min  # not -inf: a row of nothing else has a softmax, if a useless one
    top = scores.amax(-1, keepdim=True).clamp(min=lowest)
    inside = torch.nn.functional.threshold(scores - top, math.log(alpha) - 1e-6, lowest, inplace=True)
    return inside.softmax(-1).index_fill_(1, barred, 0.0)


def keep_mass(scores: Tensor, bias: Tensor, p: Tensor) -> Tensor:
    """scores + bias - ln E_p[exp(bias)] where p > 0, scores elsewhere: that set keeps its probability.

    p [rows, width] is proportional to the distribution of the scores over the set, all zero where that is
    empty. A constant in a row of the bias makes no difference. Overwrites bias and p: few passes are the point.
    """
    shift = (torch.linalg.vecdot(bias.exp(), p) / p.sum(-1)).log().nan_to_num_()[:, None]
    inside = p.ceil_()  # 1 in the set, 0 outside
    return bias.sub_(shift).mul_(inside).add_(scores)


def loop_guard(
    scores: Tensor, tokens: Tensor, factor: float, base: float, allowed: int, cap: float
) -> Tensor:
    """DRY: scores [rows, width] - min(cap, factor base^(L - allowed)) nats where L >= allowed.

    L(i) is the length of the longest suffix of tokens [rows, length] (-1: no token) that occurred earlier
    followed by i. Source: "DRY: a modern repetition penalty", text-generation-webui pull request 5677.
    """
    length = tokens.shape[1] - 1
    if length < 1:
        return scores
    # Longer matches than `longest` are capped anyway.
    longest = min(length, allowed + max(0, math.ceil(math.log(cap / factor) / math.log(base))))
    earlier = torch.nn.functional.pad(tokens[:, :-1], (longest - 1, 0), value=-1)
    newest = tokens[:, -longest:].masked_fill(tokens[:, -longest:] < 0, -2)  # padding matches nothing
    match = torch.zeros_like(tokens[:, 1:], dtype=torch.uint8)  # of what ends before each token but the first
    for back in range(longest - 1, -1, -1):
        start = longest - 1 - back
        match = (match + 1) * (earlier[:, start : start + length] == newest[:, -1 - back, None])
    nats = ((match.float() - allowed) * math.log(base)).exp_().mul_(factor).clamp_(max=cap)
    following = tokens[:, 1:]
    penalised = (match >= allowed) & (following >= 0) & (following < scores.shape[1])
    following, nats = torch.where(penalised, following, 0), torch.where(penalised, nats, 0.0)
    return scores.scatter_reduce(1, following, scores.gather(1, following) - nats, "amin")


# --- processor ---


@register("ngram", paper="arXiv:2601.16224")
@dataclass(eq=False)  # generate() drops a processor that equals an earlier one
class NGramStyleLogitsProcessor(Processor):
    """Steer a model towards the style of a corpus with n-gram counts of its tokens.

    scores [rows, width] -> scores + strength * g [rows, width], nats; g as in the module's docstring, from
    the last `prior.order - 1` tokens, prompt included. strength 0 returns the scores bit for bit. Columns
    beyond the prior's vocabulary, and special tokens, keep their scores (`exempt`, `eos`); the dense rules
    centre g to E_p[g] = 0 for that, which no softmax over the other tokens can tell.

    strength, confidence, plausibility and guard that are left out are the rule's own (`DEFAULTS`): what the
    study chose for "backoff", the bare formula for the others.

    Parameters:
        prior: what `NGramPrior.fit` made, or its folder, or the name of a bundled one.
        rule: "paper", "lift", "backoff" or "ratio".
        strength: in [0, 1].
        background: the prior whose style is divided out by "ratio".
        confidence: trust in a context seen N times with T distinct followers: "none", "wb" for N / (N + T),
            "count(d)" for N / (N + d). Multiplies the terms of that context (sparse rules) or the whole row
            by that of the longest match (dense rules).
        k: pseudo-count of the sparse rules.
        weights: of the orders, for the sparse rules; the paper's .1, .3, .6 by default.
        plausibility: alpha in [0, 1]; only tokens with p >= alpha max p are biased, 0 for all.
        plausibility_mode: "keep" leaves the probability of every token outside, and the sum inside, as they
            were; "drop" forbids the tokens outside. Exempt tokens are neither biased nor forbidden.
        clip: bound on |strength * g|, nats.
        schedule: "constant", "ramp(n)" from 0 over n generated tokens, "entropy" for strength H(p) / ln V,
            "budget(eps)" to scale the bias of a step down to KL(processed, base) <= eps nats.
        guard: strength of the loop guard (DRY) in nats, 0 for off; its growth, the match length that is
            still free, and its bound are guard_base, guard_length and guard_cap.
        exempt: further ids that keep their scores. Pad, BOS, unknown and EOS always do; with eos="prior" EOS
            takes the prior's end of document.
        bos: the beginning of a text is the start of a document for the prior.

    Raises ValueError for a parameter outside its range. Source: arXiv:2601.16224, section 2.2 (rule
    "paper"); Messner and Lippincott, arXiv:2503.08550 (relative of "lift"); Li et al., arXiv:2210.14431
    (relative of "backoff"); Kneser, Peters and Klakow, Eurospeech 1997, and Liu et al., arXiv:2105.03023
    (relatives of "ratio").

    Cost per token: O(rows (log contexts + longest row)) for the sparse rules without options, else a few
    passes over the scores. Beams, assisted decoding and batches of any kind are safe: nothing is remembered.

    Example:
        >>> import logitproc as lp
        >>> prior = lp.NGramPrior.from_ids([[1, 2, 3, 1, 2, 4]], order=3, vocab_size=8)
        >>> chain = lp.Chain([lp.NGramStyleLogitsProcessor(prior, strength=0.3)])
    """

    prior: NGramPrior
    rule: Rule = "backoff"
    strength: float = BY_RULE
    background: NGramPrior | None = None
    confidence: str = BY_RULE
    k: float = 1e-3
    weights: tuple[float, ...] | None = None
    plausibility: float = BY_RULE
    plausibility_mode: Literal["keep", "drop"] = "keep"
    clip: float | None = None
    schedule: str = "constant"
    guard: float = BY_RULE
    guard_base: float = 1.75
    guard_length: int = 2
    guard_cap: float = 10.0
    exempt: tuple[int, ...] = ()
    eos: Literal["exempt", "prior"] = "exempt"
    bos: bool = False

    artifacts: ClassVar = {"prior": NGramPrior, "background": NGramPrior}

    def __post_init__(self) -> None:
        one_of("rule", self.rule, get_args(Rule))
        if self.guard is None and self.strength == 0:
            self.guard = 0.0  # strength 0 alone is the identity
        for key, value in DEFAULTS[self.rule].items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        one_of("plausibility_mode", self.plausibility_mode, ("keep", "drop"))
        one_of("eos", self.eos, ("exempt", "prior"))
        in_range("strength", self.strength, 0, 1)
        in_range("plausibility", self.plausibility, 0, 1)
        in_range("guard", self.guard, 0, math.inf)
        in_range("k", self.k, 1e-12, math.inf)
        if self.clip is not None:
            in_range("clip", self.clip, 0, math.inf)
        if self.guard:
            in_range("guard_base", self.guard_base, 1.0001, math.inf)
            in_range("guard_length", self.guard_length, 1, math.inf)
            in_range("guard_cap", self.guard_cap, self.guard, 1e9)
        if not isinstance(self.prior, NGramPrior):
            raise ValueError(f"prior must be an NGramPrior, got {type(self.prior).__name__}.")
        if (self.rule == "ratio") != (self.background is not None):
            raise ValueError("rule='ratio' needs a background prior, and no other rule takes one.")
        if self.weights is not None and len(self.weights) != self.prior.order:
            raise ValueError(f"weights must hold {self.prior.order} numbers, got {self.weights!r}.")
        self._schedule, self._amount = name_and_number(
            one_of("schedule", self.schedule, ("constant", "entropy", "ramp(n)", "budget(eps)"))
        )
        one_of("confidence", self.confidence, ("none", "wb", "count(d)"))
        self.weights = None if self.weights is None else tuple(self.weights)
        self.exempt = tuple(self.exempt)
        for token in self.exempt:
            in_range("exempt", token, 0, self.prior.vocab_size - 1)
        self._reach = max(p.order for p in (self.prior, self.background) if p is not None) - 1
        self.context = None if self.guard else self._reach
        self._bounded = self.clip is not None or self._schedule == "budget"
        self._placed: dict[tuple[torch.device, int], Any] = {}  # tables for the device and width last seen
    @classmethod
    def example(cls, width: int) -> Self:
        return cls(_example_prior(width), strength=0.5)

    @classmethod
    def neutral(cls, width: int) -> Self:
        return cls(_example_prior(width), strength=0.0)

    @classmethod
    def variants(cls, width: int) -> dict[str, Processor]:
        prior, background = _example_prior(width), _example_prior(width, seed=1)
        return {
            "paper": cls(prior, rule="paper", strength=1.0),
            "lift": cls(prior, rule="lift", confidence="wb"),
            "backoff": cls(prior, confidence="count(5)", bos=True, eos="prior"),
            "ratio": cls(prior, rule="ratio", background=background),
            "keep": cls(prior, plausibility=0.1, clip=2.0, schedule="entropy"),
            "drop": cls(prior, rule="lift", plausibility=0.05, plausibility_mode="drop"),
            "budget": cls(prior, schedule="budget(0.05)"),
            "guard": cls(prior, rule="paper", schedule="ramp(4)", guard=0.8),
        }

    def step(self, tokens: Tensor, scores: Tensor, *, generated: Tensor) -> Tensor:
        out = scores
        if self.strength:
            out = self._steered(tokens, scores, generated)
        if self.guard:
            age = torch.arange(tokens.shape[1], 0, -1, device=tokens.device)
            tokens = torch.where(age <= generated[:, None], tokens, -1)
            out = loop_guard(out, tokens, self.guard, self.guard_base, self.guard_length, self.guard_cap)
        return out

    def _steered(self, tokens: Tensor, scores: Tensor, generated: Tensor) -> Tensor:
        bias, barred = self._bias(tokens, scores)
        if self._schedule == "ramp":
            bias = bias.times((generated / self._amount).clamp(max=1.0)[:, None])
        elif self._schedule == "entropy":
            entropy = torch.special.entr(scores.softmax(-1)).sum(-1, keepdim=True)
            bias = bias.times((entropy / math.log(scores.shape[1])).nan_to_num_())
        plain = not self.plausibility and not self._bounded
        if plain and self.rule in SPARSE:
            return bias.added_to(scores)
        p = plausible_part(scores, self.plausibility, barred) if self.plausibility else scores.softmax(-1)
        if self.rule not in SPARSE and (plain or self._bounded):  # `keep_mass` alone sees no constant
            bias = bias.centred(p)
        if plain:
            return bias.added_to(scores, out=p)
        change = bias.dense()
        if self.clip is not None:
            change.clamp_(-self.clip, self.clip)
        if self._schedule == "budget":
            change *= within_budget(p.log(), change, self._amount).nan_to_num_()
        if not self.plausibility:
            return scores + change
        out = keep_mass(scores, change, p)
        if self.plausibility_mode == "drop":
            out.masked_fill_((p == 0).index_fill_(1, barred, False), -torch.inf)
        return out

    def _bias(self, tokens: Tensor, scores: Tensor) -> tuple[Bias, Tensor]:
        """The bias, and the ids that get none: exempt ones, and those beyond the vocabulary."""
        key = (scores.device, scores.shape[1])
        if key not in self._placed:
            self._placed = {key: self._place(*key)}
        tables, basis, barred = self._placed[key]
        recent = trailing(tokens, self._reach)
        weights, *entries = zip(*(table.look_up(recent) for table in tables), strict=True)
        row, id, value = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in entries)
        return Bias(basis, list(weights), row, id, value), barred

    def _place(self, device: torch.device, width: int) -> tuple[list[BiasTable], Tensor, Tensor]:
        """Tables, basis [priors + 1, width] and barred ids on a device."""
        self.check_width(width)
        barred = torch.tensor([*self._exempt(), *range(self.prior.vocab_size, width)], dtype=torch.int64)
        allowed = torch.ones(width).index_fill(0, barred, 0.0)
        beyond = (0, width - self.prior.vocab_size)
        basis = torch.stack([*(torch.nn.functional.pad(t.base.cpu(), beyond) for t in self._tables), allowed])
        return [table.to(device) for table in self._tables], basis.to(device), barred.to(device)

    @functools.cached_property
    def _tables(self) -> list[BiasTable]:
        """One for the prior, one that subtracts the background."""
        signed = [(self.prior, self.strength), (self.background, -self.strength)]
        return [
            BiasTable(p, self.rule, self.k, self.weights, self.confidence, self._exempt(), self.bos, strength)
            for p, strength in signed
            if p is not None
        ]

    def _exempt(self) -> list[int]:
        about = self.prior.tokenizer
        ids = {*about["special"], *self.exempt}
        return sorted(ids - {about["eos"]} if self.eos == "prior" else ids)


@functools.cache
def _example_prior(width: int, seed: int = 0) -> NGramPrior:
    rng = np.random.default_rng(seed)
    words = np.minimum(rng.zipf(1.5, size=(40, 30)), width - 1)
    return NGramPrior.from_ids(words.tolist(), order=3, vocab_size=width, eos=0)
