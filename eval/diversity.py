"""How diverse and how accurate collected data sets are, side by side.

    python eval/diversity.py runs/plain runs/suppressed --real train.csv --real-test test.csv --out runs/compared
    python eval/diversity.py T1.3=runs/hot T0.7=runs/cool --embeddings sentence-transformers/all-MiniLM-L6-v2

An arm is a folder that `logitproc collect` wrote or a JSONL file with `text` and `label`. Real data, csv, tsv or
jsonl with the columns text and label, trains the oracles that judge labels and tests the students that are trained
on each arm; without --real-test a fifth of it is set aside for that. All arms are cut to one number of texts and
words. --embeddings takes any sentence-transformers model; without it, sentence features are TF-IDF weights.

OUT/diversity.json holds all figures, OUT/diversity.png the frontier of diversity and label accuracy (needs
matplotlib): an arm on the line is beaten on both by no other.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common

from logitproc import cli

Figures = Mapping[str, Mapping[str, float]]
AXES = {"vendi": "Vendi score", "distinct_3": "distinct-3"}


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, 2 wrong usage, 1 failed, the last two with one sentence on stderr."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except Exception as error:
        if args.debug:
            raise
        sentence, status = cli.explain(error)
        print(f"diversity: {sentence}", file=sys.stderr)
        return status
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", metavar="[NAME=]FOLDER|FILE", help="what `logitproc collect` wrote")
    parser.add_argument("--real", metavar="FILE", help="real labelled texts to train the oracles")
    parser.add_argument("--real-test", metavar="FILE", help="real labelled texts to test with")
    parser.add_argument("--embeddings", metavar="MODEL", help="a sentence-transformers model, by name or path")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--out", metavar="DIR", help="write diversity.json and diversity.png")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _run(args: argparse.Namespace) -> None:
    from logitproc.artifact import write_text
    from logitproc.assessment import Real, assess, table
    from logitproc.corpus import labelled

    arms: dict[str, list[dict[str, Any]]] = {}
    for given in args.arms:
        name, path = _named(given)
        if name in arms:
            raise ValueError(f"Two arms are named {name!r}; give one as NAME=FOLDER.")
        arms[name] = read_items(path)
    if args.real_test and not args.real:
        raise ValueError("--real-test needs --real, which trains the oracle that it tests.")
    real = Real(labelled(args.real), labelled(args.real_test) if args.real_test else None) if args.real else None
    result = assess(arms, real, args.embeddings, args.seed)
    print(table(result))
    if args.out:
        flags = {key: value for key, value in vars(args).items() if key != "debug"}
        report = {"report": "diversity", "flags": flags, **common._finite(result)}
        write_text(Path(args.out) / "diversity.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        if real is not None:
            plot(result["arms"], Path(args.out) / "diversity.png")


def _named(given: str) -> tuple[str, Path]:
    name, equals, path = given.partition("=")
    if equals and not Path(given).exists():
        return name, Path(path)
    return Path(given).stem if Path(given).suffix else Path(given).name, Path(given)


def read_items(path: Path) -> list[dict[str, Any]]:
    """The items of a collected folder, or of a JSONL file; each has a text and a label."""
    file = path / "data.jsonl" if path.is_dir() else path
    if not file.is_file():
        unfinished = path.is_dir() and any(path.glob("items-*.jsonl"))
        hint = "; its collection is not finished, start it again" if unfinished else ""
        raise FileNotFoundError(f"There is no {file}{hint}.")
    items = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            item = json.loads(line)
            item["text"], item["label"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}, line {number}, is no JSON object with text and label.") from None
        items.append(item)
    return items


def frontier(figures: Figures, x: str, y: str = "label_accuracy") -> list[str]:
    """The arms that no other beats on both figures, by rising x."""
    beaten = lambda a, b: b[x] >= a[x] and b[y] >= a[y] and (b[x], b[y]) != (a[x], a[y])
    kept = [name for name, a in figures.items() if not any(beaten(a, b) for b in figures.values())]
    return sorted(kept, key=lambda name: (figures[name][x], -figures[name][y]))


def plot(figures: Figures, file: Path, axes: Sequence[str] = tuple(AXES)) -> None:
    """Label accuracy against each diversity figure; raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("The plot needs matplotlib: pip install 'logitproc[plot]'.") from None
    canvas = Figure(figsize=(6 * len(axes), 4.5), layout="constrained")
    for panel, x in zip(canvas.subplots(1, len(axes), sharey=True, squeeze=False)[0], axes, strict=True):
        for name, arm in figures.items():
            error = arm["label_accuracy_error"]
            panel.errorbar(arm[x], arm["label_accuracy"], error, fmt="o", capsize=2)
            panel.annotate(name, (arm[x], arm["label_accuracy"]), (5, 4), textcoords="offset points", fontsize=8)
        best = [figures[name] for name in frontier(figures, x) if math.isfinite(figures[name][x])]
        panel.plot([arm[x] for arm in best], [arm["label_accuracy"] for arm in best], color="0.6", zorder=0)
        panel.set(xlabel=AXES.get(x, x), ylabel="label accuracy")
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
