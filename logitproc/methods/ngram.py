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
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from ..checks import in_range, listed, name_and_number, one_of, true_or_false, whole
from ..ops import NGramBias, NGramTable, add_ngrams, loop_guard
from ..prior import NGramPrior, default_weights, symbol_table
from ..processor import Processor, trailing
from ..registry import register

Rule = Literal["paper", "lift", "backoff", "ratio"]
# What a parameter left out (None) becomes. `backoff`: chosen by `eval/study.py`, see eval/RESULTS.md. The others are
# the bare formulas; `paper` at the strength that the paper found best.
OFF: dict[str, Any] = {"confidence": "none", "plausibility": 0.0, "guard": 0.0, "schedule": "constant"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "paper": {"strength": 0.1, **OFF},
    "lift": {"strength": 0.2, **OFF},
    "backoff": {
        "strength": 1.0, "confidence": "wb", "plausibility": 0.003, "guard": 1.2, "schedule": "surprisal",
    },
    "ratio": {"strength": 0.2, **OFF},
}
BY_RULE: Any = None
SCHEDULES = ("constant", "ramp(n)", "entropy", "budget(eps)", "surprisal", "surprisal(m)")
SPARSE = ("paper", "lift")  # the rules that leave most tokens alone
LOWEST = -22.0  # ln of a probability that rounds to 0: a bias steers, it forbids nothing, and exp(4 * 22) is finite
FOLLOWERS = 512  # the paper keeps so many next tokens of each context


# --- math ---


def ngram_table(
    prior: NGramPrior, rule: Rule, k: float, weights: Sequence[float] | None, confidence: str, exempt: list[int],
    bos: bool, strength: float,
) -> NGramTable:  # fmt: skip
    """strength * g of one rule for one prior.

    The value of an n-gram is what its context h adds to its token: for the sparse rules the term of that order,
    for the dense ones ln p(i given h) - ln b(h) - ln p(i given h without its oldest token). Kneser-Ney backs off
    by p(i given h) = b(h) p(i given the shorter h) where h does not hold i, so all contexts together give ln p
    but for the sum of their ln b, which is the same for every token.
    """
    trusts = _confidence(prior, confidence)
    base, values = _sparse(prior, rule, k, weights, trusts) if rule in SPARSE else _dense(prior)
    base[exempt] = 0.0
    keys, lengths, ids, kept = [], [], [], []
    first, parents = -1, 0  # the number of the first parent; in keys the empty context is -1
    for o, value in zip(prior.orders[1:], values, strict=True):
        keys.append((first + o.parent) * (prior.vocab_size + 2) + o.oldest)
        keep = (value != 0) & ~np.isin(o.ids, exempt)
        lengths.append(np.bincount(o.context[keep], minlength=len(o.keys)))
        ids.append(o.ids[keep])
        kept.append(value[keep] * strength)
        first, parents = parents, parents + len(o.keys)
    length = np.concatenate([*lengths, [0]]).astype(np.int64)
    trust = None  # the terms of the sparse rules hold theirs
    if rule not in SPARSE and confidence != "none":
        trust = torch.from_numpy(np.concatenate([*trusts[1:], [1.0], trusts[0]])).float()
    return NGramTable(
        order=prior.order,
        base=torch.from_numpy(base * strength).float(),
        symbols=torch.from_numpy(symbol_table(prior, bos)),
        bos=bos,
        keys=torch.from_numpy(np.concatenate([*keys, [np.iinfo(np.int64).max]])),
        start=torch.from_numpy(np.append(0, np.cumsum(length))),
        ids=torch.from_numpy(np.concatenate([*ids, [0]]).astype(np.int64)),
        values=torch.from_numpy(np.concatenate([*kept, [0.0]])).float(),
        longest=int(length.max()),
        trust=trust,
    )


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


# --- processor ---


@register("ngram", paper="arXiv:2601.16224")
@dataclass(eq=False)  # generate() drops a processor that equals an earlier one
class NGramStyleLogitsProcessor(Processor):
    """Steer a model towards the style of a corpus with n-gram counts of its tokens.

    scores [rows, width] -> scores + strength * g [rows, width], nats, but for what plausibility, clip, schedule and
    guard make of it; g as in the module's docstring, from the last `prior.order - 1` tokens, prompt included.
    strength 0 without a guard returns the scores bit for bit. Columns beyond the prior's vocabulary, and special
    tokens, get no bias (`exempt`, `eos`); the dense rules centre g to E_p[g] = 0 for that, which no softmax over the
    other tokens can tell.

    strength, confidence, plausibility, schedule and guard that are left out are the rule's own: for "backoff" what
    the study chose, strength 1 with "wb", 0.003, "surprisal" and 1.2; for the others the bare formula ("none", 0,
    "constant", 0) at strength 0.1 ("paper") or 0.2.

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
            "budget(eps)" to scale the bias of a step down to KL(processed, base) <= eps nats, "surprisal(m)" to
            bound the price in fluency: E[-ln p] among the biased tokens rises by at most m nats ("surprisal": 0).
            Where it would rise more, their scores are divided by the largest temperature that keeps the bound;
            the sum of their probabilities stays.
        guard: strength of the loop guard (DRY) in nats, 0 for off; its growth, the match length that is
            still free, and its bound are guard_base, guard_length and guard_cap.
        exempt: further ids without a bias; the guard spares none. Pad, BOS, unknown and EOS always are; with
            eos="prior" EOS takes the prior's end of document.
        bos: the beginning of a text is the start of a document for the prior.

    Raises ValueError for a parameter outside its range. Source: arXiv:2601.16224, section 2.2 (rule
    "paper"); Messner and Lippincott, arXiv:2503.08550 (relative of "lift"); Li et al., arXiv:2210.14431
    (relative of "backoff"); Kneser, Peters and Klakow, Eurospeech 1997, and Liu et al., arXiv:2105.03023
    (relatives of "ratio").

    Cost per token: O(rows (log contexts + longest row)) for the sparse rules without options, else a few
    passes over the scores; with "surprisal" some 20 more over the tokens that may be biased, which are few under
    a mask and all without one. Beams, assisted decoding and batches of any kind are safe: nothing is remembered.

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
    schedule: str = BY_RULE
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
        in_range("k", self.k, 1e-12, 1e6)
        if self.clip is not None:
            in_range("clip", self.clip, 0, math.inf)
        if self.guard:
            in_range("guard_base", self.guard_base, 1.0001, math.inf)
            whole("guard_length", self.guard_length, 1)
            in_range("guard_cap", self.guard_cap, self.guard, 1e9)
        if not isinstance(self.prior, NGramPrior):
            raise ValueError(f"prior must be an NGramPrior, got {type(self.prior).__name__}.")
        if (self.rule == "ratio") != (self.background is not None):
            raise ValueError("rule='ratio' needs a background prior, and no other rule takes one.")
        if self.background is not None:
            ours, theirs = (p.tokenizer for p in (self.prior, self.background))
            if any(ours[key] != theirs[key] for key in ("fingerprint", "vocab_size")):
                raise ValueError(
                    f"prior and background must share a tokenizer, got {ours['name']} ({ours['vocab_size']} tokens) "
                    f"and {theirs['name']} ({theirs['vocab_size']} tokens)."
                )
        self.weights = None if self.weights is None else listed("weights", self.weights)
        if self.weights is not None and len(self.weights) != self.prior.order:
            raise ValueError(f"weights must hold {self.prior.order} numbers, got {list(self.weights)}.")
        for weight in self.weights or ():
            in_range("weights", weight, 0, 1e6)
        self._schedule, self._amount = name_and_number(one_of("schedule", self.schedule, SCHEDULES))
        one_of("confidence", self.confidence, ("none", "wb", "count(d)"))
        true_or_false("bos", self.bos)
        self.exempt = listed("exempt", self.exempt)
        for token in self.exempt:
            whole("exempt", token, 0)
            in_range("exempt", token, 0, self.prior.vocab_size - 1)
        self._reach = max(p.order for p in (self.prior, self.background) if p is not None) - 1
        self.context = None if self.guard else self._reach
        self.reads_generated = self.guard > 0 or self._schedule == "ramp"

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
            "constant": cls(prior, schedule="constant"),
            "drop": cls(prior, rule="lift", plausibility=0.05, plausibility_mode="drop"),
            "budget": cls(prior, schedule="budget(0.05)"),
            "surprisal without a mask": cls(prior, schedule="surprisal(0.05)", plausibility=0.0),
            "guard": cls(prior, rule="paper", schedule="ramp(4)", guard=0.8),
        }

    def step(self, tokens: Tensor, scores: Tensor, *, generated: Tensor | None = None) -> Tensor:
        if scores.shape[1] < self.prior.vocab_size:
            self.check_width(scores.shape[1])
        out = scores
        if self.strength:
            self._ngrams = self._ngrams.to(scores.device)
            recent = tokens if tokens.shape[1] >= self._reach else trailing(tokens, self._reach)
            out = add_ngrams(scores, recent, self._ngrams, self._factor(scores, generated), **self._options)
        if self.guard:
            assert generated is not None  # `reads_generated`
            out = loop_guard(out, tokens, generated, self.guard, self.guard_base, self.guard_length, self.guard_cap,
                             in_place=out is not scores)  # fmt: skip
        return out

    def _factor(self, scores: Tensor, generated: Tensor | None) -> Tensor | None:
        """What the schedule makes of the strength of each row, [rows, 1]; None for all of it."""
        if self._schedule == "ramp":
            assert generated is not None  # `reads_generated`
            return (generated / self._amount).clamp(max=1.0)[:, None]
        if self._schedule == "entropy":
            entropy = torch.special.entr(scores.softmax(-1)).sum(-1, keepdim=True)
            return (entropy / math.log(scores.shape[1])).nan_to_num_()
        return None

    @functools.cached_property
    def _options(self) -> dict[str, Any]:
        return {
            "centred": self.rule not in SPARSE,
            "plausibility": self.plausibility,
            "drop": self.plausibility > 0 and self.plausibility_mode == "drop",
            "clip": math.inf if self.clip is None else self.clip,
            "budget": self._amount if self._schedule == "budget" else math.inf,
            "surprisal": self._amount if self._schedule == "surprisal" else math.inf,
        }

    @functools.cached_property
    def _ngrams(self) -> NGramBias:
        """A table of the prior, and one that subtracts the background."""
        signed = [(self.prior, self.strength), (self.background, -self.strength)]
        tables = [
            ngram_table(p, self.rule, self.k, self.weights, self.confidence, self._exempt(), self.bos, strength)
            for p, strength in signed
            if p is not None
        ]
        allowed = torch.ones(self.prior.vocab_size, dtype=torch.bool)
        allowed[self._exempt()] = False
        return NGramBias(tuple(tables), allowed)

    def _exempt(self) -> list[int]:
        about = self.prior.tokenizer
        ids = {*about["special"], *self.exempt}
        return sorted(ids - {about["eos"]} if self.eos == "prior" else ids)


@functools.cache
def _example_prior(width: int, seed: int = 0) -> NGramPrior:
    rng = np.random.default_rng(seed)
    words = np.minimum(rng.zipf(1.5, size=(40, 30)), width - 1)
    return NGramPrior.from_ids(words.tolist(), order=3, vocab_size=width, eos=0)
