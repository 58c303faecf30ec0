"""What a collection is worth, beside what sampling without its chain would have given."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..artifact import write_text
from ..assessment import Real, assess, table
from ..corpus import labelled
from ..features import require_sklearn
from .job import Job
from .run import Collected


def read_real(job: Job) -> Real | None:
    """The real labelled texts of the job's oracle, None without one.

    Raises FileNotFoundError when a file is missing, ValueError when it lacks a label of the job, ImportError
    without scikit-learn: all that would spoil the report, before anything is generated.
    """
    if job.oracle is None:
        return None
    for file in (job.oracle.train, job.oracle.test):
        if file is not None and not Path(file).is_file():
            raise FileNotFoundError(
                f"The oracle's real data {file} is not there; correct the job file or leave oracle out."
            )
    require_sklearn("Oracles")
    real = Real(labelled(job.oracle.train), labelled(job.oracle.test) if job.oracle.test else None)
    known = {label for _, label in real.train}
    for label in job.labels:
        if label not in known:
            raise ValueError(
                f"The oracle's real data {job.oracle.train} has no text labelled {label!r}; it has "
                f"{', '.join(sorted(known))}."
            )
    return real


def report(
    job: Job, output: Path, collected: Collected, plain: Collected | None, real: Real | None
) -> tuple[dict[str, Any], str]:
    """(figures, the same as a table); written to report.json and report.txt in `output`.

    `plain` is what the same prompts and sampling gave without the chain. Figures of diversity are of
    equally many texts of both, drawn at random from the larger set.
    """
    arms = {"collected": list(read_items(collected.data))}
    counts = Counter(item["label"] for item in arms["collected"])
    if plain is not None and plain.items >= 2:
        arms["plain sampling"] = list(read_items(plain.data))
    figures: dict[str, Any] = {
        "items": collected.items, "labels": dict(counts), "unfilled": collected.unfilled,
        "drawn_again": collected.failures, "job": job.to_dict(),
    }  # fmt: skip
    again = ", ".join(f"{number} {reason}" for reason, number in sorted(collected.failures.items())) or "none"
    lines = [
        f"{collected.items:,} items in {collected.data}: "
        + ", ".join(f"{number:,} {label}" for label, number in sorted(counts.items())),
        f"Drawn again: {again}. Still missing: {collected.unfilled}.",
    ]
    if collected.items >= 2:
        assessed = assess(arms, real, job.embeddings, job.seed)
        figures |= assessed
        lines += ["", table(assessed)]
        if len(arms) > 1:
            lines.append(
                f"Plain sampling: {plain.items if plain else 0:,} texts from the same prompts and settings without "
                "the chain, in plain/data.jsonl."
            )
    text = "\n".join(lines) + "\n"
    write_text(output / "report.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    write_text(output / "report.txt", text)
    return figures, text


def read_items(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
