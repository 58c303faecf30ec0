"""Kernels for tensors on a CPU: the C++ sources behind functions with the names and arguments of the operations."""

import ctypes
import functools
from collections.abc import Sequence
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


def rows_of(like: Tensor, *others: Tensor) -> list[Tensor] | None:
    """All tensors as contiguous rows; None unless they are float32 tensors of one shape that need no gradient."""
    for other in others:
        if other.shape != like.shape or other.dtype != like.dtype or other.device != like.device:
            return None
        if type(other) is not Tensor or (other.requires_grad and torch.is_grad_enabled()):
            return None
    return [tensor.contiguous() for tensor in (like, *others)]


def nll(scores: Tensor, target: Tensor) -> Tensor:
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < scores.shape[1]:
        return NotImplemented  # torch says what is wrong
    scores, out = scores.contiguous(), scores.new_empty(len(scores))
    call("nll", scores, target.contiguous(), out, *scores.shape)
    return out


def newton(
    host: Tensor, base: Tensor, expert: Tensor, target: str, low: float, high: float, steps: int
) -> tuple[Tensor, ...]:
    given = rows_of(host, base, expert)
    if given is None or not host.shape[1]:
        return NotImplemented
    out, numbers = torch.empty_like(given[0]), host.new_empty(3, len(host))
    flags = torch.empty(2, len(host), dtype=torch.bool)
    call("newton", *given, out, *numbers, *flags, *host.shape, ord(target), float(low), float(high), steps)
    alpha, kl, reverse_kl = numbers[:, :, None]
    return out, alpha, kl, reverse_kl, flags[0], flags[1, :, None]


def mixture(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], alphas: Sequence[float], betas: Sequence[float],
    log_weights: Tensor,
) -> Tensor:  # fmt: skip
    if log_weights.dtype != torch.float32 or log_weights.shape[1] != 1 + len(experts) * (len(alphas) + len(betas)):
        return NotImplemented
    return _mixture("mixture", host, base, experts, alphas, betas, log_weights, torch.empty(host.shape))


def log_likelihoods(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], alphas: Sequence[float], betas: Sequence[float],
    tokens: Tensor,
) -> Tensor:  # fmt: skip
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < host.shape[1]:
        return NotImplemented  # torch says what is wrong
    out = torch.empty(len(host), 1 + len(experts) * (len(alphas) + len(betas)))
    return _mixture("log_likelihoods", host, base, experts, alphas, betas, tokens, out)


def _mixture(
    name: str, host: Tensor, base: Tensor, experts: Sequence[Tensor], alphas: Sequence[float],
    betas: Sequence[float], about_rows: Tensor, out: Tensor,
) -> Tensor:  # fmt: skip
    given = rows_of(host, base, *experts)
    if given is None or not host.shape[1] or len(about_rows) != len(host):
        return NotImplemented
    pointers = torch.tensor([expert.data_ptr() for expert in given[2:]])
    numbers = [torch.tensor(values, dtype=torch.float32) for values in (alphas, betas)]
    call(name, *given[:2], pointers, *numbers, about_rows.contiguous(), out, *host.shape, len(experts),
         len(alphas), len(betas))  # fmt: skip
    return out
