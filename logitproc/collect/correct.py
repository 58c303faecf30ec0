"""Human correction of collected labels: label replacement and out-of-scope filtering.

Chung, Kamar, Amershi, arXiv:2306.04140, sections 5 and 6.1. People inspect some items; proxies, a linear
support vector classifier for each class against the rest, carry what they said to all others:

    S_i = w [i is the prompted label] + (1 - w) S_p,i        w = 0.3, eq. (1); the new label is the argmax

Differs from the paper, which has no probability: the proxy's confidence S_p,i is its decision value, mapped to
[0, 1] by a logistic function that is fitted to the inspected items (cross-validated). And an inspected item
takes the label it was given, whatever S says.
"""

import csv
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..artifact import new_file, write_text
from ..features import SentenceFeatures, require_sklearn
from ..registry import unknown
from .report import read_items

COLUMNS = ("id", "label", "text", "uncertainty", "correct_label", "in_scope")
ENOUGH_OUT = 5  # the paper filters where at least so many inspected items were out of scope
SPLITS = 10  # of the inspected items, 8:2, to say how right the proxies are
YES, NO = ("yes", "y", "1", "true", ""), ("no", "n", "0", "false")

Item = Mapping[str, Any]


class Inspected(NamedTuple):
    """What a person said about one item."""

    label: str
    in_scope: bool


# --- export ---


def export_labels(folder: Path, out: Path, number: int | None = None, embeddings: str | None = None) -> int:
    """Write the items of a collection to CSV, most uncertain first (at most `number`), and return how many.

    Uncertainty is 1 less the margin between the two likeliest labels, by a classifier of the prompted labels that
    did not see the item. The person fills in `correct_label` for every item looked at, and "no" in `in_scope` for
    a text that belongs to no label; rows left empty count as not inspected.

    Raises ValueError for a collection that is not finished.
    """
    items = _collected(folder)
    scores = uncertainty(items, embeddings)
    order = sorted(range(len(items)), key=lambda i: (-scores[i], items[i]["id"]))[:number]
    with new_file(out) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for i in order:
            writer.writerow([items[i]["id"], items[i]["label"], items[i]["text"], f"{scores[i]:.3f}", "", ""])
    return len(order)


def uncertainty(items: Sequence[Item], embeddings: str | None = None) -> np.ndarray:
    """1 - (p of the likeliest label - p of the second), [items] in [0, 1]."""
    require_sklearn("Exported labels")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    labels = [item["label"] for item in items]
    least = min(Counter(labels).values())
    if len(set(labels)) < 2 or least < 2:
        raise ValueError(f"Uncertainty needs two labels of two items each; there are {dict(Counter(labels))}.")
    rows = _features(items, embeddings)
    folds = StratifiedKFold(min(5, least), shuffle=True, random_state=0)
    model = LogisticRegression(C=10, max_iter=1000)
    p = np.sort(cross_val_predict(model, rows, labels, cv=folds, method="predict_proba"), axis=1)
    return 1 - (p[:, -1] - p[:, -2])


# --- apply ---


def apply_labels(
    folder: Path, labels: Path, weight: float = 0.3, embeddings: str | None = None
) -> dict[str, Any]:
    """Relabel and filter a collection by what a person said about some of its items; returns the report.

    Writes, beside the collection, corrected.jsonl, corrected-balanced.jsonl (as many items of each label, drawn
    at random) and corrections.json. Each item keeps `prompted_label` and says whether it was `inspected`. Items
    marked out of scope are dropped; items that a proxy finds out of scope are too, when at least 5 were marked.

    Raises ValueError for unknown ids or labels and for too few inspected items, LookupError with near names for a
    label with a slip.
    """
    items = _collected(folder)
    inspected = read_labels(labels, items)
    classes = sorted({item["label"] for item in items})
    rows = _features(items, embeddings)
    at = {item["id"]: i for i, item in enumerate(items)}
    seen = np.array([at[key] for key in inspected])
    human = np.array([inspected[items[i]["id"]].label for i in seen])
    prompted = np.array([item["label"] for item in items])

    in_scope = np.array([inspected[items[i]["id"]].in_scope for i in seen])
    proxies = _proxies(rows, seen[in_scope], human[in_scope], classes)
    found = replaced(prompted, proxies, classes, weight)
    found[seen] = human
    keep, filter_says = _in_scope(rows, seen, in_scope)

    corrected = [
        {**item, "label": str(label), "prompted_label": item["label"], "inspected": item["id"] in inspected}
        for item, label, kept in zip(items, found, keep, strict=True)
        if kept
    ]
    report = {
        "items": len(items), "inspected": len(seen), "weight": weight,
        "features": SentenceFeatures(embeddings, [item["text"] for item in items]).name,
        "confidence": "decision values of linear SVCs, mapped to [0, 1] by a logistic fit on the inspected items",
        "prompted_label_right": float((prompted[seen] == human)[in_scope].mean()),
        "proxy_accuracy": _proxy_accuracy(rows, seen[in_scope], human[in_scope]),
        "changed": int((found != prompted)[keep].sum()),
        "changes": {
            f"{old} -> {new}": number
            for (old, new), number in sorted(Counter(zip(prompted[keep], found[keep], strict=True)).items())
            if old != new
        },
        "out_of_scope": filter_says | {"dropped": int((~keep).sum())},
        "labels_before": dict(sorted(Counter(prompted.tolist()).items())),
        "labels_after": dict(sorted(Counter(found[keep].tolist()).items())),
    }  # fmt: skip
    balanced = _balanced(corrected)
    report["balanced"] = len(balanced)
    for name, chosen in (("corrected.jsonl", corrected), ("corrected-balanced.jsonl", balanced)):
        with new_file(folder / name) as file:
            file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in chosen)
    write_text(folder / "corrections.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def replaced(prompted: np.ndarray, proxies: np.ndarray, classes: Sequence[str], weight: float) -> np.ndarray:
    """The label of each item by eq. (1): prompted [items], proxies [items, classes] in [0, 1] -> [items].

    The prompted label wins a tie. With weight 1 no label changes.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"The weight of the prompted label must be in [0, 1], got {weight}.")
    own = prompted[:, None] == np.asarray(classes)
    scores = weight * own + (1 - weight) * proxies
    best = np.isclose(scores, scores.max(1, keepdims=True), rtol=0, atol=1e-12)
    choice = np.where((best & own).any(1), own.argmax(1), best.argmax(1))
    return np.asarray(classes)[choice]


def read_labels(path: Path, items: Sequence[Item]) -> dict[str, Inspected]:
    """id -> what the CSV says, for rows in which something was filled in."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    prompted = {item["id"]: item["label"] for item in items}
    found: dict[str, Inspected] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = {"id", "correct_label", "in_scope"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} lacks the column {sorted(missing)[0]!r}; `collect export-labels` writes it.")
        for row in reader:
            key, label, scope = (
                (row[name] or "").strip() for name in ("id", "correct_label", "in_scope")
            )
            where = f"{path}, line {reader.line_num}"
            if not label and not scope:
                continue
            if key not in prompted:
                raise ValueError(f"{where}: the collection has no item {key!r}; ids must stay as exported.")
            if label and label not in prompted.values():
                raise unknown(f"label in {where}:", label, set(prompted.values()))
            if scope.lower() not in YES + NO:
                raise ValueError(f"{where}: in_scope must be yes or no, got {scope!r}.")
            found[key] = Inspected(label or prompted[key], scope.lower() not in NO)
    if not found:
        raise ValueError(f"{path} holds no inspected item; fill in correct_label for those you looked at.")
    return found


def _proxies(rows: Any, seen: np.ndarray, human: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Confidence of each class's proxy in each item, [items, classes]."""
    require_sklearn("Label proxies")
    from sklearn.calibration import CalibratedClassifierCV

    counts = Counter(human.tolist())
    for label in classes:
        if counts[label] < 2 or len(human) - counts[label] < 2:
            raise ValueError(
                f"The proxy of {label!r} needs two inspected items with that label and two without; there are "
                f"{counts[label]} and {len(human) - counts[label]}. Inspect more."
            )
    columns = []
    for label in classes:
        folds = min(5, counts[label], len(human) - counts[label])
        model = CalibratedClassifierCV(_svc(), method="sigmoid", cv=folds, ensemble=False)
        columns.append(model.fit(rows[seen], human == label).predict_proba(rows)[:, 1])
    return np.stack(columns, 1)


def _in_scope(rows: Any, seen: np.ndarray, in_scope: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """bool [items], and how it was decided."""
    keep = np.ones(rows.shape[0], bool)
    marked = int((~in_scope).sum())
    used = marked >= ENOUGH_OUT and in_scope.any()
    if used:
        keep = _svc().fit(rows[seen], in_scope).predict(rows)
    keep[seen] = in_scope
    return keep, {"marked": marked, "filter": "linear SVC" if used else f"off, fewer than {ENOUGH_OUT} were marked"}


def _proxy_accuracy(rows: Any, seen: np.ndarray, human: np.ndarray) -> dict[str, float] | None:
    """Mean and deviation of a linear SVC's accuracy over splits 8:2 of the inspected items."""
    from sklearn.model_selection import ShuffleSplit, cross_val_score

    splits = [
        (train, test)
        for train, test in ShuffleSplit(SPLITS, test_size=0.2, random_state=0).split(seen)
        if len(set(human[train])) > 1
    ]
    if not splits:
        return None
    scores = cross_val_score(_svc(), rows[seen], human, cv=splits)
    return {"mean": float(scores.mean()), "deviation": float(scores.std())}


def _svc() -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(max_iter=10_000)


def _features(items: Sequence[Item], embeddings: str | None) -> Any:
    texts = [item["text"] for item in items]
    return SentenceFeatures(embeddings, texts)(texts)


def _balanced(items: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """As many items of each label as of the rarest, drawn at random, in the order they came."""
    counts = Counter(item["label"] for item in items)
    draw, chosen = random.Random(seed), set()
    for label in sorted(counts):
        ids = [item["id"] for item in items if item["label"] == label]
        chosen |= set(draw.sample(ids, min(counts.values())))
    return [item for item in items if item["id"] in chosen]


def _collected(folder: Path) -> list[dict[str, Any]]:
    data = folder / "data.jsonl"
    if not data.is_file():
        raise FileNotFoundError(f"There is no {data}; `logitproc collect` writes it when it is done.")
    return list(read_items(data))


def table(report: Mapping[str, Any]) -> str:
    """The report of `apply_labels` in lines."""
    proxy, scope = report["proxy_accuracy"], report["out_of_scope"]
    changes = ", ".join(f"{number} {change}" for change, number in report["changes"].items()) or "none"
    counts = lambda labels: ", ".join(f"{number:,} {label}" for label, number in labels.items())
    lines = [
        f"inspected       {report['inspected']:,} of {report['items']:,} items; the prompted label was right for "
        f"{report['prompted_label_right']:.1%} of those in scope",
        f"labels changed  {report['changed']:,}: {changes}",
        f"out of scope    {scope['dropped']:,} dropped, {scope['marked']:,} of them marked; filter: {scope['filter']}",
        f"labels before   {counts(report['labels_before'])}",
        f"labels after    {counts(report['labels_after'])}; balanced: {report['balanced']:,} items",
        f"features        {report['features']}",
        f"confidence      {report['confidence']}",
    ]
    if proxy:
        lines.append(f"proxies         right for {proxy['mean']:.1%} (deviation {proxy['deviation']:.1%}) of held-out "
                     "inspected items")  # fmt: skip
    return "\n".join(lines)
