"""Every operation on every backend against its definition in plain torch, in float64 and float32."""

import inspect
import logging

import pytest
import torch

from logitproc import ops
from logitproc.ops import cpu, dispatch, native, reference

WIDTHS = (1, 2, 17, 1000, 7919, 151_936)


def random_scores(rows, width, seed=0, forbidden=0.1):
    """Like logits: of any size, some -inf, never all of a row."""
    random = torch.Generator().manual_seed(seed)
    scores = 5 * torch.randn(rows, width, generator=random)
    scores[torch.rand(rows, width, generator=random) < forbidden] = -torch.inf
    scores[:, 0] = 1.0
    return scores


def nll_case(rows, width):
    return random_scores(rows, width), torch.randint(0, width, (rows,), generator=torch.Generator().manual_seed(1))


# op -> (rows, width) -> arguments
CASES = {"nll": nll_case}
NO_KERNEL = {"plausible"}
ELSEWHERE = {"divergences", "within_budget"}  # in test_distributions.py


def as_float64(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def test_every_operation_has_a_case():
    defined = {name for name, _ in inspect.getmembers(reference, inspect.isfunction) if name in ops.__all__}
    assert defined == set(CASES) | NO_KERNEL | ELSEWHERE


@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("name", CASES)
def test_the_cpu_kernel_is_as_close_to_float64_as_plain_torch(name, rows, width):
    arguments = CASES[name](rows, width)
    exact = getattr(ops, name)(*map(as_float64, arguments))
    with ops.backend("reference"):
        plain = getattr(ops, name)(*arguments)
    fast = getattr(cpu, name)(*arguments)
    finite = exact.isfinite()
    assert torch.equal(fast[~finite].double(), exact[~finite])
    error = lambda found: (found.double() - exact)[finite].abs().max().item() if finite.any() else 0.0
    assert fast.shape == plain.shape and error(fast) <= error(plain) + 2e-5


@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
def test_a_row_does_not_depend_on_the_rows_beside_it_or_on_threads():
    scores, target = nll_case(9, 50_000)
    together = ops.nll(scores, target)
    assert torch.equal(together, torch.cat([ops.nll(scores[i : i + 1], target[i : i + 1]) for i in range(9)]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(ops.nll(scores, target), together)
    finally:
        torch.set_num_threads(threads)


def test_strided_rows_are_read_as_they_stand():
    scores, target = nll_case(4, 300)
    assert torch.equal(ops.nll(scores[:, ::3], target % 100), ops.nll(scores[:, ::3].contiguous(), target % 100))


# --- which backend ---


@pytest.fixture
def spied(monkeypatch):
    """The CPU kernel of `nll`, counting its calls."""
    calls = []
    monkeypatch.setattr(cpu, "nll", lambda *a: calls.append(a) or torch.zeros(len(a[0])))
    dispatch._find.cache_clear()
    yield calls
    dispatch._find.cache_clear()


@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
def test_auto_takes_the_kernel_and_reference_does_not(spied):
    arguments = nll_case(2, 10)
    ops.nll(*arguments)
    with ops.backend("reference"):
        ops.nll(*arguments)
    assert len(spied) == 1


@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
def test_other_dtypes_and_gradients_run_in_plain_torch(spied):
    scores, target = nll_case(2, 10)
    ops.nll(scores.double(), target)
    ops.nll(scores.requires_grad_(), target).sum().backward()
    assert not spied and scores.grad is not None


def test_tensors_of_another_device_run_in_plain_torch(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "unavailable", lambda name: "")
    monkeypatch.setattr(dispatch, "_find", lambda home, name: pytest.fail(f"asked {home} for a tensor on a CPU"))
    scores, target = nll_case(2, 10)
    with ops.backend("triton"):
        found = ops.nll(scores, target)
    assert torch.equal(found, torch.nn.functional.cross_entropy(scores, target, reduction="none"))


def test_compile_runs_the_plain_definition_through_torch_compile(monkeypatch, spied):
    made = []
    monkeypatch.setattr(torch, "compile", lambda f: made.append(f.__name__) or f)
    dispatch._compiled.cache_clear()
    arguments = nll_case(2, 10)
    with ops.backend("compile"):
        found = [ops.nll(*arguments) for _ in range(2)]
    dispatch._compiled.cache_clear()
    assert made == ["nll"] and not spied
    assert torch.equal(found[1], torch.nn.functional.cross_entropy(*arguments, reduction="none"))


@pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")
def test_what_torch_compile_makes_gives_the_same_numbers():
    scores, target = nll_case(3, 50)
    with ops.backend("compile"):
        found = ops.nll(scores, target)
    torch.testing.assert_close(found, ops.nll(scores, target))


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    dispatch.unavailable.cache_clear()
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: (there is no CUDA|the package triton)"):
        with ops.backend("triton"):
            pass
    dispatch.unavailable.cache_clear()
    with pytest.raises(ValueError, match="backend"):
        with ops.backend("cuda"):
            pass


def test_without_a_compiler_there_is_one_line_and_plain_torch(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (native.load, cpu.library, dispatch.unavailable, dispatch._can_run, dispatch._find):
        cached.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="logitproc"):
            scores, target = nll_case(2, 10)
            found = [ops.nll(scores, target) for _ in range(2)]
        assert torch.equal(found[0], torch.nn.functional.cross_entropy(scores, target, reduction="none"))
        assert 1 <= len(caplog.records) <= 2 and "cpu.cpp" in caplog.text
    finally:
        for cached in (native.load, cpu.library, dispatch.unavailable, dispatch._can_run, dispatch._find):
            cached.cache_clear()
