"""Kernels for CUDA tensors, in Triton, with the names and arguments of the operations.

Triton's interpreter runs them on a CPU where TRITON_INTERPRET=1 was set before triton was imported; so they are
tested. Their speed on a GPU is unmeasured.
"""

from .aligndistil import extrapolated
from .divergences import divergences, nll
from .fusion import fuse_one, log_likelihoods, mixture
from .heads import plane_scores, spread
from .history import add_ngrams, loop_guard, lower_phrases

__all__ = [
    "add_ngrams", "divergences", "extrapolated", "fuse_one", "log_likelihoods", "loop_guard", "lower_phrases",
    "mixture", "nll", "plane_scores", "spread",
]  # fmt: skip
