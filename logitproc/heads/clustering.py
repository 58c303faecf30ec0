"""Weighted k-means for hundreds of thousands of rows: blocks, a seed, no empty code.

Lloyd's algorithm with products in float32 and sums in float64. On a CPU, the same seed and thread count give the
same labels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_TILE = 1 << 24  # distances, or numbers of rows, held at once


class Progress(NamedTuple):
    """What a fit reports: the stage, how far it is, and its figures."""

    stage: str
    step: int
    steps: int
    figures: dict[str, float]


Report = Callable[[Progress], None]


def kmeans(
    points: Tensor,
    weights: Tensor,
    codes: int,
    generator: torch.Generator,
    *,
    passes: int = 25,
    tolerance: float = 1e-3,
    tile: int = _TILE,
    report: Report | None = None,
) -> Tensor:
    """Labels [n] int64 that minimise sum_i weights_i ||points_i - mean of its code||^2, locally.

    points [n, d] float, weights [n] >= 0, 1 <= codes <= n. The objective never grows from pass to pass. The start
    is `codes` different rows drawn by weight; a row between two codes goes to the lower one; every code keeps at
    least one row. It stops after `passes`, when no row moves, or when the objective falls by less than
    `tolerance` of itself.
    """
    weights = weights.double()
    drawn = torch.multinomial(weights.cpu() + weights.mean().item() * 1e-9, codes, generator=generator)
    exact = torch.promote_types(points.dtype, torch.float32)  # bfloat16 is how rows are stored, not compared
    centroids = points[drawn.sort().values.to(points.device)].to(exact)
    labels, objective = torch.full((len(points),), -1, device=points.device), torch.inf
    for step in range(1, passes + 1):
        nearest, distance = assign(points, centroids, tile)
        errors = distance * weights
        nearest, empty = fill_empty(nearest, errors, codes)
        moved, before = int((nearest != labels).sum()), objective
        labels, objective = nearest, float(errors.sum())
        centroids = means(points, weights, labels, codes).to(exact)
        if report is not None:
            figures = {"objective": objective, "moved": moved, "empty": empty}
            report(Progress("k-means", step, passes, figures))
        if moved == 0 or before - objective < tolerance * before:
            break
    return labels


def assign(points: Tensor, centroids: Tensor, tile: int = _TILE) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each point, the lowest one of several, and the squared distance [n] float64."""
    norms, columns = centroids.square().sum(1), centroids.T.contiguous()
    labels, distances = [], []
    for block in points.split(max(1, tile // max(centroids.shape))):
        block = block.to(centroids.dtype)
        least, label = torch.addmm(norms, block, columns, alpha=-2).min(1)
        labels.append(label)
        distances.append((least.double() + block.double().square().sum(1)).clamp(min=0))
    return torch.cat(labels), torch.cat(distances)


def fill_empty(labels: Tensor, errors: Tensor, codes: int) -> tuple[Tensor, int]:
    """Give every code without rows one: the rows of largest error, each from a code that keeps another."""
    sizes = torch.bincount(labels, minlength=codes)
    empty = (sizes == 0).nonzero()[:, 0].tolist()
    if not empty:
        return labels, 0
    labels = labels.clone()
    worst = iter(errors.argsort(descending=True, stable=True).tolist())
    for code in empty:
        row = next(row for row in worst if sizes[labels[row]] > 1)
        sizes[labels[row]] -= 1
        labels[row], sizes[code] = code, 1
    return labels, len(empty)


def means(rows: Tensor, weights: Tensor, labels: Tensor, codes: int, block: int = 4096) -> Tensor:
    """The weighted mean of the rows of each code, [codes, d] float64; the plain mean where all weights are 0."""
    total = torch.zeros(codes, dtype=torch.float64, device=rows.device)
    total.index_add_(0, labels, weights.double())
    sizes = torch.bincount(labels, minlength=codes).double()
    share = torch.where(total[labels] > 0, weights.double() / total[labels], 1 / sizes[labels])
    sums = torch.zeros(codes, rows.shape[1], dtype=torch.float64, device=rows.device)
    for at in range(0, len(rows), block):
        part = slice(at, at + block)
        sums.index_add_(0, labels[part], rows[part].double() * share[part, None])
    return sums
