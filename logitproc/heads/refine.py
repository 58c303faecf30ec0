"""Approximate heads whose best tokens are scored again with the true rows: fast, but W stays stored.

`refine` takes any approximate head. `screened` approximates by the few directions in which a hidden state is large
(screen and refine). Tokens outside the N best keep their approximate logit: a sum over V stays sensible.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from .head import DenseHead, Head, zeros


def rescored(approximate: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, best: int) -> Tensor:
    """The N best logits of each row replaced by exact ones: approximate [..., V], hidden [..., d]. A new tensor."""
    ids = approximate.topk(min(best, len(weight)), sorted=False).indices
    exact = (weight[ids] @ hidden[..., None])[..., 0]
    if bias is not None:
        exact = exact + bias[ids]
    return approximate.scatter(-1, ids, exact.to(approximate.dtype))


class RefinedHead(Head):
    """An approximate head, and the model's own rows for its N best tokens. N = V is the dense head."""

    kind = "refine"
    inner: Head
    dense: DenseHead

    def __init__(
        self, in_features: int, out_features: int, best: int, inner: dict[str, Any], dense: dict[str, Any]
    ):
        super().__init__(in_features, out_features, best=best, inner=inner, dense=dense)
        self.best = best
        self.inner = Head.empty(**inner)
        self.dense = DenseHead(**dense)

    @classmethod
    def of(cls, head: Head, weight: Tensor, bias: Tensor | None = None, *, best: int) -> Self:
        """`head` refined by `weight` [V, d] and `bias` [V], which are shared and not copied."""
        if not 1 <= best <= head.out_features:
            raise ValueError(f"refine must be between 1 and the {head.out_features} tokens, got {best}.")
        dense = DenseHead.of(weight, bias)
        with torch.device("meta"):
            new = cls(
                head.in_features, head.out_features, best,
                {"kind": head.kind, "spec": head.spec, "source": head.source}, dense.spec,
            )  # fmt: skip
        new.inner, new.dense, new.source = head, dense, dense.source
        return new

    def forward(self, hidden: Tensor) -> Tensor:
        return rescored(self.inner(hidden), hidden, self.dense.weight, self.dense.bias, self.best)

    def bytes_per_step(self, batch: int = 1) -> int:
        rescored = batch * self.best * self.in_features * self.dense.weight.element_size()
        return self.inner.bytes_per_step(batch) + rescored


class ScreenedHead(Head):
    """z = sum over the r0 largest coordinates of t = U^T h of t_i (W u_i), then the N best exactly.

    U are the eigenvectors of E[h h^T]; a coordinate is large by |t_i| ||W u_i||. The product W U is stored beside W,
    a column a row, so that a step reads r0 of its rows.
    """

    kind = "screened"
    basis: Tensor
    columns: Tensor
    norms: Tensor
    dense: DenseHead

    def __init__(self, in_features: int, out_features: int, kept: int, best: int, dense: dict[str, Any]):
        super().__init__(in_features, out_features, kept=kept, best=best, dense=dense)
        self.kept, self.best = kept, best
        self.basis = nn.Parameter(zeros(in_features, in_features, dtype=dense["dtype"]), requires_grad=False)
        self.columns = nn.Parameter(
            zeros(in_features, out_features, dtype=dense["dtype"]), requires_grad=False
        )
        self.register_buffer("norms", zeros(in_features))
        self.dense = DenseHead(**dense)

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, bias: Tensor | None, products: Tensor, *, kept: int, best: int) -> Self:
        """products [d, d] is proportional to E[h h^T]; weight [V, d] and bias [V] are shared and not copied."""
        dense = DenseHead.of(weight, bias)
        head = cls(weight.shape[1], weight.shape[0], kept, best, dense.spec)
        basis = torch.linalg.eigh(products.double()).eigenvectors.flip(1).float()
        head.basis.copy_(basis)
        for rows, into in zip(weight.split(4096), head.columns.split(4096, 1), strict=True):
            into.copy_((rows.float() @ basis).T)
        head.norms.copy_(head.columns.float().norm(dim=1))
        head.dense, head.source = dense, dense.source
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, self.in_features)
        coordinates = rows @ self.basis
        chosen = (coordinates.abs() * self.norms).topk(self.kept).indices
        scores = [t[i] @ self.columns[i] for t, i in zip(coordinates, chosen, strict=True)]
        logits = torch.stack(scores)
        if self.dense.bias is not None:
            logits = logits + self.dense.bias
        logits = rescored(logits, rows, self.dense.weight, self.dense.bias, self.best)
        return logits.reshape(*hidden.shape[:-1], -1)

    def bytes_per_step(self, batch: int = 1) -> int:
        size, d = self.columns.element_size(), self.in_features
        return (
            size * (d * d + batch * (self.kept * self.out_features + self.best * d + d + self.out_features))
            + 4 * d
        )
