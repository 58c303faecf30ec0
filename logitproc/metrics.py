"""Figures of generated texts that need no model: repetition, diversity, likeness to a corpus, intervals.

A text is a sequence of token ids, a corpus is an `NGramPrior`. Shares lie in [0, 1]; a share of nothing (a
text without an n-gram) is NaN, except that nothing repeats in it. Everything is numpy and float64.
"""

import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .prior import NGramPrior

Values = Sequence[float] | np.ndarray

# --- one text ---


def rep_n(ids: Sequence[int], n: int = 4) -> float:
    """1 - distinct n-grams / all n-grams, 0 for a text of fewer than n tokens.

    `a b c d a b c d` has five 4-grams, four of them distinct: 0.2. Source: Welleck et al., "Neural Text
    Generation with Unlikelihood Training", arXiv:1908.04319. Raises ValueError for n below 1.
    """
    return 1 - distinct_n([ids], n) if len(ids) >= n else 0.0


def distinct_n(texts: Iterable[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams / all n-grams of some texts together; no n-gram spans two of them.

    It falls with the number of tokens, so compare texts of one length. Source: Li et al., "A
    Diversity-Promoting Objective Function for Neural Conversation Models", arXiv:1510.03055. Raises
    ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    ngrams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else np.nan


def unigram_overlap(ids: Sequence[int], prior: NGramPrior, top: int = 5000) -> float:
    """Share of the tokens that are among the `top` commonest of the corpus, lower ids first where equal.

    Special tokens are not among them. Source: arXiv:2601.16224, section 3. Raises ValueError for a prior
    that was imported from ARPA, which holds no counts.
    """
    if prior.counts is None:
        raise ValueError(
            "This prior was imported from ARPA and holds no counts, which unigram_overlap needs; "
            "fit the corpus."
        )
    plain = ~np.isin(prior.orders[0].ids, prior.tokenizer["special"])
    commonest = np.argsort(-prior.counts[0][plain], kind="stable")[:top]
    return _share(np.isin(np.asarray(ids, np.int64), prior.orders[0].ids[plain][commonest]))


def bigram_seen(ids: Sequence[int], prior: NGramPrior) -> float:
    """Share of the text's bigrams that occur in the corpus. Source: arXiv:2601.16224, section 3.

    Raises ValueError for a prior of order 1.
    """
    return _share(prior.contains(ids, 2))


def longest_copied_span_bound(ids: Sequence[int], prior: NGramPrior) -> int:
    """An upper bound, in tokens, of the longest span that the text copies from the corpus.

    With N = `prior.order`: the longest run of tokens all of whose N-grams occur in the corpus. N-gram counts
    cannot tell whether these N-grams stand behind one another there, so the span may be shorter than the
    run, never longer. The result is exact below N.
    """
    seen = prior.contains(ids, prior.order)
    if seen.any():
        edges = np.flatnonzero(np.diff(seen, prepend=False, append=False))  # first, end, first, end, ...
        return int((edges[1::2] - edges[::2]).max()) + prior.order - 1
    shorter = range(prior.order - 1, 0, -1)
    return next((n for n in shorter if prior.contains(ids, n).any()), 0)


def _share(found: np.ndarray) -> float:
    return float(found.mean()) if found.size else np.nan


# --- many texts ---


def aggregate(nll_means: Values, tokens: Sequence[int]) -> dict[str, float]:
    """Perplexities of texts, put together in five ways: [texts] nats per token and [texts] tokens.

        arithmetic      mean of the texts' perplexities, which one bad text decides
        geometric       exp(mean of nll_means): every text counts alike
        token_weighted  exp(sum of nats / sum of tokens): every token counts alike
        median, maximum of the texts' perplexities

    Nineteen texts of perplexity 2 and one of 830 give 43.4 arithmetic and 2.7035 geometric. Raises
    ValueError without texts, or unless both have one number a text.
    """
    nll, weights = np.asarray(nll_means, np.float64), np.asarray(tokens, np.float64)
    if nll.shape != weights.shape or nll.size == 0:
        raise ValueError(f"Need a loss and a length for each text, got {nll.size} and {weights.size}.")
    with np.errstate(over="ignore"):  # beyond exp(709) a perplexity is infinite
        perplexities = np.exp(nll)
        return {
            "arithmetic": float(perplexities.mean()),
            "geometric": float(np.exp(nll.mean())),
            "token_weighted": float(np.exp((nll * weights).sum() / weights.sum())),
            "median": float(np.median(perplexities)),
            "maximum": float(perplexities.max()),
        }


def gap_closure(value: Any, base: Any, ceiling: Any) -> tuple[Any, Any]:
    """(value / ceiling, (value - base) / (ceiling - base)), numbers or arrays, of a score where more is better.

    Papers print the first as "the gap closed"; the second is 0 for the untuned model and 1 for the tuned one.
    """
    return value / ceiling, (value - base) / (ceiling - base)


class Interval(NamedTuple):
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(values_by_prompt: Values, draws: int = 10_000, seed: int = 0) -> Interval:
    """Mean over prompts, and the 2.5 and 97.5 percentiles of the means of resampled prompts.

    One number a prompt: average seeds inside a prompt first, as prompts are what a result should carry over
    to. The same draws serve all figures of as many prompts. The ends are NaN for a single prompt, which says
    nothing about others. Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter
    13. Raises ValueError without values.
    """
    values = np.asarray(values_by_prompt, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"Need one number a prompt, got an array of shape {values.shape}.")
    mean = float(values.mean())
    if values.size == 1 or not np.isfinite(values).all():
        return Interval(mean, np.nan, np.nan)
    low, high = np.percentile(values[_resamples(len(values), draws, seed)].mean(1), [2.5, 97.5])
    return Interval(mean, float(low), float(high))


def paired_bootstrap(a: Values, b: Values, draws: int = 10_000, seed: int = 0) -> Interval:
    """`bootstrap` of a - b, where a[i] and b[i] belong to the same prompt.

    What the prompts have in common cancels, so the interval is narrower than those of a and b suggest.
    Raises ValueError for unequal lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"Pairs need as many values on both sides, got {len(a)} and {len(b)}.")
    with np.errstate(invalid="ignore"):  # inf - inf
        return bootstrap(np.subtract(a, b), draws, seed)


@functools.lru_cache(maxsize=1)
def _resamples(size: int, draws: int, seed: int) -> np.ndarray:
    """Indices [draws, size], each row `size` of them drawn with replacement."""
    return np.random.default_rng(seed).integers(size, size=(draws, size))
