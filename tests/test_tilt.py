"""Tilts against divergences computed directly, their shape, and the solvers against search."""

import math

import pytest
import torch
from torch import Tensor

from logitproc import tilt

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-9}


def family(rows: int = 6, width: int = 200, count: int = 1, seed: int = 0, spread: float = 1.0,
           dtype: torch.dtype = torch.float64) -> tilt.Family:  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(rows, width, generator=random, dtype=dtype)
    d = spread * torch.randn(rows, count, width, generator=random, dtype=dtype)
    return of(scores, d)


def of(scores: Tensor, d: Tensor) -> tilt.Family:
    log_w = scores - scores.amax(-1, keepdim=True)
    m = tilt.moments(log_w, d)
    return tilt.Family(log_w, m.log_z, d, m.mean)


def probabilities(f: tilt.Family, a: Tensor) -> Tensor:
    """ln P_a, a [rows, T]."""
    return (f.log_w + (a[:, :, None] * f.d).sum(1)).log_softmax(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return torch.where(log_a > -math.inf, log_a.exp() * (log_a - log_b), 0.0).sum(-1)


def direct(f: tilt.Family, a: Tensor) -> dict[str, Tensor]:
    moved, p = probabilities(f, a[:, None]), f.log_w.log_softmax(-1)
    found = {"R": kl(moved, p), "F": kl(p, moved)}
    return found | {"J": found["R"] + found["F"]}


def closed(f: tilt.Family, a: Tensor, target: str) -> Tensor:
    return tilt.divergence(f, target, a)[0]


def slope(f: tilt.Family, a: Tensor, target: str) -> Tensor:
    return tilt.divergence(f, target, a)[1]


def variance(f: tilt.Family) -> Tensor:
    return tilt.moments(f.log_w, f.d).variance[:, 0]


def root(f: tilt.Family, nats: Tensor, target: str, high: float = 2.0, steps: int = 12) -> tuple[Tensor, Tensor]:
    return tilt.root(f, variance(f), nats, target, high, steps)


def test_two_tokens_by_hand():
    # p = (1/2, 1/2), d = (0, 4), a = 1: P = (1, e^4) / (1 + e^4), so mu = 4 e^4 / (1 + e^4) = 3.9280552,
    # A = ln((1 + e^4) / 2) = 3.3250027, R = mu - A, F = A - 2.
    f = of(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[[0.0, 4.0]]], dtype=torch.float64))
    one = torch.ones(1, dtype=torch.float64)
    assert closed(f, one, "R").item() == pytest.approx(3.9280552 - 3.3250027, abs=1e-7)
    assert closed(f, one, "F").item() == pytest.approx(1.3250027, abs=1e-7)
    # R is not convex there: R'' = v + a k3 = -0.8071, here from differences of R'.
    h = 1e-5
    second = (slope(f, one + h, "R") - slope(f, one - h, "R")) / (2 * h)
    assert second.item() == pytest.approx(-0.8071, abs=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("a", (0.0, 0.3, 1.0, 2.0))
def test_closed_forms_are_the_divergences(dtype, a):
    f = family(dtype=dtype)
    a = torch.full((6,), a, dtype=dtype)
    exact = direct(tilt.Family(*(x.double() for x in f)), a.double())
    for target in "RFJ":
        torch.testing.assert_close(closed(f, a, target).double(), exact[target], rtol=DTYPES[dtype], atol=1e-6 if
                                   dtype is torch.float32 else 1e-9)  # fmt: skip
        assert (closed(f, a, target) >= 0).all()
    most = -f.log_w.double().log_softmax(-1).gather(-1, f.d[:, 0].argmax(-1, keepdim=True)).squeeze(-1)
    assert (closed(f, a, "R") <= most + 1e-6).all()


def test_moments_in_blocks_are_those_of_the_softmax(monkeypatch):
    f, a = family(6, 200), torch.full((6,), 0.7, dtype=torch.float64)
    scores = f.log_w.index_fill(1, torch.arange(40, 90), -math.inf)  # a block without a token
    whole = tilt.moments(scores, f.d, a)
    p = (scores + 0.7 * f.d[:, 0]).softmax(-1)
    mean = (p * f.d[:, 0]).sum(-1)
    torch.testing.assert_close(whole.log_z, (scores + 0.7 * f.d[:, 0]).logsumexp(-1))
    torch.testing.assert_close(whole.mean[:, 0], mean)
    torch.testing.assert_close(whole.variance[:, 0], (p * f.d[:, 0].square()).sum(-1) - mean.square())
    monkeypatch.setattr(tilt, "BLOCK", 6 * 16)
    assert len(tilt.blocks(scores)) == 13
    for one, other in zip(tilt.moments(scores, f.d, a), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_f_is_convex_and_slopes_are_derivatives():
    f = family(width=50)
    points = torch.linspace(0, 2, 41, dtype=torch.float64)
    values = torch.stack([closed(f, a.expand(6), "F") for a in points])
    assert (values[2:] - 2 * values[1:-1] + values[:-2] >= -1e-12).all()
    a, h = torch.full((6,), 0.8, dtype=torch.float64), 1e-5
    for target in "RFJ":
        difference = (closed(f, a + h, target) - closed(f, a - h, target)) / (2 * h)
        torch.testing.assert_close(slope(f, a, target), difference, rtol=1e-6, atol=1e-9)


# --- root ---


def bisected(f: tilt.Family, nats: Tensor, target: str, high: float = 2.0) -> Tensor:
    low, up = torch.zeros_like(nats), torch.full_like(nats, high)
    for _ in range(60):
        middle = (low + up) / 2
        less = closed(f, middle, target) < nats
        low, up = torch.where(less, middle, low), torch.where(less, up, middle)
    return low


def peaked(rows: int = 6) -> tilt.Family:
    """One token holds all but 1e-6."""
    f = family(rows, 100)
    scores = f.log_w.log_softmax(-1) + math.log(1e-6)
    scores[:, 7] = math.log(1 - 1e-6)
    return of(scores, f.d)


@pytest.mark.parametrize("target", ("R", "F", "J"))
@pytest.mark.parametrize("rows", ("usual", "wide", "three tokens", "peaked"))
def test_root_equals_bisection_and_flags_what_lies_beyond(target, rows):
    f = {"usual": family(), "wide": family(spread=5.0), "three tokens": family(512, 3, spread=6.0),
         "peaked": peaked()}[rows]  # fmt: skip
    wanted = torch.linspace(0.05, 2.5, len(f.log_w), dtype=torch.float64)
    nats = closed(f, wanted, target)
    found, beyond = root(f, nats, target)
    most = closed(f, torch.full_like(wanted, 2.0), target)
    within, outside = most >= nats, most < nats * (1 - 1e-6)
    torch.testing.assert_close(closed(f, found, target)[within], nats[within], rtol=1e-5, atol=1e-12)
    clear = within & (wanted * slope(f, wanted, target) > 1e-2 * nats)  # else R saturates, and many a are right
    assert clear.sum() > 0.4 * len(clear)
    torch.testing.assert_close(found[clear], bisected(f, nats, target)[clear], rtol=0, atol=1e-6)
    assert (found[outside] == 2.0).all() and beyond[outside].all() and not beyond[within].any()


@pytest.mark.parametrize("target", ("R", "F", "J"))
def test_more_iterations_do_not_move_a_row_that_has_converged(target):
    for dtype in DTYPES:
        f = family(64, dtype=dtype)
        nats = closed(f, torch.linspace(0.1, 1.9, 64, dtype=dtype), target)
        assert torch.equal(root(f, nats, target, steps=14)[0], root(f, nats, target, steps=40)[0])


def test_the_float32_root_is_near_the_exact_one():
    # The best that float32 sums allow: J needs no A, so it keeps more digits than R and F for small divergences.
    for nats, tolerance in ((1.0, {"J": 1e-5, "R": 2e-5, "F": 2e-5}), (1e-3, {"J": 1e-5, "R": 1e-3, "F": 1e-3})):
        exact = family(32, 4000, spread=1.0)
        rough = tilt.Family(*(x.float() for x in exact))
        for target, allowed in tolerance.items():
            goal = torch.full((32,), nats, dtype=torch.float64)
            difference = root(rough, goal.float(), target, 4.0)[0] - root(exact, goal, target, 4.0)[0]
            assert difference.abs().max() < allowed, (nats, target)


def test_the_root_scales_with_the_direction():
    f = family()
    nats = torch.full((6,), 0.2, dtype=torch.float64)
    for target in "RFJ":
        once = root(f, nats, target, 50.0)[0]
        twice = root(of(f.log_w, 2 * f.d), nats, target, 50.0)[0]
        torch.testing.assert_close(twice, once / 2, rtol=1e-8, atol=0)


# --- grid ---


def losses(f: tilt.Family, c1: Tensor, c2: Tensor, points: list[float]) -> Tensor:
    found = []
    for a in points:
        d = direct(f, torch.full_like(c1, a))
        found.append((d["R"] - c1).square() + (d["F"] - c2).square())
    return torch.stack(found, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", (0.03, 1.0, 8.0))
def test_grid_equals_a_loop_over_softmaxes(dtype, spread):
    f = family(64, spread=spread, dtype=dtype)
    exact = tilt.Family(*(x.double() for x in f))
    aims = torch.linspace(0.05, 2.3, 64, dtype=torch.float64)
    c1, c2 = direct(exact, aims)["R"], 1.1 * direct(exact, aims)["F"]
    for points in (range(21), range(3, 12)):
        table = losses(exact, c1, c2, [k / 10 for k in points])
        a, loss = tilt.grid(f, c1.to(dtype), c2.to(dtype), points)
        index = (a.double() * 10).round().long() - points[0]
        best = table.min(-1).values
        assert (table.gather(-1, index[:, None]).squeeze(-1) <= best * (1 + 1e-4) + 1e-9).all()
        if dtype is torch.float64:
            assert torch.equal(index, table.argmin(-1))
            torch.testing.assert_close(loss, best)


def test_a_grid_over_an_outlier_does_not_overflow():
    f = family(4, dtype=torch.float32)
    f.d[:, 0, 5] = 300.0  # a token that the expert adores and the host hardly knows
    f = of(f.log_w.index_fill(1, torch.tensor([5]), -80.0), f.d)
    a, loss = tilt.grid(f, torch.full((4,), 0.1), torch.full((4,), 0.1), range(21))
    assert a.isfinite().all() and (a <= 2).all() and not loss.isnan().any()


def test_ties_go_to_the_smallest_alpha():
    f = family(3)
    still = of(f.log_w, torch.zeros_like(f.d))
    zero = torch.zeros(3, dtype=torch.float64)
    assert tilt.grid(still, zero, zero, range(21))[0].tolist() == [0.0] * 3


def test_the_continuous_minimiser_lies_between_the_roots_and_is_no_worse_than_the_grid():
    f = family(16)
    aims = torch.linspace(0.2, 1.6, 16, dtype=torch.float64)
    c1, c2 = direct(f, aims)["R"], 1.3 * direct(f, aims)["F"]
    fine = [k / 1000 for k in range(2001)]
    table = losses(f, c1, c2, fine)
    best = torch.tensor(fine, dtype=torch.float64)[table.argmin(-1)]
    roots = torch.stack([root(f, c1, "R")[0], root(f, c2, "F")[0]])
    assert (best >= roots.amin(0) - 1e-3).all() and (best <= roots.amax(0) + 1e-3).all()
    on_grid, loss = tilt.grid(f, c1, c2, range(21))
    assert (table.amin(-1) <= loss + 1e-12).all()
    found = tilt.least(f, c1, c2, 0.0, 2.0, range(21), steps=30)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-3)
    inside = tilt.least(f, c1, c2, 0.35, 0.75, range(4, 8), steps=30)
    torch.testing.assert_close(inside, best.clamp(0.35, 0.75), rtol=0, atol=1e-3)
    # L' = 2 [(R - c1) a v + (F - c2)(mu - mu0)]
    a, h = torch.full((16,), 0.7, dtype=torch.float64), 1e-5
    by_hand = 2 * ((closed(f, a, "R") - c1) * slope(f, a, "R") + (closed(f, a, "F") - c2) * slope(f, a, "F"))
    numeric = (losses(f, c1, c2, [0.7 + h]) - losses(f, c1, c2, [0.7 - h])).squeeze(-1) / (2 * h)
    torch.testing.assert_close(by_hand, numeric, rtol=1e-6, atol=1e-8)


# --- match ---


def matched(f: tilt.Family, mean: Tensor, low: float = 0.0, high: float = 2.0, ridge: float = 1e-3, **more) -> Tensor:
    side = lambda x: torch.full_like(mean, x)
    return tilt.match(f, mean, side(low), side(high), ridge, more.pop("centre", 0.0), **more)


def objective(f: tilt.Family, a: Tensor, mean: Tensor, ridge: float) -> Tensor:
    tilted = f.log_w + (a[:, :, None] * f.d).sum(1)
    return tilted.logsumexp(-1) - (a * mean).sum(-1) + ridge / 2 * a.square().sum(-1)


@pytest.mark.parametrize("ridge", (1e-2, 1e-3))
def test_match_satisfies_the_conditions_of_a_minimum(ridge):
    f = family(64, 400, 4)
    aims = torch.rand(64, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 - 0.5
    mean = (probabilities(f, aims).exp()[:, None] * f.d).sum(-1)
    a = matched(f, mean, ridge=ridge)
    mu = (probabilities(f, a).exp()[:, None] * f.d).sum(-1)
    gradient = mu - mean + ridge * a
    inner = (a > 0) & (a < 2)
    assert inner.any() and (~inner).any()
    assert gradient[inner].abs().max() < 1e-5
    assert (gradient[a == 0] >= -1e-9).all() and (gradient[a == 2] <= 1e-9).all()
    for steps in range(1, 8):  # G never increases
        now, then = (objective(f, matched(f, mean, ridge=ridge, steps=s), mean, ridge) for s in (steps + 1, steps))
        assert (now <= then + 1e-9).all()


def test_match_recovers_the_alpha_of_a_tilt_also_in_float32():
    aims = torch.rand(16, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.3
    f = family(16, 300, 3)
    mean = (probabilities(f, aims).exp()[:, None] * f.d).sum(-1)
    torch.testing.assert_close(matched(f, mean, ridge=0.0), aims, rtol=0, atol=1e-6)
    rough = tilt.Family(*(x.float() for x in f))
    torch.testing.assert_close(matched(rough, mean.float(), ridge=0.0), aims.float(), rtol=0, atol=1e-4)


def may_gain(f: tilt.Family, a: Tensor, mean: Tensor, ridge: float, low: float = 0.0, high: float = 2.0) -> Tensor:
    """How far G, being convex, can at most lie above its minimum over the box, [rows]."""
    mu = (probabilities(f, a).exp()[:, None] * f.d).sum(-1)
    gradient = mu - mean + ridge * a
    return torch.maximum(gradient * (a - low), gradient * (a - high)).sum(-1)


def hard(kind: str, count: int) -> tilt.Family:
    """Rows that a whole step of Newton's overshoots by far; d is 0 at the best token, as `fusion` has it."""
    random = torch.Generator().manual_seed(3)
    scores = 3 * torch.randn(64, 100, generator=random, dtype=torch.float64)
    d = torch.randn(64, count, 100, generator=random, dtype=torch.float64)
    if kind == "wide":
        d *= 10
    elif kind == "peaked":  # one token holds all but 1e-6
        d *= 10
        scores = scores.log_softmax(-1) + math.log(1e-6)
        scores[:, 7] = 0.0
    else:  # a token that all experts adore and the host hardly knows
        d[:, :, 5] = 40 * torch.rand(64, count, generator=random, dtype=torch.float64)
        scores[:, 5] = scores.amin(-1) - 10
    return of(scores, d - d.gather(-1, scores.argmax(-1)[:, None, None].expand(-1, count, 1)))


@pytest.mark.parametrize("count", (1, 2, 4))
@pytest.mark.parametrize("kind", ("wide", "peaked", "outlier"))
def test_match_reaches_the_minimum_of_hard_rows(kind, count):
    f = hard(kind, count)
    aims = 3 * torch.rand(64, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    mean = (probabilities(f, aims).exp()[:, None] * f.d).sum(-1)
    for goal in (mean, f.mean + 1):
        exact = matched(f, goal, steps=200)
        assert may_gain(f, exact, goal, 1e-3).max() < 1e-6
        rough = matched(tilt.Family(*(x.float() for x in f)), goal.float()).double()
        for found in (matched(f, goal), rough):
            above = objective(f, found, goal, 1e-3) - objective(f, exact, goal, 1e-3)
            assert above.quantile(0.95) < 1e-7 and above.max() < (1e-5 if count < 4 else 1)


def test_match_with_the_same_direction_twice():
    for dtype in DTYPES:
        f = family(8, 300, dtype=dtype)
        mean = f.mean + 0.2
        once = matched(f, mean, ridge=0.0)
        twice = matched(f._replace(d=f.d.repeat(1, 2, 1), mean=f.mean.repeat(1, 2)), mean.repeat(1, 2), ridge=0.0)
        torch.testing.assert_close(twice.sum(-1, keepdim=True), once, rtol=0, atol=1e-4)


def test_the_ridge_pulls_towards_its_centre():
    f = family(4, 50, 2)
    mean = f.mean + 0.1
    for centre in (0.0, 1.0):
        strong = matched(f, mean, ridge=1e6, centre=centre)
        torch.testing.assert_close(strong, torch.full_like(strong, centre), rtol=0, atol=1e-5)
