"""Which implementation of an operation runs: plain torch, C++ on a CPU, or Triton on a GPU."""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, get_args, overload

import torch
from torch import Tensor

from ..checks import one_of

Backend = Literal["auto", "reference", "compile", "cpu", "triton"]
Operation = TypeVar("Operation", bound=Callable[..., Any])
_chosen: ContextVar[Backend] = ContextVar("backend", default="auto")

logger = logging.getLogger(__name__)


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Run operations on one backend within the `with` block, in this thread.

    "auto", the default outside, takes "cpu" (C++) for tensors on a CPU and "triton" for those on a GPU, and
    "reference" (plain torch) where these have no kernel or cannot run; the latter is logged once. "compile" is
    `torch.compile` of the plain definitions, on any device: the first call of each takes seconds to a minute, and
    fails where torch finds no compiler. "cpu" or "triton" that was asked for and cannot run raises RuntimeError here;
    an operation for which it has no kernel, or on tensors of another device, runs in plain torch.
    """
    one_of("backend", name, get_args(Backend))
    if name in ("cpu", "triton") and (reason := unavailable(name)):
        raise RuntimeError(f"backend={name!r} cannot run: {reason}; use 'auto' or 'reference'.")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


@functools.cache
def unavailable(name: Literal["cpu", "triton"]) -> str:
    """Why a backend cannot run here; empty where it can."""
    if name == "cpu":
        from . import cpu

        return "" if cpu.library() else "its C++ source could not be compiled (see the log)"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no CUDA device"
    return ""


@overload
def op(reference: Operation) -> Operation: ...
@overload
def op(*, half: bool) -> Callable[[Operation], Operation]: ...
def op(reference: Any = None, *, half: bool = False) -> Any:
    """Make a function of plain torch an operation: a kernel of the same name in `cpu` or `triton` may replace it.

    The first argument is a tensor, which decides. Kernels take float32, with `half` also half precision, and no
    gradients; what they decline by returning NotImplemented runs in plain torch too.
    """
    if reference is None:
        return functools.partial(op, half=half)
    name, dtypes = reference.__name__, (torch.float32, *((torch.bfloat16, torch.float16) if half else ()))

    @functools.wraps(reference)
    def run(*args: Any, **kwargs: Any) -> Any:
        chosen = _chosen.get()
        if chosen == "compile":
            plain = reference if torch.compiler.is_compiling() else _compiled(reference)
            return plain(*args, **kwargs)
        kernel = _kernel(chosen, name, args[0]) if args[0].dtype in dtypes else None
        result = NotImplemented if kernel is None else kernel(*args, **kwargs)
        return reference(*args, **kwargs) if result is NotImplemented else result

    return run


def _kernel(chosen: Backend, name: str, like: Tensor) -> Any:
    if chosen == "reference" or type(like) is not Tensor:
        return None  # a subclass of Tensor, such as FakeTensor, may have no memory to read
    if like.requires_grad and torch.is_grad_enabled():
        return None
    home = "cpu" if like.is_cpu else "triton" if like.is_cuda else None
    wanted = home if chosen == "auto" else chosen
    interpreted = wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"  # there, on a CPU
    return None if wanted is None or (wanted != home and not interpreted) else _find(wanted, name)


@functools.cache
def _compiled(reference: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(reference)


@functools.cache
def _find(home: Literal["cpu", "triton"], name: str) -> Any:
    return getattr(importlib.import_module(f".{home}", __package__), name, None) if _can_run(home) else None


@functools.cache
def _can_run(name: Literal["cpu", "triton"]) -> bool:
    reason = unavailable(name)
    if reason:
        logger.warning("operations on %s tensors run in plain torch: %s", name.replace("triton", "CUDA"), reason)
    return not reason
