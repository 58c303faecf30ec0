"""Sentence features: a row of length 1 for each text, from a `sentence-transformers` model or offline.

Offline, a text is its TF-IDF weights over words and word pairs. On SST-2 and SUBJ a linear classifier on them
beats one on their singular value decomposition and one on the mean hidden states of the bundled model
(`eval/RESULTS.md`), and they need no model; but two texts are near each other only where they share words.
A decomposition fitted to the texts it measures would moreover keep what repeats in them and drop what does
not: it finds duplicates diverse.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

TOKENS = r"\w+|[^\w\s]"  # single characters are words too: "I" tells a novel from an abstract
OFFLINE = "TF-IDF of words and word pairs (offline)"


class SentenceFeatures:
    """texts -> rows [texts, d] of length 1, a float64 array or (offline) a sparse matrix; `name` says which.

    Parameters:
        embeddings: a `sentence-transformers` model, by name or path; None for the offline features.
        texts: what the offline features take word frequencies from, duplicates counted once. All texts that
            are compared with each other must go through one instance. A text that shares no word with them
            becomes a row of zeros.

    Raises ImportError naming the package to install.
    """

    def __init__(self, embeddings: str | None, texts: Sequence[str]):
        self.name = embeddings or OFFLINE
        if embeddings is not None:
            self._rows = _sentence_transformer(embeddings)
        else:
            require_sklearn("Offline sentence features")
            self._rows = tf_idf().fit(list(dict.fromkeys(texts))).transform

    def __call__(self, texts: Sequence[str]) -> Any:
        return self._rows(list(texts))


def tf_idf() -> Any:
    """A TfidfVectorizer of words and word pairs."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=TOKENS)


def require_sklearn(what: str) -> None:
    """Raise ImportError with one sentence unless scikit-learn is there."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ImportError(f"{what} need scikit-learn: pip install 'logitproc[eval]'.") from None


def _sentence_transformer(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ImportError(
            f"The embeddings {name!r} need the package sentence-transformers: pip install "
            "sentence-transformers, or leave them out for the offline features."
        ) from None
    model = SentenceTransformer(name)

    def rows(texts: list[str]) -> np.ndarray:
        values = np.asarray(model.encode(texts, show_progress_bar=False), np.float64)
        return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)

    return rows
