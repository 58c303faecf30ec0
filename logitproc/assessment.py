"""Sets of labelled texts side by side: how diverse, how accurate, how fluent, what a student learns from them.

An arm is a list of items, dicts with `text` and `label`, and with `base_nll` and `token_ids` as `collect`
writes them. Arms are compared at one number of texts (and one number of words, for lexical figures), because
most figures change with it. Real data, pairs of text and label, train the oracles that judge the labels.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from .diversity import distance_to, nearest_neighbour, remote_clique, same_length, self_bleu, vendi, words
from .features import TOKENS, SentenceFeatures, tf_idf
from .metrics import distinct_n

Item = Mapping[str, Any]
Pair = tuple[str, str]
Family = Callable[[], "Classifier"]
SELF_BLEU_TEXTS = 200


class Real(NamedTuple):
    """Real labelled texts: to train oracles, and to test oracles and students. Without `test`, a fifth of
    `train` is set aside for it."""

    train: Sequence[Pair]
    test: Sequence[Pair] | None = None

    def split(self, seed: int = 0) -> tuple[Sequence[Pair], Sequence[Pair]]:
        """(train, test)."""
        if self.test is not None:
            return self.train, self.test
        shuffled = random.Random(seed).sample(list(self.train), len(self.train))
        held_out = max(1, len(shuffled) // 5)
        return shuffled[held_out:], shuffled[:held_out]


def assess(
    arms: Mapping[str, Sequence[Item]], real: Real | None = None, embeddings: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Figures of each arm, and what they rest on: `{"settings": {...}, "arms": {name: {figure: value}}}`.

    remote_clique (cosine), vendi, nearest_neighbour and near_duplicates on sentence features; distinct_1 to
    distinct_4, vocabulary and self_bleu on words; base_perplexity, of the unsteered model as `collect`
    recorded it. With real data also distance_to_real; label_accuracy, the share of items whose label an
    oracle trained on real data agrees with, over all items of the arm; student_accuracy, on real test data of
    the same classifier trained on as many items of each arm; both with a standard error over items. They come
    twice: by logistic regression on words, and by a second family (`second_...`), logistic regression on the
    embeddings or, without them, naive Bayes. `settings` holds the accuracy of the oracles themselves.

    Without scikit-learn, and without embeddings, what needs sentence features is left out and `settings` says
    so. Raises ValueError for an arm of fewer than two texts, and for a label that the real data does not
    have.
    """
    for name, items in arms.items():
        if len(items) < 2:
            raise ValueError(f"{name} holds {len(items)} texts; diversity needs at least two.")
    size = min(map(len, arms.values()))
    draw = random.Random(seed)
    samples = {name: draw.sample(list(items), size) for name, items in arms.items()}
    tokens = {name: [words(item["text"]) for item in sample] for name, sample in samples.items()}
    length = min(sum(map(len, texts)) for texts in tokens.values())
    settings: dict[str, Any] = {
        "texts": size, "words": length, "distance": "cosine", "self_bleu_texts": min(size, SELF_BLEU_TEXTS),
    }  # fmt: skip
    figures = {name: _wording(tokens[name], length) | _fluency(arms[name]) for name in arms}

    train, test = real.split(seed) if real else ([], [])
    everything = [item["text"] for items in samples.values() for item in items] + [text for text, _ in train]
    try:
        features = SentenceFeatures(embeddings, everything)
    except ImportError as error:
        if embeddings is not None or real is not None:
            raise
        settings["features"] = f"none: {error}"
        return {"settings": settings, "arms": figures}
    settings["features"] = features.name
    vectors = {name: features([item["text"] for item in sample]) for name, sample in samples.items()}
    for name, values in vectors.items():
        figures[name] |= _meaning(values)
    if real is None:
        return {"settings": settings, "arms": figures}

    _check_labels(arms, train, test)
    real_vectors = features([text for text, _ in train])
    for name, values in vectors.items():
        figures[name]["distance_to_real"] = distance_to(values, real_vectors)
    settings |= {"real_train": len(train), "real_test": len(test), "oracles": {}}
    second: Family = (lambda: Bayes()) if embeddings is None else (lambda: Linear(features))
    for prefix, family in {"": Linear, "second_": second}.items():
        oracle = family().fit(train)
        settings["oracles"][oracle.name] = oracle.accuracy(test)
        for name, items in arms.items():
            student = family().fit(_pairs(samples[name]))
            figures[name] |= _with_error(f"{prefix}label_accuracy", oracle.accuracy(_pairs(items)))
            figures[name] |= _with_error(f"{prefix}student_accuracy", student.accuracy(test))
    return {"settings": settings, "arms": figures}


class Classifier:
    """A classifier of texts. One that saw a single label answers that label."""

    name: str

    def fit(self, pairs: Sequence[Pair]) -> Self:
        texts, labels = zip(*pairs, strict=True)
        self._only = labels[0] if len(set(labels)) == 1 else None
        if self._only is None:
            self._model = self._new().fit(texts, labels)
        return self

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        return np.full(len(texts), self._only) if self._only is not None else self._model.predict(texts)

    def accuracy(self, pairs: Sequence[Pair]) -> tuple[float, float]:
        """(share of pairs predicted right, its standard error)."""
        texts, labels = zip(*pairs, strict=True)
        mean = float((self.predict(texts) == np.asarray(labels)).mean())
        return mean, math.sqrt(mean * (1 - mean) / len(pairs))

    def _new(self) -> Any:
        """An unfitted scikit-learn estimator of texts."""
        raise NotImplementedError


class Linear(Classifier):
    """Logistic regression, on TF-IDF of words and word pairs or on sentence features."""

    def __init__(self, features: SentenceFeatures | None = None):
        self.features, self.name = features, "words" if features is None else "embeddings"

    def _new(self) -> Any:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import FunctionTransformer

        represent = tf_idf() if self.features is None else FunctionTransformer(self.features)
        return make_pipeline(represent, LogisticRegression(C=10, max_iter=1000))


class Bayes(Classifier):
    """Multinomial naive Bayes on counts of words and word pairs."""

    name = "naive Bayes"

    def _new(self) -> Any:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.naive_bayes import MultinomialNB
        from sklearn.pipeline import make_pipeline

        return make_pipeline(CountVectorizer(ngram_range=(1, 2), token_pattern=TOKENS), MultinomialNB())


def _with_error(key: str, figure: tuple[float, float]) -> dict[str, float]:
    return {key: figure[0], f"{key}_error": figure[1]}


def _pairs(items: Sequence[Item]) -> list[Pair]:
    return [(item["text"], str(item["label"])) for item in items]


def _wording(texts: Sequence[Sequence[str]], length: int) -> dict[str, float]:
    cut = same_length(texts, length)
    figures = {f"distinct_{n}": distinct_n(cut, n) for n in range(1, 5)}
    vocabulary = len({word for text in cut for word in text})
    return {**figures, "vocabulary": vocabulary, "self_bleu": self_bleu(texts[:SELF_BLEU_TEXTS])}


def _fluency(items: Sequence[Item]) -> dict[str, float]:
    scored = [(item["base_nll"], len(item["token_ids"])) for item in items if item.get("base_nll") is not None]
    tokens = sum(number for _, number in scored)
    return {"base_perplexity": math.exp(sum(nll * n for nll, n in scored) / tokens)} if tokens else {}


def _meaning(vectors: np.ndarray) -> dict[str, float]:
    closest, near = nearest_neighbour(vectors)
    return {
        "vendi": vendi(vectors), "remote_clique": remote_clique(vectors), "nearest_neighbour": closest,
        "near_duplicates": near,
    }  # fmt: skip


def _check_labels(arms: Mapping[str, Sequence[Item]], train: Sequence[Pair], test: Sequence[Pair]) -> None:
    known = {label for _, label in train}
    for kind, labels in {
        **{f"The arm {name!r}": {str(item["label"]) for item in items} for name, items in arms.items()},
        "The real test data": {label for _, label in test},
    }.items():
        if labels - known:
            raise ValueError(
                f"{kind} has the labels {', '.join(sorted(labels - known))}, which the real training data "
                f"does not: it has {', '.join(sorted(known))}."
            )
    if len(known) < 2:
        raise ValueError(f"The real training data has one label, {', '.join(known)}; an oracle needs two.")


# --- layout ---

# Key, title, format.
FIGURES: tuple[tuple[str, str, str], ...] = (
    ("vendi", "Vendi score (effective number of texts)", ".1f"),
    ("remote_clique", "remote-clique, cosine", ".4f"),
    ("nearest_neighbour", "distance to the nearest text, cosine", ".4f"),
    ("near_duplicates", "share of near-duplicates", ".1%"),
    ("distinct_1", "distinct-1", ".4f"),
    ("distinct_2", "distinct-2", ".4f"),
    ("distinct_3", "distinct-3", ".4f"),
    ("distinct_4", "distinct-4", ".4f"),
    ("vocabulary", "vocabulary (words)", ",d"),
    ("self_bleu", "self-BLEU (lower: more diverse)", ".4f"),
    ("base_perplexity", "perplexity under the unsteered model", ".1f"),
    ("distance_to_real", "distance to real texts, cosine", ".4f"),
    ("label_accuracy", "label accuracy, oracle: {first}", ".1%"),
    ("second_label_accuracy", "label accuracy, oracle: {second}", ".1%"),
    ("student_accuracy", "student accuracy: {first}", ".1%"),
    ("second_student_accuracy", "student accuracy: {second}", ".1%"),
)


def table(result: Mapping[str, Any]) -> str:
    """The result of `assess` as aligned lines: a figure a line, an arm a column, then what they rest on."""
    arms, settings = result["arms"], result["settings"]
    first, second = settings.get("oracles") or ("", "")
    rows = [["", *arms]]
    for key, title, form in FIGURES:
        cells = [_cell(figures, key, form) for figures in arms.values()]
        if any(cells):
            rows.append([title.format(first=first, second=second), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(w) if at else cell.ljust(w) for at, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]  # fmt: skip
    lines += [
        "",
        f"Diversity of {settings['texts']:,} texts and {settings['words']:,} words of each; self-BLEU of "
        f"{settings['self_bleu_texts']}; sentence features: {settings['features']}.",
    ]
    if "oracles" in settings:
        oracles = [f"{name} {mean:.1%} ± {e:.1%}" for name, (mean, e) in settings["oracles"].items()]
        lines.append(
            f"Oracles: trained on {settings['real_train']:,} real texts; of {settings['real_test']:,} others they "
            f"judge right: {', '.join(oracles)}. ± is one standard error over items."
        )
    else:
        lines.append("Accuracy was not measured: that needs real labelled texts.")
    return "\n".join(line.rstrip() for line in lines)


def _cell(figures: Mapping[str, float], key: str, form: str) -> str:
    if key not in figures:
        return ""
    error = figures.get(f"{key}_error")
    return format(figures[key], form) + (f" ± {error:.1%}" if error is not None else "")
