"""Output heads: modules [..., d] -> [..., V] that take the place of a model's `lm_head`.

A head is described by plain numbers (`spec`), which give its tensors their shapes, and by its `state_dict`. From
the two, everything else follows: saving, loading, conversion, and what it costs.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..registry import unknown

KINDS: "dict[str, type[Head]]" = {}  # every class that has a kind, by its name

_SAMPLED_ROWS = 256


class Head(nn.Module):
    """Base of every head. `kind` is its registered name; a subclass is registered because it has one.

    in_features, out_features    d and V
    guarantee                    "none", or "top-m": what the head proves about its output, see `ExactHead`
    spec                         the arguments of `__init__`, which make a head of the same shapes
    source                       fingerprint of the weights it stands for, "" when nobody knows

    A head returns logits in the dtype of the hidden states. No tensor of it is called `weight` unless it is the
    model's own matrix: transformers would tie it to the input embedding.
    """

    kind: ClassVar[str] = ""
    guarantee: str = "none"

    in_features: int
    out_features: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("kind"):
            KINDS[cls.kind] = cls

    def __init__(self, in_features: int, out_features: int, **shape: Any):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.spec = {"in_features": in_features, "out_features": out_features, **shape}
        self.source = ""

    @staticmethod
    def empty(kind: str, spec: dict[str, Any], source: str = "") -> "Head":
        """A head of that kind whose tensors hold zeros, to be filled by `load_state_dict`."""
        if kind not in KINDS:
            raise unknown("kind of head", kind, KINDS)
        head = KINDS[kind](**spec)
        head.source = source
        return head

    @contextlib.contextmanager
    def covering(self, model: Any, kwargs: dict[str, Any]) -> Iterator[None]:
        """Surrounds `model.generate(**kwargs)`: a head that proves only a part of its output checks the call here."""
        yield

    def num_float_params(self) -> int:
        """Numbers that the head stores as floats; a token's code is an integer and not counted."""
        return sum(t.numel() for t in self.state_dict().values() if t.is_floating_point())

    def bytes_per_step(self, batch: int = 1) -> int:
        """Bytes that must be read or written for `batch` hidden states: all tensors, the states, the logits."""
        return sum(t.nbytes for t in self.state_dict().values()) + batch * self._row_bytes()

    def _row_bytes(self) -> int:
        width = next(t.element_size() for t in self.state_dict().values() if t.is_floating_point())
        return width * (self.in_features + self.out_features)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.spec.items())


class DenseHead(Head):
    """The model's own head, z = W h + beta, as a `Head`: the reference of every comparison."""

    kind = "dense"
    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False, dtype: str = "float32"):
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)
        self.weight = nn.Parameter(zeros(out_features, in_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """A head that shares these tensors: weight [V, d], bias [V]."""
        with torch.device("meta"):
            head = cls(weight.shape[1], weight.shape[0], bias is not None, name_of(weight.dtype))
        head.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            head.bias = nn.Parameter(bias.detach(), requires_grad=False)
        head.source = fingerprint(weight)
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight, self.bias)


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """c tanh(z / c), what Gemma 2 makes of its head's logits z, in their dtype; z for no cap."""
    return logits if cap is None else (logits / cap).tanh() * cap


def zeros(*shape: int, dtype: str | torch.dtype = "float32") -> Tensor:
    return torch.zeros(*shape, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def fingerprint(weight: Tensor) -> str:
    """SHA-256 of the shape and of up to 256 evenly spaced rows, in float32: the same in every dtype that holds them.

    Enough to tell models apart, not to tell a row that was edited.
    """
    step = max(1, weight.shape[0] // _SAMPLED_ROWS)
    rows = weight[::step].to("cpu", torch.float32).contiguous()
    return hashlib.sha256(str(tuple(weight.shape)).encode() + rows.numpy().tobytes()).hexdigest()
