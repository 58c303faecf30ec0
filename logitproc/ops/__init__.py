"""Operations on scores that decide what a method costs. Each is defined in plain torch under `dispatch.op`, in
`reference` and `history` or in the file of the one method that needs it, where its formula is read; `cpu` (C++) and
`triton` (CUDA) hold faster kernels of the same names, checked against it; `dispatch` picks."""

from .dispatch import backend
from .history import NGramBias, NGramTable, add_ngrams, loop_guard
from .reference import divergences, nll, plausible, within_budget

__all__ = [
    "NGramBias", "NGramTable", "add_ngrams", "backend", "divergences", "loop_guard", "nll", "plausible",
    "within_budget",
]  # fmt: skip
