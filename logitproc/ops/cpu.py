"""Kernels for tensors on a CPU: the C++ sources behind functions with the names and arguments of `reference` and
`history`."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import native


@functools.cache
def library() -> Any:
    """`cpu.cpp`; None where it cannot be compiled."""
    return native.load(Path(__file__).with_name("cpu.cpp"))


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Run a function of `cpu.cpp`. Tensors must be contiguous; the number of threads comes last."""
    kernel = getattr(library(), name)
    kernel(*map(_as_c, arguments), ctypes.c_int64(torch.get_num_threads()))


def _as_c(value: Tensor | int | float | None) -> Any:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)


def nll(scores: Tensor, target: Tensor) -> Tensor:
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < scores.shape[1]:
        return NotImplemented  # torch says what is wrong
    scores, out = scores.contiguous(), scores.new_empty(len(scores))
    call("nll", scores, target.contiguous(), out, *scores.shape)
    return out
