"""The rules of judgement of the study of `fusion`, which stand at the top of `fusion.py`, in code."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from logitproc import metrics

DRAWS = 2000


class Judge:
    """Cells of one task and setting: seeds averaged within a document, differences by paired bootstrap."""

    def __init__(self, cells: list[dict[str, Any]]):
        self.tokens = np.array(cells[0]["tokens"])
        mean = lambda arm, key: np.mean([cell["arms"][arm][key] for cell in cells], 0)
        self.nll = {arm: mean(arm, "nll") for arm in cells[0]["arms"]}
        self.kl = {arm: mean(arm, "kl") for arm in cells[0]["arms"]}
        self.right = {arm: mean(arm, "right") for arm, found in cells[0]["arms"].items() if found["right"]}
        self.alpha = [cell["alpha"] for cell in cells]
        rng = np.random.default_rng(0)
        self.draws = rng.integers(0, len(self.tokens), (DRAWS, len(self.tokens)))

    def loss(self, arm: str, rows: Any = slice(None)) -> Any:
        return self.nll[arm][rows].sum(-1) / self.tokens[rows].sum(-1)

    def difference(self, arm: str, other: str) -> tuple[float, float, float]:
        """loss(arm) - loss(other): mean and 95 % interval."""
        of = lambda rows: self.loss(arm, rows) - self.loss(other, rows)
        return (of(slice(None)), *self._range(of(self.draws)))

    def closure(self, arm: str) -> tuple[float, float, float]:
        """Closure of the gap in loss: mean and 95 % interval."""
        of = lambda rows: metrics.gap_closure(*(-self.loss(x, rows) for x in (arm, "host", "ceiling")))[1]
        return (of(slice(None)), *self._range(of(self.draws)))

    def beats(self, arm: str, other: str) -> bool:
        return self.difference(arm, other)[2] < 0

    def falls(self, arm: str) -> bool:
        return self.difference(arm, "host")[1] > 0

    def figures(self, arm: str) -> dict[str, Any]:
        accuracy = {key: float(self.right[key].mean()) for key in (arm, "host", "ceiling") if key in self.right}
        gap = len(accuracy) == 3 and accuracy["host"] != accuracy["ceiling"]
        ratio, closure = metrics.gap_closure(*accuracy.values()) if gap else (None, None)
        return {
            "loss": float(self.loss(arm)), "kl": float(self.kl[arm].sum() / self.tokens.sum()),
            "closure": [float(x) for x in self.closure(arm)],
            "loss_ratio": float(self.loss("ceiling") / self.loss(arm)),
            "against_host": [float(x) for x in self.difference(arm, "host")],
            "against_expert": [float(x) for x in self.difference(arm, "expert")] if "expert" in self.nll else None,
            "accuracy": accuracy.get(arm), "accuracy_ratio": ratio, "accuracy_closure": closure,
        }  # fmt: skip

    @staticmethod
    def _range(values: np.ndarray) -> tuple[float, float]:
        low, high = np.percentile(values, [2.5, 97.5])
        return float(low), float(high)


def over_seeds(tasks: Sequence[list[dict[str, Any]]], arm: str, other: str) -> dict[str, Any]:
    """Means over some tasks, each with a cell a seed: the closure of `arm` with the experts of each seed, and
    loss(arm) - loss(other), mean and 95 % interval.

    The interval is a bootstrap that draws the seeds, for all tasks the same, and the documents of each task.
    """
    judges = [[Judge([cell]) for cell in cells] for cells in tasks]
    gap = lambda judge, rows=slice(None): judge.loss(arm, rows) - judge.loss(other, rows)
    rng, count = np.random.default_rng(0), len(judges[0])
    found = []
    for draw in range(DRAWS):
        seeds = rng.integers(0, count, count)  # beside them documents, other draws in every task
        found.append(np.mean([gap(of[s], of[s].draws[draw - task]) for task, of in enumerate(judges) for s in seeds]))
    closure = np.mean([[judge.closure(arm)[0] for judge in of_task] for of_task in judges], 0)
    mean = float(np.mean([gap(judge) for of_task in judges for judge in of_task]))
    return {"closure": closure.tolist(), "difference": [mean, *Judge._range(np.array(found))]}


def choose(dev: dict[str, Judge], doubtful: dict[str, Judge], arms: tuple[str, ...]) -> str:
    """The arm of the largest mean closure on dev among those that fall below the host nowhere.

    In `doubtful` the experts are those of other tasks.
    """
    falls = lambda arm: any(judge.falls(arm) for judge in (*dev.values(), *doubtful.values()))
    safe = [arm for arm in arms if not falls(arm)] or list(arms)
    return max(safe, key=lambda arm: np.mean([judge.closure(arm)[0] for judge in dev.values()]))


def bound_excess(judge: Judge) -> float:
    """The most by which a text's loss under the mixture without share exceeds its bound; 0 or less is right.

    One seed only: the bound is one of a text.
    """
    components = ("host", "upscale 0.3")
    best = np.min([judge.nll[arm] for arm in components], 0)
    return float((judge.nll["mixture share 0"] - best).max() - math.log(len(components)))
