"""What keeps the best tokens of an approximate head right; the model's own rows, or as many numbers, stay stored.

`RefinedHead` scores the N best tokens of any approximate head again with the true rows: `refine=N`. `ScreenedHead`
approximates, in place of codes, by the few directions in which a hidden state is large: `screened=R`. Tokens outside
the N best keep their approximate logit, so a sum over V stays sensible.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..checks import whole_up_to
from .fitted import FittedHead
from .head import DenseHead, Head, name_of, zeros

TOKENS, FEATURES = "tokens of the vocabulary", "features of a hidden state"
_GATHERED = 1 << 24  # numbers of rows gathered at once


class RefinedHead(FittedHead):
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
        """`head` refined by `weight` [V, d] and `bias` [V], which are shared and not copied.

        Raises ValueError unless `best` is a whole number from 1 to V.
        """
        whole_up_to("best", best, 1, head.out_features, TOKENS)
        dense = DenseHead.of(weight, bias)
        with torch.device("meta"):
            new = cls(
                head.in_features, head.out_features, best,
                {"kind": head.kind, "spec": head.spec, "source": head.source}, dense.spec,
            )  # fmt: skip
        new.inner, new.dense, new.source = head, dense, dense.source
        return new

    def forward(self, hidden: Tensor) -> Tensor:
        approximate = self.inner(hidden).reshape(-1, self.out_features)
        states = hidden.reshape(-1, self.in_features)
        block = max(1, _GATHERED // (self.best * self.in_features))
        parts = zip(states.split(block), approximate.split(block), strict=True)
        return torch.cat([self._rescored(*part) for part in parts]).reshape(*hidden.shape[:-1], self.out_features)

    def _rescored(self, states: Tensor, approximate: Tensor) -> Tensor:
        ids = approximate.topk(self.best, sorted=False).indices
        exact = (self.dense.weight[ids] @ states[..., None])[..., 0]
        if self.dense.bias is not None:
            exact = exact + self.dense.bias[ids]
        return approximate.scatter(-1, ids, exact.to(approximate.dtype))

    def bytes_per_step(self, batch: int = 1) -> int:
        rescored = batch * self.best * self.in_features * self.dense.weight.element_size()
        return self.inner.bytes_per_step(batch) + rescored


class ScreenedHead(FittedHead):
    """z = beta + sum over the R largest coordinates of t = U^T h of t_i (W u_i); R = d is the dense head.

    U are the eigenvectors of E[h h^T]; a coordinate is large by |t_i| ||W u_i||. The product W U is stored a column a
    row, so that a step reads R of its rows: as many numbers as the dense head has, and d^2 more, of which few are read.
    """

    kind = "screened"
    basis: Tensor
    columns: Tensor
    norms: Tensor
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, directions: int, bias: bool = False, dtype: str = "float32"
    ):
        super().__init__(in_features, out_features, directions=directions, bias=bias, dtype=dtype)
        self.directions = directions
        parameter = lambda *shape: nn.Parameter(zeros(*shape, dtype=dtype), requires_grad=False)
        self.basis = parameter(in_features, in_features)
        self.columns = parameter(in_features, out_features)
        self.bias = parameter(out_features) if bias else None
        self.register_buffer("norms", zeros(in_features))

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, bias: Tensor | None, products: Tensor, *, directions: int) -> Self:
        """For weight [V, d] and bias [V]; products [d, d] is proportional to E[h h^T].

        Raises ValueError unless `directions` is a whole number from 1 to d.
        """
        whole_up_to("directions", directions, 1, weight.shape[1], FEATURES)
        head = cls(weight.shape[1], weight.shape[0], directions, bias is not None, name_of(weight.dtype))
        head = head.to(weight.device)
        basis = torch.linalg.eigh(products.double()).eigenvectors.flip(1).float()
        head.basis.copy_(basis)
        for rows, into in zip(weight.split(4096), head.columns.split(4096, 1), strict=True):
            into.copy_((rows.float() @ basis).T)
        head.norms.copy_(head.columns.float().norm(dim=1))
        if head.bias is not None and bias is not None:
            head.bias.copy_(bias)
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        if not hidden.numel():
            return hidden.new_empty(*hidden.shape[:-1], self.out_features)
        coordinates = hidden.reshape(-1, self.in_features) @ self.basis
        chosen = (coordinates.abs() * self.norms).topk(self.directions).indices
        logits = torch.stack([t[i] @ self.columns[i] for t, i in zip(coordinates, chosen, strict=True)])
        if self.bias is not None:
            logits = logits + self.bias
        return logits.reshape(*hidden.shape[:-1], -1)

    def bytes_per_step(self, batch: int = 1) -> int:
        unread = self.in_features - batch * self.directions  # rows of `columns`; a batch may read some twice
        return super().bytes_per_step(batch) - unread * self.out_features * self.columns.element_size()
