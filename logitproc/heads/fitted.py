"""Heads that were fitted to a text, as folders on disk."""

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..artifact import Artifact, kind_of
from .head import KINDS, Head


class FittedHead(Head, Artifact):
    """A head that `VQHead.fit` made; `save` and `load` keep it as a folder, bit for bit.

    tokenizer    as `describe_tokenizer` gives it
    about        how it was fitted, and what it cost on held-out text
    """

    tokenizer: dict[str, Any]
    about: dict[str, Any]

    def __init__(self, in_features: int, out_features: int, **shape: Any):
        super().__init__(in_features, out_features, **shape)
        self.tokenizer, self.about = {"vocab_size": out_features}, {}
        # The weights whose mean of rows each code is, and the bias that makes means of dense logits this head's
        # logits: what `VQLogitsProcessor` needs. None where codes are no means of rows.
        self.token_weights: Tensor | None = None
        self.token_bias: Tensor | None = None

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        tensors = {key: value.detach().cpu() for key, value in self.state_dict().items()}
        extra = {"token_weights": self.token_weights, "token_bias": self.token_bias}
        tensors |= {key: value.cpu() for key, value in extra.items() if value is not None}
        arrays = {key: _as_array(value) for key, value in tensors.items()}
        return {"spec": self.spec, "source": self.source, "about": self.about}, arrays

    @classmethod
    def _restore(cls, tokenizer: dict, scalars: dict, arrays: dict[str, np.ndarray]) -> Self:
        head: Any = Head.empty(cls.kind, scalars["spec"], scalars["source"])
        for key in ("token_weights", "token_bias"):
            if key in arrays:
                setattr(head, key, torch.from_numpy(arrays.pop(key)))
        types = {key: value.dtype for key, value in head.state_dict().items()}
        head.load_state_dict({key: _as_tensor(value, types[key]) for key, value in arrays.items()})
        head.tokenizer, head.about = tokenizer, scalars["about"]
        return head

    @classmethod
    def load(cls, folder: str | Path, base: Path | None = None) -> Any:
        """Read a saved head of any kind; errors as `Artifact.load`."""
        kind = kind_of(folder, base)
        found = KINDS.get(kind)
        if found is None or not issubclass(found, FittedHead):
            raise ValueError(f"{folder} holds a {kind!r}, not a fitted head.")
        return super(FittedHead, found).load(folder, base)


def _as_array(tensor: Tensor) -> np.ndarray:
    return (tensor.view(torch.uint16) if tensor.element_size() == 2 else tensor).numpy()


def _as_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    if dtype in (torch.bfloat16, torch.float16):  # stored as bits
        return torch.from_numpy(array.astype(np.uint16)).view(dtype)
    return torch.from_numpy(array).to(dtype)
