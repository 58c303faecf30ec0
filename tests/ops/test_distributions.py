"""Kernels that work on several score tensors: each against its definition in plain torch, in float64 and float32."""

import functools
import math
import shutil
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from logitproc import ops
from logitproc.methods import aligndistil, fusion

INF = math.inf
SHAPES = ((0, 5), (1, 1), (5, 3), (2, 2100), (3, 7919), (1, 151_936))
CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:divide by zero:RuntimeWarning")


class Backend(NamedTuple):
    name: str
    device: str
    slow: bool


@pytest.fixture(
    params=[
        pytest.param(
            Backend("cpu", "cpu", False),
            marks=pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
        ),
        pytest.param(
            Backend("triton", "cpu", True), marks=pytest.mark.skipif(CUDA, reason="there is a CUDA device")
        ),
        pytest.param(
            Backend("triton", "cuda", False),
            marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")],
        ),
    ],
    ids=["cpu", "interpreter", "cuda"],
)
def backend(request):
    if request.param.name == "triton":
        pytest.importorskip("triton", reason="the package triton is not installed")
    with ops.backend(request.param.name):
        yield request.param


def rows(count: int, width: int, number: int, forbidden: float = 0.0, seed: int = 0) -> list[Tensor]:
    """Host, small model, and others near the small one; where some tokens are forbidden, the first never is."""
    random = torch.Generator().manual_seed(seed)
    noise = lambda: torch.randn(count, width, generator=random)
    host = 3 * noise()
    small = host + noise()
    found = [host, small, *(small + 0.7 * noise() for _ in range(number - 2))]
    for scores in found if forbidden else []:
        scores[:, 1:][torch.rand(count, width - 1, generator=random) < forbidden] = -INF
    return found


def newton(*scores: Tensor, target: str = "J") -> tuple[Tensor, ...]:
    return fusion.fuse_one(*scores, None, target, 0.0, 2.0, 12)


def grid(*scores: Tensor) -> tuple[Tensor, ...]:
    return fusion.fuse_one(*scores, range(21), "J", 0.0, 2.0, 12)


def match(host: Tensor, base: Tensor, *experts: Tensor, kind: str = "level", centre: float = 0.0) -> tuple[Tensor, ...]:
    weights = torch.linspace(1, 2, len(experts), dtype=host.dtype, device=host.device)
    weights = (weights / weights.sum()).expand(len(host), -1)
    return fusion.fuse_match(host, base, experts, weights, [(0.0, 1.2)], kind, 1e-2, centre, 32)


def mixture(host: Tensor, base: Tensor, *experts: Tensor) -> Tensor:
    alphas, betas = (0.5, 0), (0, 0.3)
    log_w = torch.linspace(-2, 2, 1 + 4 * len(experts), dtype=host.dtype)
    log_w[2] = -INF
    return fusion.mixture(host, base, experts, alphas, betas, log_w.expand(len(host), -1))


def log_likelihoods(host: Tensor, base: Tensor, *experts: Tensor) -> Tensor:
    return fusion.log_likelihoods(host, base, experts, (1.5,), (0.3, 0.6), base.argmax(-1))


def teacher(**options):
    return lambda *scores: aligndistil.teacher(*scores[:2], scores[-1 if len(scores) > 2 else 0], **options)


def within_budget(scores: Tensor, others: Tensor) -> Tensor:
    change = torch.where(scores > -INF, others - scores, 0.0).nan_to_num(neginf=-INF, nan=0.0)
    return ops.within_budget(scores, 3 * change, 0.3)


# operation -> (how many score tensors it takes, a call of it)
CASES: dict[str, Any] = {
    "newton R": (3, functools.partial(newton, target="R")), "newton F": (3, functools.partial(newton, target="F")),
    "newton J": (3, newton), "grid": (3, grid),
    "match": (3, match), "match of three": (5, match), "match of four": (6, functools.partial(match, centre=1.0)),
    "match shift": (4, functools.partial(match, kind="shift")),
    "mixture": (3, mixture), "mixture of two": (4, mixture), "log_likelihoods": (4, log_likelihoods),
    "teacher": (2, teacher()), "teacher of three": (3, teacher(r=2.0, tvd_units="code", clamp=(0.1, 1.5))),
    "teacher masked": (3, teacher(coefficient=1.5, plausibility=0.1)),
    "teacher without anchor": (2, teacher(coefficient=1.0, anchor_weight=0.0, plausibility=0.1)),
    "teacher capped": (3, teacher(coefficient=2.0, kl_cap=0.2)),
    "within_budget": (2, within_budget),
    "divergences": (2, lambda *scores: ops.divergences(*scores)),
    "nll": (2, lambda *scores: ops.nll(scores[0].to(scores[1].dtype), scores[1].argmax(-1))),
}  # fmt: skip
TOLERANCE = {"divergences": 1e-12, "teacher capped": 5e-5, "within_budget": 5e-5}  # budgets are met from below


def differences(found, exact) -> list[Tensor]:
    """What each tensor of a result differs by where the exact one is finite; elsewhere they must be equal."""
    worst = []
    for ours, truth in zip(found, exact, strict=True):
        assert ours.shape == truth.shape
        ours, truth = ours.double(), truth.double()
        finite = truth.isfinite()
        assert torch.equal(ours[~finite].nan_to_num(7.0), truth[~finite].nan_to_num(7.0))
        worst.append((ours - truth)[finite].abs())
    return worst


def as_tuple(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize("forbidden", (0.0, 0.1))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_as_close_to_float64_as_plain_torch(name, shape, forbidden, backend):
    if backend.slow and shape[1] > 3000:
        pytest.skip("the interpreter is slow")
    number, call = CASES[name]
    scores = [x.to(backend.device) for x in rows(*shape, number, forbidden)]
    before = [x.clone() for x in scores]
    exact = as_tuple(call(*(x.double() for x in scores)))
    with ops.backend("reference"):
        plain = as_tuple(call(*scores))
    fast = as_tuple(call(*scores))
    for found, allowed in zip(differences(fast, exact), differences(plain, exact), strict=True):
        if len(found):
            assert found.max() <= 2 * allowed.max() + TOLERANCE.get(name, 1e-5)
    assert all(map(torch.equal, scores, before))


@pytest.mark.parametrize("name", CASES)
def test_a_row_depends_on_nothing_beside_it_nor_on_strides(name, backend):
    number, call = CASES[name]
    scores = [x.to(backend.device) for x in rows(3, 50 if backend.slow else 60_000, number, 0.1)]
    together = as_tuple(call(*scores))
    for i in range(3):
        alone = as_tuple(call(*(x[i : i + 1] for x in scores)))
        assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, together, strict=True))
    for strided in ([torch.stack([x, x + 1], -1)[..., 0] for x in scores],
                    [torch.cat([x, x], -1)[:, : x.shape[1]] for x in scores]):  # fmt: skip
        assert not strided[0].is_contiguous() and all(map(torch.equal, as_tuple(call(*strided)), together))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", CASES)
def test_the_number_of_threads_changes_nothing(name):
    number, call = CASES[name]
    scores, threads = rows(5, 60_000, number, 0.1), torch.get_num_threads()
    together = as_tuple(call(*scores))
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, as_tuple(call(*scores)), together))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_rows_with_next_to_nothing_in_common(name, backend):
    number, call = CASES[name]
    scores = [torch.randn(6, 9, generator=torch.Generator().manual_seed(i)) for i in range(number)]
    for i, x in enumerate(scores):
        x[0] = -INF  # nothing left
        x[1, i::number] = -INF
        x[2] = -1e30  # a mask, and too large for exp
        x[3, 1:] = -INF
        x[4, i:] = -1e38 if i else -INF
    scores[0][5] = scores[1][5]
    scores[-1][5] = scores[1][5] + 7
    scores = [x.to(backend.device) for x in scores]
    with ops.backend("reference"):
        plain = as_tuple(call(*scores))
    fast = as_tuple(call(*scores))
    assert torch.equal(fast[0] == -INF, plain[0] == -INF)
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("name", [name for name in CASES if name != "nll"])
def test_what_a_kernel_cannot_read_runs_in_plain_torch(name, backend):
    number, call = CASES[name]
    scores = [x.to(backend.device) for x in rows(2, 9, number)]
    expected = as_tuple(call(*scores))
    other = as_tuple(call(*scores[:-1], scores[-1].double()))
    for ours, theirs in zip(other, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, check_dtype=False)
    with pytest.raises(RuntimeError):
        call(*scores[:-1], scores[-1][:, :5])


def test_an_expert_that_equals_its_base_leaves_the_host_bit_for_bit(backend):
    host, base = (x.to(backend.device) for x in rows(3, 1021, 2))
    for expert in (base, base + 7):
        scores, alpha, *_, dead = newton(host, base, expert)
        assert torch.equal(scores, host) and dead.all() and not alpha.any()


def test_bounds_are_reached_exactly_and_said(backend):
    host, base = (x.to(backend.device) for x in rows(3, 1021, 2))
    scores, alpha, _, _, beyond, _ = fusion.fuse_one(host, base, base + 3 * (base - host), None, "J", 0.0, 0.5, 12)
    assert (alpha == 0.5).all() and beyond.all()
    torch.testing.assert_close(scores.softmax(-1), (host + 1.5 * (base - host)).softmax(-1))
    alpha, beyond = fusion.fuse_one(host, base, base + 0.1 * (base - host), None, "J", 1.5, 2.0, 12)[1::3]
    assert (alpha == 1.5).all() and not beyond.any()


def test_hard_rows_are_matched_as_well_as_in_plain_torch(backend):
    host, base, *experts = rows(32, 300, 4)
    host[:, 7] += 20  # holds nearly all
    experts = [base + 8 * (expert - base) for expert in experts]
    experts[0][:, 5] += 30
    host, base, *experts = (x.to(backend.device) for x in (host, base, *experts))
    d = torch.stack([expert - base for expert in experts], 1).double()
    aim = torch.stack([expert.double().softmax(-1) for expert in experts]).mean(0)

    def loss(alpha: Tensor) -> Tensor:
        fused = host + (alpha.double()[:, :, None] * d).sum(1)
        return (aim * (aim.log() - fused.log_softmax(-1))).sum(-1) + 1e-3 / 2 * alpha.square().sum(-1)

    fast = fusion.fuse(host, base, experts, "match").alpha
    with ops.backend("reference"):
        plain = fusion.fuse(host, base, experts, "match").alpha
    assert (loss(fast) - loss(plain)).abs().max() < 1e-5
    assert (loss(fast) < loss(torch.zeros_like(fast))).all()


def test_small_divergences_keep_their_digits(backend):
    base = rows(1, 5000, 2)[0].to(backend.device)
    for size in (1e-1, 1e-3, 1e-5):
        processed = base + size * torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)).to(base.device)
        with ops.backend("reference"):
            exact = ops.divergences(base, processed)
        for found, truth in zip(ops.divergences(base, processed)[:4], exact, strict=False):
            torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-15)
    assert [x.item() for x in ops.divergences(base, base)[:4]] == [0.0] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_more_scores_than_an_int32_counts(name):
    number, call = CASES[name]
    few = [x.cuda() for x in rows(2, 151_936, number)]
    copies = 2**31 // (2 * 151_936) + 1
    for part, expected in zip(as_tuple(call(*(x.repeat(copies, 1) for x in few))), as_tuple(call(*few)), strict=True):
        assert torch.equal(part[-2:], expected)
