"""How diverse a set of texts is, in meaning and in wording.

Meaning is measured on sentence features [texts, d], dense or sparse rows of length 1 (`features`), wording on
words. No figure is enough alone: remote-clique is blind to duplicates (two texts, 50 copies each, beat 100
different ones), and distinct-n rewards nonsense. Everything is numpy and float64.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

Distance = Literal["cosine", "euclidean"]
NEAR = 0.1  # a cosine distance below which two texts are near-duplicates
_BLOCK = 512  # rows of a distance matrix held at once


def words(text: str) -> list[str]:
    """Lower-cased words and punctuation marks: the unit of all lexical figures, whatever the tokenizer."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


# --- meaning ---


def remote_clique(features: Any, distance: Distance = "cosine") -> float:
    """Mean distance of all pairs of different texts; NaN for fewer than two texts.

        1/M sum_i 1/(M-1) sum_{j != i} d(x_i, x_j)        cosine: d = 1 - x_i x_j; euclidean: |x_i - x_j|

    Cosine has a closed form, 1 - (|sum_i x_i|^2 - M) / (M (M-1)), so it costs O(M d) and depends on the mean
    row only. Divided by M instead of M-1 the figure is (M-1)/M of this one. Source: Cox et al., "Directed
    Diversity", arXiv:2101.06030; as used in arXiv:2306.04140, which does not name the distance.
    """
    m = features.shape[0]
    if m < 2:
        return math.nan
    if distance == "cosine":
        return float(1 - (np.square(_mean(features) * m).sum() - _squares(features).sum()) / (m * (m - 1)))
    squares, total = _squares(features), 0.0
    for rows in _blocks(m):
        between = squares[rows, None] + squares - 2 * _products(features[rows], features)
        total += np.sqrt(np.maximum(between, 0.0)).sum()
    return float(total / (m * (m - 1)))


def distance_to(features: Any, real: Any) -> float:
    """Mean cosine distance of generated to real texts, 1 - mean(x) mean(y): lower is more similar."""
    return float(1 - _mean(features) @ _mean(real))


def nearest_neighbour(features: Any, threshold: float = NEAR) -> tuple[float, float]:
    """(mean cosine distance to the closest other text, share of texts closer than `threshold` to another).

    NaN for fewer than two texts. Sees the duplicates that remote-clique does not.
    """
    m = features.shape[0]
    if m < 2:
        return math.nan, math.nan
    closest = np.empty(m)
    for rows in _blocks(m):
        distances = 1 - _products(features[rows], features)
        distances[np.arange(len(distances)), np.arange(m)[rows]] = np.inf
        closest[rows] = distances.min(1).clip(min=0)
    return float(closest.mean()), float((closest < threshold).mean())


def vendi(features: Any) -> float:
    """exp of the entropy of the eigenvalues of K/M, K = cosine similarities: the effective number of texts.

    1 for copies of one text, M for orthogonal ones. Source: Friedman and Dieng, "The Vendi Score",
    arXiv:2210.02410. X'X has the eigenvalues of K = XX' other than 0, so the smaller one is decomposed.
    """
    m, d = features.shape
    values = np.linalg.eigvalsh(_products(features.T, features.T) if d < m else _products(features, features))
    shares = values[values > 1e-10] / m
    return float(np.exp(-(shares * np.log(shares)).sum()))


# Features are dense or sparse; what is computed from them is dense.


def _products(a: Any, b: Any) -> np.ndarray:
    product = a @ b.T
    return product.toarray() if hasattr(product, "toarray") else product


def _mean(features: Any) -> np.ndarray:
    return np.asarray(features.mean(0)).reshape(-1)


def _squares(features: Any) -> np.ndarray:
    """Squared length of each row: 1, but for texts without a known word."""
    squares = features.power(2) if hasattr(features, "power") else np.square(features)
    return np.asarray(squares.sum(1)).reshape(-1)


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, rows)) for start in range(0, rows, _BLOCK))


# --- wording ---


def same_length(texts: Sequence[Sequence[Hashable]], tokens: int) -> list[Sequence[Hashable]]:
    """The first texts that hold `tokens` tokens together, the last one cut: distinct-n and the vocabulary
    grow or fall with the number of tokens, so arms are compared at the same one."""
    kept: list[Sequence[Hashable]] = []
    for text in texts:
        if tokens <= 0:
            break
        kept.append(text[:tokens])
        tokens -= len(text)
    return kept


def self_bleu(texts: Sequence[Sequence[Hashable]], n: int = 4) -> float:
    """Mean BLEU-n of each text against all others, in [0, 1]; lower is more diverse.

    BLEU is the brevity penalty times the geometric mean of the clipped precisions of orders 1 to n; an order
    without a match counts 0.1 matches (Chen and Cherry 2014, method 1), and orders longer than the text are
    left out. NaN for fewer than two texts. It depends on how many texts there are: compare samples of one
    size. Source: Zhu et al., "Texygen", arXiv:1802.01886.
    """
    texts = [text for text in texts if text]
    if len(texts) < 2:
        return math.nan
    counts = [[_ngrams(text, k) for k in range(1, n + 1)] for text in texts]
    best = [_highest_two([of_text[k] for of_text in counts]) for k in range(n)]
    lengths = Counter(map(len, texts))
    return float(np.mean([_bleu(i, len(texts[i]), counts[i], best, lengths) for i in range(len(texts))]))


def _ngrams(text: Sequence[Hashable], n: int) -> Counter:
    return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def _highest_two(counts: list[Counter]) -> dict[tuple, tuple[int, int, int]]:
    """n-gram -> (most occurrences in one text, that text, most occurrences in any other text)."""
    best: dict[tuple, tuple[int, int, int]] = {}
    for owner, of_text in enumerate(counts):
        for ngram, count in of_text.items():
            first, who, second = best.get(ngram, (0, -1, 0))
            best[ngram] = (count, owner, first) if count > first else (first, who, max(second, count))
    return best


def _bleu(
    i: int, length: int, counts: list[Counter], best: list[dict[tuple, tuple[int, int, int]]], lengths: Counter
) -> float:  # fmt: skip
    logs = []
    for of_order, highest in zip(counts, best, strict=True):
        if not of_order:
            continue
        matches = 0
        for ngram, count in of_order.items():
            first, owner, second = highest[ngram]
            matches += min(count, second if owner == i else first)
        logs.append(math.log(max(matches, 0.1) / sum(of_order.values())))
    others = (other for other, number in lengths.items() if number > (other == length))
    closest = min(others, key=lambda other: (abs(other - length), other))
    brevity = min(0.0, 1 - closest / length)
    return math.exp(brevity + sum(logs) / len(logs))
