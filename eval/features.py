"""Which offline sentence features tell labels apart: logistic regression on each, tested on real labelled texts.

    python eval/features.py --train train.csv --test test.csv

Compared: TF-IDF of words and word pairs, its singular value decomposition to 256 dimensions, and the mean hidden
states of a model, layer by layer (the best of them on the test data, which favours them).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import common
import numpy as np

from logitproc.bundled import find_model
from logitproc.corpus import labelled
from logitproc.features import tf_idf


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, metavar="FILE", help="csv, tsv or jsonl with text and label")
    parser.add_argument("--test", required=True, metavar="FILE")
    parser.add_argument("--model", default="base", help="whose hidden states (default: base)")
    args = parser.parse_args(argv)
    (texts, labels), (test, truth) = (zip(*labelled(file), strict=True) for file in (args.train, args.test))
    rows = []
    for name, train_rows, test_rows in features(texts, test, args.model):
        from sklearn.linear_model import LogisticRegression

        accuracy = LogisticRegression(C=10, max_iter=1000).fit(train_rows, labels).score(test_rows, truth)
        rows.append((name, f"{accuracy:.3f}"))
    print(f"{len(texts):,} texts to train, {len(test):,} to test\n")
    print(common.rows(["features", "accuracy"], rows))
    return 0


def features(texts: Sequence[str], test: Sequence[str], model: str) -> Iterator[tuple[str, Any, Any]]:
    """(name, rows of `texts`, rows of `test`); dense rows are centred on `texts` and have length 1."""
    from sklearn.decomposition import TruncatedSVD

    weights = tf_idf().fit(texts)
    sparse, sparse_test = weights.transform(texts), weights.transform(test)
    yield "TF-IDF", sparse, sparse_test
    svd = TruncatedSVD(256, random_state=0).fit(sparse)
    yield "TF-IDF, SVD to 256", unit(svd.transform(sparse)), unit(svd.transform(sparse_test))
    hidden, hidden_test = (hidden_states(part, model) for part in (texts, test))
    for layer in range(hidden.shape[1]):
        mean = hidden[:, layer].mean(0)
        name = f"hidden states of {model}, layer {layer}"
        yield name, unit(hidden[:, layer] - mean), unit(hidden_test[:, layer] - mean)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def hidden_states(texts: Sequence[str], model: str, batch_size: int = 64) -> np.ndarray:
    """Means over the tokens of each text, [texts, layers + 1, hidden]."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = find_model(model)
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "right"
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows: dict[int, np.ndarray] = {}
    for start in range(0, len(texts), batch_size):
        batch = by_length[start : start + batch_size]
        inputs = tokenizer(
            [texts[i] for i in batch], return_tensors="pt", padding=True, truncation=True, max_length=256
        )
        with torch.no_grad():
            states = torch.stack(loaded(**inputs, output_hidden_states=True).hidden_states, 1).float()
        mask = inputs["attention_mask"][:, None, :, None]
        means = (states * mask).sum(2) / mask.sum(2)
        rows |= dict(zip(batch, means.numpy(), strict=True))
    return np.stack([rows[i] for i in range(len(texts))])


if __name__ == "__main__":
    sys.exit(main())
