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
from ..ops import plausible, within_budget
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
LOWEST = -50.0  # ln of a probability that rounds to 0: a bias steers, it does not forbid
FOLLOWERS = 512  # the paper keeps so many next tokens of each context


# --- math ---


class Level(NamedTuple):
    """One order of a `BiasTable`: C contexts, then one empty context that stands for "not found"."""

    keys: Tensor  # int64 [C + 1], ascending; the last one is no key
    span: Tensor  # int64 [C + 1, 2]: first entry of the context, and how many it has
    reach: Tensor  # int64 [longest row]: 0, 1, 2, ...
    ids: Tensor  # int64 [E + 1]; the last one is V, a column that is thrown away (V - 1 where 0 is added)
    values: Tensor  # float32 [E + 1], the last one is 0
    backoff: Tensor  # float32 [C + 1], added to the tokens that the context does not hold
    confidence: Tensor  # float32 [C + 1]


class BiasTable:
    """strength * g of one rule for one prior, on one device.

    Sparse rules (`paper`, `lift`) store in `values` the *term* of each order, to be summed; dense rules
    store the full value, which replaces that of the shorter context.
    """

    def __init__(self, prior: NGramPrior, rule: Rule, k: float, weights: Sequence[float] | None,
                 confidence: str, exempt: list[int], bos: bool, strength: float):  # fmt: skip
        self.width, self.sparse, self.bos = prior.vocab_size, rule in ("paper", "lift"), bos
        conf = _confidence(prior, confidence)
        values, backoff, base = _terms(prior, rule, k, weights, conf)
        self.trusting = self.sparse or confidence == "none"  # the sparse terms hold their confidence
        if self.sparse:
            base[exempt] = 0.0
        self.common = torch.from_numpy(np.flatnonzero(base))[None]  # tokens of order 1, at most FOLLOWERS
        self.exempt = torch.tensor(exempt, dtype=torch.int64)
        self.base = torch.from_numpy(np.append(base, 0.0) * strength).float()  # [V + 1]
        self.base_confidence = float(conf[0][0])
        self.symbols = torch.from_numpy(symbol_table(prior, bos))
        self.levels = []
        for o, value, back, c in zip(prior.orders[1:], values[1:], backoff[1:], conf[1:], strict=True):
            keep = (value != 0) & ~np.isin(o.ids, exempt) if self.sparse else np.ones(len(value), bool)
            length = np.bincount(o.context[keep], minlength=len(o.keys))
            self.levels.append(
                Level(
                    keys=_tensor(o.keys, np.iinfo(np.int64).max),
                    span=_tensor(np.stack([np.cumsum(length) - length, length], 1), 0),
                    reach=torch.arange(int(length.max(initial=0))),
                    ids=_tensor(o.ids[keep], self.width - self.sparse),
                    values=_tensor(value[keep] * strength, 0.0).float(),
                    backoff=_tensor(back * strength, 0.0).float(),
                    confidence=_tensor(c, 1.0).float(),
                )
            )
        # The first level is found without a search: symbol -> context, int64 [V + 2].
        self.first = torch.full((self.width + 2,), 0)
        if self.levels:
            keys = self.levels[0].keys[:-1]
            self.first = torch.full((self.width + 2,), len(keys)).index_put((keys,), torch.arange(len(keys)))

    def to(self, device: torch.device) -> Self:
        """Move once; later calls with the same device cost nothing."""
        if self.base.device != device:
            for name in ("base", "common", "symbols", "exempt", "first"):
                setattr(self, name, getattr(self, name).to(device))
            self.levels = [Level(*(t.to(device) for t in level)) for level in self.levels]
        return self

    def contexts(self, tokens: Tensor) -> list[Tensor]:
        """Index of each row's context in each level, C where there is none. tokens [rows, order - 1]."""
        if not self.levels:
            return []
        symbols = self.symbols[tokens.clamp(-1, self.width)]
        if self.bos:
            symbols = _start_of_text(symbols, tokens, self.width)
        found = [self.first[symbols[:, -1]]]
        for n, level in enumerate(self.levels[1:], 2):
            key = found[-1] * (self.width + 2) + symbols[:, -n]
            at = torch.searchsorted(level.keys, key)
            found.append(torch.where(level.keys[at] == key, at, len(level.keys) - 1))
        return found

    def entries(self, level: Level, index: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, values), each [rows, longest row]; ids are V where a row has no further entry."""
        start, length = level.span[index].split(1, dim=1)
        reach = level.reach
        if length.device.type == "cpu" and len(
            reach
        ):  # on a GPU, asking for the longest row would wait for it
            reach = reach[: max(1, int(length.max()))]
        block = torch.where(reach < length, start + reach, len(level.ids) - 1)
        return level.ids[block], level.values[block]

    def dense(self, tokens: Tensor, width: int) -> Tensor:
        """strength * g, a new float32 [rows, width] tensor for tokens [rows, order - 1]; 0 beyond V."""
        found = self.contexts(tokens)
        # One column more than V catches the filling of short rows.
        base = torch.nn.functional.pad(self.base, (0, max(0, width - self.width - 1)))
        if self.sparse:
            g = base.repeat(tokens.shape[0], 1)
            for level, index in zip(self.levels, found, strict=True):
                g.scatter_add_(1, *self.entries(level, index))
            return g[:, :width]
        backoffs = [level.backoff[index] for level, index in zip(self.levels, found, strict=True)]
        above = torch.stack(backoffs).sum(0) if backoffs else base.new_zeros(tokens.shape[0])
        g = base + above[:, None]
        for level, index, backoff in zip(self.levels, found, backoffs, strict=True):
            above = above - backoff
            ids, values = self.entries(level, index)
            g.scatter_(1, ids, values + above[:, None])
        if not self.trusting:
            confidence = torch.full_like(above, self.base_confidence)
            for level, index in zip(self.levels, found, strict=True):
                known = index < len(level.keys) - 1
                confidence = torch.where(known, level.confidence[index], confidence)
            g *= confidence[:, None]
        g[:, self.width :] = 0.0
        return g[:, :width]

    def add_to(self, scores: Tensor, tokens: Tensor) -> Tensor:
        """scores + strength * g for a sparse rule, without building g: one copy and a few entries."""
        out = scores.clone()
        rows = scores.shape[0]
        out.scatter_add_(1, self.common.expand(rows, -1), self.base[self.common].expand(rows, -1))
        for level, index in zip(self.levels, self.contexts(tokens), strict=True):
            out.scatter_add_(1, *self.entries(level, index))
        return out


def centred(g: Tensor, weight: Tensor, exempt: Tensor, width: int) -> Tensor:
    """g - E[g] over the first `width` tokens that are not exempt, 0 elsewhere; changes g in place.

    weight [rows, >= width] is proportional to the probabilities of the expectation. A constant in g is
    invisible to a softmax over all tokens, but not beside tokens that get no bias, nor to a clip.
    """
    g.index_fill_(1, exempt, 0.0)
    mass = weight[:, :width].sum(-1) - weight[:, exempt].sum(-1)
    # No mass to speak of, or a row without a finite score: nothing is biased, so any finite mean does.
    mean = torch.where(mass > 1e-6, (weight * g).sum(-1) / mass, 0.0)
    g[:, :width] -= mean[:, None]
    return g.index_fill_(1, exempt, 0.0)


def _terms(
    prior: NGramPrior, rule: Rule, k: float, weights: Sequence[float] | None, confidence: list[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Per order: value of each n-gram [E], back-off of each context [C]; and g of order 1 [V]."""
    none = [np.zeros(len(o.keys)) for o in prior.orders]
    if rule in ("backoff", "ratio"):
        kn = prior.kneser_ney
        base = np.full(prior.vocab_size, max(kn.log_unseen, LOWEST))
        base[prior.orders[0].ids] = np.maximum(kn.log_prob[0], LOWEST)
        bounded = [[np.maximum(x, LOWEST) for x in logs] for logs in (kn.log_prob, kn.log_backoff)]
        return bounded[0], bounded[1], base
    weights = default_weights(prior.order) if weights is None else weights
    totals, kept = prior.totals(), prior.kept(FOLLOWERS)
    values = []
    for n, o in enumerate(prior.orders):
        count, context = prior.counts[n] + k, o.context  # type: ignore[index]
        if rule == "paper":
            term = np.log(count / (totals[n] + k * prior.vocab_size)[context])
        else:
            term = np.log(count / k)
        values.append(np.where(kept[n], weights[n] * confidence[n][context] * term, 0.0))
    base = np.zeros(prior.vocab_size)
    base[prior.orders[0].ids] = values[0]
    return values, none, base


def _confidence(prior: NGramPrior, rule: str) -> list[np.ndarray]:
    """Trust in each context, [C] per order, in [0, 1]: N/(N + d) or Witten-Bell's N/(N + followers)."""
    if rule == "none":
        return [np.ones(len(o.keys)) for o in prior.orders]
    totals = prior.totals()
    name, d = name_and_number(rule)
    if name == "wb":
        return [t / (t + np.diff(o.indptr)) for t, o in zip(totals, prior.orders, strict=True)]
    return [t / (t + d) for t in totals]


def _tensor(array: np.ndarray, last: float) -> Tensor:
    """The array with one more row, filled with `last`."""
    return torch.from_numpy(np.concatenate([array, np.full((1, *array.shape[1:]), last, array.dtype)]))


def _start_of_text(symbols: Tensor, tokens: Tensor, bos: int) -> Tensor:
    """Put `<s>` before the first token of a text that does not begin with it."""
    absent = tokens < 0
    present_next = torch.nn.functional.pad(~absent[:, 1:], (0, 1), value=True)
    next_symbol = torch.nn.functional.pad(symbols[:, 1:], (0, 1), value=0)
    return torch.where(absent & present_next & (next_symbol != bos), bos, symbols)


def keep_mass(p: Tensor, bias: Tensor, inside: Tensor) -> Tensor:
    """bias - ln E_p[exp(bias) | inside] inside, 0 outside: the mass of `inside` stays what it was."""
    weight = torch.where(inside, p, 0.0)
    mass = weight.sum(-1, keepdim=True)
    shift = ((weight * bias.exp()).sum(-1, keepdim=True) / mass).log()
    return torch.where(inside, bias - torch.where(mass > 0, shift, 0.0), 0.0)


def repetition_penalty(tokens: Tensor, width: int, factor: float, base: float, allowed: int,
                       cap: float) -> Tensor:  # fmt: skip
    """What DRY subtracts, [rows, width] nats: min(cap, factor base^(L - allowed)) where L >= allowed.

    L(i) is the length of the longest suffix of the tokens that occurred earlier followed by i. tokens
    [rows, length], -1 where there is none. Source: "DRY: a modern repetition penalty", text-generation-webui
    pull request 5677.
    """
    rows, length = tokens.shape
    penalty = torch.zeros(rows, width + 1, device=tokens.device)
    if length < 2:
        return penalty[:, :width]
    # Longer matches than `longest` are capped anyway.
    longest = min(length, allowed + max(0, math.ceil(math.log(cap / factor) / math.log(base))))
    padded = torch.nn.functional.pad(tokens, (longest - 1, 0), value=-1)
    windows = padded.unfold(1, longest, 1).flip(-1)  # [rows, length, longest], newest first
    equal = (windows == windows[:, -1:]) & (windows >= 0)
    match = equal[:, :-1].long().cumprod(-1).sum(-1)  # what ends before the last token
    nats = (factor * base ** (match - allowed).float()).clamp(max=cap)
    nats = torch.where(match >= allowed, nats, 0.0)
    following = tokens[:, 1:]
    following = torch.where((following >= 0) & (following < width), following, width)
    return penalty.scatter_reduce_(1, following, nats, "amax")[:, :width]


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
        self.context = None if self.guard else self.prior.order - 1
        # No option that reads the distribution: the bias of a step is strength * g.
        self._plain = not self.plausibility and self.clip is None and self._schedule == "constant"

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
            recent = trailing(tokens, self.prior.order - 1)
            table = self._tables[0].to(scores.device)
            if scores.shape[1] < table.width:
                self.check_width(scores.shape[1])
            if not self._plain:
                out = self._biased(recent, scores, generated)
            elif table.sparse:
                out = table.add_to(scores, recent)
            else:
                out = self._g(recent, scores.softmax(-1)).add_(scores)
        if self.guard:
            age = torch.arange(tokens.shape[1], 0, -1, device=tokens.device)
            tokens = torch.where(age <= generated[:, None], tokens, -1)
            out = out - repetition_penalty(tokens, scores.shape[1], self.guard, self.guard_base,
                                           self.guard_length, self.guard_cap)  # fmt: skip
        return out

    def _g(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """strength * g, as wide as `weight`; for the dense rules centred by it (see `centred`)."""
        table, width = self._tables[0], weight.shape[1]
        g = table.dense(tokens, width)
        if table.sparse:
            return g
        if self.background is not None:
            g -= self._tables[1].to(weight.device).dense(tokens, width)
        return centred(g, weight, table.exempt, table.width)

    def _biased(self, tokens: Tensor, scores: Tensor, generated: Tensor) -> Tensor:
        table, inside, p = self._tables[0], None, scores.softmax(-1)
        if self.plausibility:  # the tokens that get a bias
            inside = plausible(p, self.plausibility).index_fill_(1, table.exempt, False)
            inside[:, table.width :] = False
        bias = self._g(tokens, p if inside is None else torch.where(inside, p, 0.0))
        if self._schedule != "constant":
            bias = bias * self._schedule_factor(p, generated)
        if self.clip is not None:
            bias = bias.clamp(-self.clip, self.clip)
        if inside is not None and self.plausibility_mode == "keep":
            bias = keep_mass(p, bias, inside)
        elif inside is not None:
            forbidden = (~inside).index_fill_(1, table.exempt, False)
            forbidden[:, table.width :] = False
            scores = scores.masked_fill(forbidden, -torch.inf)
        if self._schedule == "budget":
            bias = bias * within_budget(scores, bias, self._amount)
        # A row without a finite score has no softmax: whatever its bias, nothing becomes of it.
        return scores + bias.nan_to_num_()

    def _schedule_factor(self, p: Tensor, generated: Tensor) -> float | Tensor:
        if self._schedule == "ramp":
            return (generated / self._amount).clamp(max=1.0)[:, None]
        if self._schedule == "entropy":
            return torch.special.entr(p).sum(-1, keepdim=True) / math.log(p.shape[1])
        return 1.0

    @functools.cached_property
    def _tables(self) -> list[BiasTable]:
        priors = [self.prior] if self.background is None else [self.prior, self.background]
        return [
            BiasTable(
                p, self.rule, self.k, self.weights, self.confidence, self._exempt(), self.bos, self.strength
            )
            for p in priors
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
