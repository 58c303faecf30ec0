"""Compile every Triton kernel for a GPU, which need not be there: its interpreter does not see errors of types.

A kernel is compiled for the arguments of each call instead of being launched.
"""

import importlib
import inspect
import pkgutil

import numpy as np
import test_distributions
import test_history
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from logitproc import ops
from logitproc.heads.planes import Planes, round_states, scores
from logitproc.methods.suppression import PhraseIndex
from logitproc.ops import dispatch
from logitproc.ops import triton as kernels

TARGET = GPUTarget("cuda", 80, 32)
TYPES = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
    torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8",
    torch.bool: "*i1",
}  # fmt: skip
compiled: set[str] = set()


def compile_for(kernel: JITFunction, *args, **kwargs) -> None:
    given = kernel.signature.bind(*args, **kwargs).arguments
    types, constants = {}, {}
    for place, parameter in enumerate(kernel.params):
        value = given.get(parameter.name)
        if parameter.is_constexpr or value is None:
            types[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = TYPES[value.dtype]
        else:
            types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    assert "cubin" in triton.compile(ASTSource(kernel, types, constants), target=TARGET).asm
    compiled.add(f"{kernel.__module__}.{kernel.__name__}")


def calls() -> None:
    """Every operation that has a kernel, with its usual options; results mean nothing."""
    for name in ("newton J", "mixture", "log_likelihoods", "teacher", "teacher masked", "divergences", "nll"):
        count, call = test_distributions.CASES[name]
        call(*test_distributions.rows(2, 5000, count))
    for name, (rule, made, options) in test_history.RULES.items():
        if name != "clip":
            for factor in (None, torch.rand(4, 1)):
                ops.add_ngrams(*test_history.case(rule, 50, 64, 4, 3, **made), factor, **options)
    ops.loop_guard(*test_history.loop_case(), *test_history.DRY)
    texts = np.random.default_rng(0).integers(0, 4, (50, 9))
    index = PhraseIndex(texts, 30, 1, 4, 2, True, breakers=(3,), silent=(1,))
    some = torch.from_numpy(texts[:25, :4])
    kernels.lower_phrases(torch.randn(25, 37), some, torch.full((25,), 3), index, torch.rand(4))
    codes, mapping = torch.randn(2, 8, dtype=torch.bfloat16), torch.zeros(2, 50, dtype=torch.int32)
    kernels.spread(codes, mapping[:1])
    kernels.spread(codes, mapping, torch.randn(50), torch.randn(2, 50, dtype=torch.bfloat16))
    planes, states = Planes.of(torch.randn(40, 200)), round_states(torch.randn(2, 200))
    scores(planes, "high", states)
    scores(planes, "low", states, torch.arange(3))


def main() -> None:
    JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: compile_for(kernel, *args, **kwargs)
    dispatch._kernel = lambda chosen, name, like: getattr(kernels, name, None)  # for tensors on a CPU, too
    calls()
    everything = {
        f"{module.__name__}.{name}"
        for module in (importlib.import_module(found.name) for found in pkgutil.iter_modules(
            kernels.__path__, f"{kernels.__name__}."))
        for name, _ in inspect.getmembers(module, lambda member: isinstance(member, JITFunction))
        if name.endswith("_kernel")
    }  # fmt: skip
    assert compiled == everything, everything - compiled
    print(f"compiled {len(compiled)} kernels")


if __name__ == "__main__":
    main()
