"""Fusion: a worked example, the algebra of every mode, masks, the mixture's bound, and what is refused."""

import math
import warnings

import pytest
import torch
from conftest import WIDTH, tiny_model, tiny_tokenizer
from torch import Tensor

import logitproc as lp
from logitproc.companion import tiny_companion
from logitproc.methods.fusion import (
    DynamicFusionLogitsProcessor,
    candidates,
    fuse,
    mix,
    updated,
)
from logitproc.metrics import gap_closure
from logitproc.scoring import process_positions

INF = math.inf
ONE = ("grid", "newton", "select", "match")


def scores(rows: int = 8, width: int = 300, count: int = 1, spread: float = 0.7, seed: int = 0,
           dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Host, base and experts: a base near the host, experts near the base."""
    random = torch.Generator().manual_seed(seed)
    noise = lambda: torch.randn(rows, width, generator=random, dtype=torch.float64)
    host = 3 * noise()
    base = host + noise()
    return host.to(dtype), base.to(dtype), [(base + spread * noise()).to(dtype) for _ in range(count)]


def kl(a: Tensor, b: Tensor) -> Tensor:
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return torch.where(p > -INF, p.exp() * (p - q), 0.0).sum(-1)


def same_softmax(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1), rtol=0, atol=tolerance)


def processor(mode: str, count: int = 1, **options) -> DynamicFusionLogitsProcessor:
    experts, base = [tiny_companion(WIDTH, 1 + i) for i in range(count)], tiny_companion(WIDTH, 0)
    return DynamicFusionLogitsProcessor(experts if count != 1 else experts[0], base, mode, **options)


def step(mode: str, host: Tensor, base: Tensor, experts: list[Tensor], **options) -> Tensor:
    made = processor(mode, len(experts), **options)
    return made.step(torch.zeros(len(host), 1, dtype=torch.int64), host, base, *experts)


# --- static ---


def test_proxy_tuning_by_hand():
    # d = (1, 0, 0) - (0, 0, 1) = (1, 0, -1); z + 1 d = (2, 2, 2).
    z, base, expert = (torch.tensor([row]) for row in ([1.0, 2.0, 3.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]))
    same_softmax(step("static", z, base, [expert]), torch.zeros(1, 3))
    same_softmax(step("static", z, base, [expert], alpha=2.0), torch.tensor([[3.0, 2.0, 1.0]]))


def test_static_is_host_plus_expert_less_base_and_neutral_at_zero():
    host, base, experts = scores(count=2, dtype=torch.float32)
    same_softmax(step("static", host, base, experts, alpha=(1.0, -0.5)),
                 host + experts[0] - base - 0.5 * (experts[1] - base))  # fmt: skip
    assert torch.equal(step("static", host, base, experts, alpha=0.0), host)
    # A host that is the small base becomes the expert at 1, and twice as much at 2.
    same_softmax(step("static", base, base, experts[:1]), experts[0])
    same_softmax(step("static", base, base, experts[:1], alpha=2.0), 2 * experts[0] - base)


# --- upscale ---


def test_upscaling_by_hand():
    # z - z_S = (1, 2, 2); (1, 0, 0) + .5 (1, 2, 2) = (1.5, 1, 1).
    z, base, expert = (torch.tensor([row]) for row in ([1.0, 2.0, 3.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]))
    same_softmax(step("upscale", z, base, [expert], beta=0.5), torch.tensor([[1.5, 1.0, 1.0]]))


def test_upscaling_goes_from_the_expert_to_static_fusion():
    host, base, experts = scores(dtype=torch.float32)
    assert torch.equal(step("upscale", host, base, experts, beta=0.0), experts[0])
    same_softmax(step("upscale", host, base, experts, beta=1.0), step("static", host, base, experts))
    same_softmax(step("upscale", host, base, experts), experts[0] + 0.3 * (host - base))


def test_upscaling_forbids_what_host_or_expert_forbids():
    host, base, experts = scores(rows=4, width=6, dtype=torch.float32)
    host[0, 1] = base[0, 2] = experts[0][0, 3] = -INF
    host[1, 1:], experts[0][1, :5] = -INF, -INF  # nothing is left: the host's token 0
    base[2] = -INF  # the base says nothing
    host[3] = -INF
    for beta in (0.0, 0.3):
        out = step("upscale", host, base, experts, beta=beta)
        assert out[0].isneginf().tolist() == [False, True, False, True, False, False]
        assert torch.equal(out[1], host[1]) and torch.equal(out[2], experts[0][2]) and torch.equal(out[3], host[3])


# --- what alpha means ---


def test_divergences_of_the_small_models_are_those_of_their_softmaxes():
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-6)):
        host, base, experts = scores(count=3, dtype=dtype)
        found = fuse(host, base, experts, "select")
        for t, expert in enumerate(experts):
            for ours, a, b in ((found.kl, expert, base), (found.reverse_kl, base, expert)):
                exact = kl(a.double(), b.double())
                torch.testing.assert_close(ours[:, t].double(), exact, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("target", ("R", "F", "J"))
def test_newton_moves_the_host_as_far_as_the_expert_was_moved(target):
    host, base, experts = scores()
    found = fuse(host, base, experts, target=target)
    assert not found.beyond.any()
    r, f = kl(found.scores, host), kl(host, found.scores)
    c1, c2 = found.kl[:, 0], found.reverse_kl[:, 0]
    moved, wanted = {"R": (r, c1), "F": (f, c2), "J": (r + f, c1 + c2)}[target]
    torch.testing.assert_close(moved, wanted, rtol=1e-9, atol=1e-12)


def test_grid_is_the_papers_search_and_newton_is_near_it():
    host, base, experts = scores(rows=64)
    found, near = fuse(host, base, experts, "grid"), fuse(host, base, experts, "newton")
    table, c1, c2 = [], kl(experts[0], base), kl(base, experts[0])
    for k in range(21):
        moved = host + k / 10 * (experts[0] - base)
        table.append((kl(moved, host) - c1).square() + (kl(host, moved) - c2).square())
    assert torch.equal((found.alpha[:, 0] * 10).round().long(), torch.stack(table, -1).argmin(-1))
    assert (found.alpha - near.alpha).abs().mean() < 0.06


def test_newton_is_no_worse_than_grid_on_its_own_loss():
    # |J - c1 - c2| at the root is 0; the best point of the grid is not.
    host, base, experts = scores(rows=64)
    loss = lambda f: (kl(f.scores, host) + kl(host, f.scores) - f.kl[:, 0] - f.reverse_kl[:, 0]).abs()
    newton, grid = fuse(host, base, experts, "newton"), fuse(host, base, experts, "grid")
    assert (loss(newton) <= loss(grid) + 1e-9).all()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("spread", (0.1, 0.7, 3.0))
def test_newton_for_the_papers_loss_is_no_worse_than_grid_on_any_row(spread, dtype):
    host, base, experts = scores(rows=64, spread=spread, dtype=dtype)
    exact = [x.double() for x in (host, base, experts[0])]
    c1, c2 = kl(exact[2], exact[1]), kl(exact[1], exact[2])

    def loss(alpha: Tensor) -> Tensor:
        moved = exact[0] + alpha.double() * (exact[2] - exact[1])
        return (kl(moved, exact[0]) - c1).square() + (kl(exact[0], moved) - c2).square()

    found, grid = (loss(fuse(host, base, experts, mode, target="L").alpha) for mode in ("newton", "grid"))
    assert (found <= grid + (1e-12 if dtype is torch.float64 else 1e-6)).all()
    assert found.mean() < 0.9 * grid.mean(), "and better where the minimum lies between two points"


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-6), (torch.float32, 1e-3)))
@pytest.mark.parametrize("mode", ONE)
def test_a_host_that_is_the_small_base_becomes_the_expert(mode, dtype, tolerance):
    _, base, experts = scores(dtype=dtype)
    for target in ("R", "F", "J", "L") if mode == "newton" else ("J",):
        found = fuse(base, base, experts, mode, target=target, ridge=0.0)
        torch.testing.assert_close(found.alpha, torch.ones_like(found.alpha), rtol=0, atol=tolerance)
        same_softmax(found.scores, experts[0], tolerance)


def test_match_picks_the_expert_that_its_weights_name():
    _, base, experts = scores(count=3)
    for t in range(3):
        weights = torch.eye(3, dtype=torch.float64)[t].expand(8, -1)
        for kind in ("level", "shift"):
            found = fuse(base, base, experts, "match", weights=weights, ridge=0.0, kind=kind)
            torch.testing.assert_close(found.alpha, weights.contiguous(), rtol=0, atol=1e-6)


def test_match_is_the_projection_of_the_mixture_of_experts():
    host, base, experts = scores(count=2)
    weights = torch.tensor([[0.3, 0.7]], dtype=torch.float64).expand(8, -1)
    found = fuse(host, base, experts, "match", weights=weights, ridge=0.0, bounds=[(0.0, 50.0)])
    aim = sum(w * e.softmax(-1) for w, e in zip((0.3, 0.7), experts, strict=True)).log()
    best = kl(aim, found.scores)
    d = torch.stack([e - base for e in experts], 1)
    for change in ((0.01, 0.0), (-0.01, 0.0), (0.0, 0.01), (0.0, -0.01)):
        moved = (found.alpha + torch.tensor(change, dtype=torch.float64)).clamp(min=0)
        assert (kl(aim, host + (moved[..., None] * d).sum(1)) >= best - 1e-9).all()


def test_one_expert_acts_in_select():
    host, base, experts = scores(rows=64, count=3)
    found = fuse(host, base, experts, "select")
    assert ((found.alpha != 0).sum(1) <= 1).all()
    assert ((found.alpha != 0).any(0)).sum() > 1, "another one in another row"
    c1, c2 = found.kl.mean(1), found.reverse_kl.mean(1)

    def loss(t: int, a: float) -> Tensor:
        moved = host + a * (experts[t] - base)
        return (kl(moved, host) - c1).square() + (kl(host, moved) - c2).square()

    table = torch.stack([torch.stack([loss(t, k / 10) for k in range(21)], -1) for t in range(3)], 1)
    best = table.flatten(1).amin(1)
    chosen = found.alpha.argmax(1)
    at = (found.alpha.amax(1) * 10).round().long()
    torch.testing.assert_close(table[torch.arange(64), chosen, at], best)


def test_the_published_loss_of_several_experts_sees_only_the_mean_targets():
    # sum over t of [(R - c1_t)^2 + (F - c2_t)^2] = T [(R - c1)^2 + (F - c2)^2] + const, c1 and c2 the means.
    host, base, experts = scores(count=3)
    found = fuse(host, base, experts, "select")
    c1, c2 = found.kl, found.reverse_kl
    differences = []
    for seed in range(4):
        alpha = torch.rand(8, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        moved = host + (alpha[..., None] * torch.stack([e - base for e in experts], 1)).sum(1)
        r, f = kl(moved, host), kl(host, moved)
        published = ((r[:, None] - c1).square() + (f[:, None] - c2).square()).sum(1)
        differences.append(published - 3 * ((r - c1.mean(1)).square() + (f - c2.mean(1)).square()))
    for other in differences[1:]:
        torch.testing.assert_close(other, differences[0], rtol=0, atol=1e-12)


def test_two_equal_experts_fuse_like_one():
    host, base, experts = scores()
    for mode in ("select", "match"):
        one = fuse(host, base, experts, mode, ridge=1e-9).scores
        same_softmax(fuse(host, base, experts * 2, mode, ridge=1e-9).scores, one, 1e-5)


def test_small_shifts_give_the_ratio_of_deviations():
    host, base, (expert,) = scores()
    q, p = base.softmax(-1), host.softmax(-1)
    deviation = lambda p, d: ((p * d * d).sum(-1) - (p * d).sum(-1).square()).sqrt()
    d = expert - base
    found = fuse(host, base, [base + 0.02 * d], bounds=[(0.0, 10.0)]).alpha[:, 0]
    torch.testing.assert_close(found, deviation(q, d) / deviation(p, d), rtol=2e-2, atol=0)


# --- any row ---


@pytest.mark.parametrize("mode", (*ONE, "newton"))
def test_an_expert_that_equals_its_base_leaves_the_host_bit_for_bit(mode):
    for dtype in (torch.float32, torch.float64):
        host, base, _ = scores(dtype=dtype)
        for expert in (base, base + 7.0):
            found = fuse(host, base, [expert], mode)
            assert torch.equal(found.scores, host) and found.dead.all() and not found.alpha.any()


@pytest.mark.parametrize("mode", ONE)
def test_constants_change_nothing_and_a_permutation_permutes(mode):
    for shift, tolerance in ((10.0, 1e-5), (100.0, 1e-4)):
        host, base, experts = scores(dtype=torch.float32)
        plain = fuse(host, base, experts, mode).scores
        for where in range(3):
            moved = [x + shift if i == where else x for i, x in enumerate((host, base, experts[0]))]
            same_softmax(fuse(moved[0], moved[1], moved[2:], mode).scores, plain, tolerance)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    permuted = fuse(host[:, order], base[:, order], [experts[0][:, order]], mode).scores
    same_softmax(permuted, plain[:, order], 1e-5)
    same_softmax(fuse(host.log_softmax(-1), base, experts, mode).scores, plain, 1e-5)  # beam scores


@pytest.mark.parametrize("mode", ONE)
def test_rows_are_solved_as_if_alone_also_in_chunks_and_twice(mode, monkeypatch):
    host, base, experts = scores(dtype=torch.float32)
    whole = fuse(host, base, experts, mode).alpha
    assert torch.equal(fuse(host, base, experts, mode).alpha, whole)
    monkeypatch.setattr("logitproc.methods.fusion.CACHED", 900)
    torch.testing.assert_close(fuse(host, base, experts, mode).alpha, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ONE)
def test_masks(mode):
    host, base, experts = scores(rows=5, width=9, dtype=torch.float32)
    expert = experts[0]
    host[0, 2], base[1, 3], expert[2, 4] = -INF, -INF, -INF
    base[3, 5] = expert[3, 5] = torch.finfo(torch.float32).min  # some models mask with a finite number
    host[4, 1:] = -INF
    found = fuse(host, base, [expert], mode)
    out = found.scores
    assert not out.isnan().any() and not found.alpha.isnan().any()
    assert out[0, 2] == -INF and out[2, 4] == -INF and out[3, 5] == -INF
    assert out[1, 3] == host[1, 3], "only the base forbids: d = 0"
    assert torch.equal(out[4], host[4]), "the only token of a row stays"
    # What does not know a token cannot tell the models apart: alpha is that of the other tokens.
    rest = [0, 1, 2, 4, 5, 6, 7, 8]
    alone = fuse(host[1:2, rest], base[1:2, rest], [expert[1:2, rest]], mode).alpha
    torch.testing.assert_close(found.alpha[1:2], alone, rtol=1e-4, atol=1e-4)


def test_a_row_without_a_common_token_is_the_hosts():
    host = torch.tensor([[1.0, 2.0, -INF, -INF]])
    expert = torch.tensor([[-INF, -INF, 1.0, 2.0]])
    for mode in ONE:
        assert torch.equal(fuse(host, torch.zeros(1, 4), [expert], mode).scores, host)


def test_bounds_hold_and_are_reached_exactly():
    host, base, experts = scores(spread=2.0)
    strong = fuse(host, base, [base + 6 * (experts[0] - base)], bounds=[(0.0, 0.5)])
    assert strong.beyond.any() and (strong.alpha[strong.beyond] == 0.5).all() and (strong.alpha <= 0.5).all()
    assert (fuse(host, base, experts, bounds=[(1.4, 2.0)]).alpha >= 1.4).all()
    on_grid = fuse(host, base, experts, "grid", bounds=[(0.3, 0.6)]).alpha
    assert set((10 * on_grid).round().flatten().tolist()) <= {3, 4, 5, 6}


@pytest.mark.parametrize("mode", (*ONE, "mixture", "static", "upscale"))
def test_the_budget_bounds_the_divergence_from_the_host(mode):
    host, base, experts = scores(dtype=torch.float32, spread=1.5)
    free = step(mode, host, base, experts)
    for budget in (0.05, 1e6):
        held = step(mode, host, base, experts, kl_budget=budget)
        assert (kl(held.double(), host.double()) <= budget + 1e-6).all()
    same_softmax(held, free, 1e-5)
    assert (kl(free, host) > 0.05).any()


def test_plausibility_keeps_what_the_host_finds_likely():
    host, base, experts = scores(dtype=torch.float32)
    p = host.softmax(-1)
    for mode in (*ONE, "mixture"):
        out = step(mode, host, base, experts, plausibility=0.1)
        assert torch.equal(out > -INF, p >= 0.1 * p.amax(-1, keepdim=True))


def test_half_precision_companions_are_upcast_before_they_are_subtracted():
    host, base, experts = (x for x in scores(dtype=torch.float32))
    half = lambda x: x.bfloat16().float()
    made = processor("newton")
    out = made.apply(torch.zeros(8, 1, dtype=torch.int64), host.bfloat16(),
                     companion_scores=[half(base), half(experts[0])])  # fmt: skip
    assert torch.equal(out, step("newton", half(host), half(base), [half(experts[0])]).bfloat16())


# --- mixture ---


def test_a_mixture_by_hand():
    # Weights 1/4 and 3/4: p = (.25 * .5 + .75 * .1, ...) = (.2, .8).
    a, b = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.1, 0.9]]).log()
    torch.testing.assert_close(mix([a, b], torch.tensor([[1.0, 3.0]]).log()).exp(), torch.tensor([[0.2, 0.8]]))
    # Token 0: 1/4 * .5 against 3/4 * .1 is 5 : 3. A share of .1 makes 5/8 into .9 * 5/8 + .05.
    w = updated(torch.tensor([[1.0, 3.0]]).log(), torch.tensor([[0.5, 0.1]]).log(), 0.1).exp()
    torch.testing.assert_close(w, torch.tensor([[0.6125, 0.3875]]))


def test_one_component_is_returned_and_equal_ones_change_nothing():
    host, *_ = scores(dtype=torch.float32)
    assert mix([host], torch.zeros(8, 1)) is host
    same_softmax(mix([host, host, host], torch.randn(8, 3)), host)


def test_a_token_of_the_mixture_itself_leaves_the_expected_weights_as_they_are():
    random = torch.Generator().manual_seed(0)
    log_p = torch.randn(3, 7, generator=random).log_softmax(-1)
    log_w = torch.randn(1, 3, generator=random).log_softmax(-1)
    chance = mix(list(log_p[:, None]), log_w).exp()[0]
    after = updated(log_w.expand(7, 3), log_p.T, 0.0).exp()
    torch.testing.assert_close((chance[:, None] * after).sum(0), log_w.exp()[0])
    assert after.std(0).min() > 0.01


def test_weights_sum_to_one_and_recover_from_zero_with_a_share():
    w = torch.zeros(4, 3)
    surprise = torch.tensor([[-1.0, -INF, -2.0]]).expand(4, 3)
    for share in (0.0, 0.02):
        after = updated(w, surprise, share)
        torch.testing.assert_close(after.exp().sum(-1), torch.ones(4))
        assert (after[:, 1] == -INF).all() == (share == 0)
        later = updated(after, torch.tensor([[-9.0, -1.0, -9.0]]).expand(4, 3), share).exp()
        assert (later[:, 1] > 0.5).all() == (share > 0)
    assert torch.equal(updated(w, torch.full((4, 3), -INF), 0.0).exp().round(decimals=5),
                       torch.full((4, 3), 1 / 3).round(decimals=5))  # fmt: skip


def test_the_loss_of_a_text_is_at_most_the_best_components_plus_ln_m():
    random = torch.Generator().manual_seed(0)
    for count in (2, 5):
        for spread in (0.1, 1.0, 5.0):
            tables = spread * torch.randn(count, 40, 11, generator=random, dtype=torch.float64)  # [M, tokens, V]
            text = torch.randint(0, 11, (40,), generator=random)
            w, loss = torch.zeros(1, count, dtype=torch.float64), 0.0
            own = -tables.log_softmax(-1)[:, torch.arange(40), text].sum(1)
            for t in range(40):
                loss -= mix(list(tables[:, t : t + 1]), w)[0, text[t]].item()
                w = updated(w, tables[:, t].log_softmax(-1)[:, text[t]][None], 0.0)
            assert loss <= own.min() + math.log(count) + 1e-6
            weights = (-own).softmax(0)  # the closed form of Bayes' rule
            torch.testing.assert_close(w[0].exp(), weights)


def losses(found: Tensor, ids: Tensor) -> Tensor:
    return -found[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).sum(1)


def test_scoring_keeps_the_bound_with_real_companions():
    model = tiny_model(seed=5)
    ids = torch.randint(3, WIDTH, (6, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
    chain = lp.Chain([processor("mixture", share=0.0, alpha=(0.5, 1.5))])
    base, expert = (companion(ids, positions=30) for companion in chain.companions)
    parts = candidates(*(x.flatten(0, 1) for x in (logits, base)), [expert.flatten(0, 1)], (0.5, 1.5), (0.3,))
    own = torch.stack([losses(part.unflatten(0, (6, 30)), ids) for part in parts])
    mixed = losses(process_positions(chain, ids, logits), ids)
    assert (mixed <= own.amin(0) + math.log(len(parts)) + 1e-3).all()  # float32 over 29 tokens
    assert (mixed >= own.amin(0) - 1e-3).all(), "the mixture is no better than the best of random models here"


def test_match_takes_weights_of_another_dtype_and_no_more_steps_than_asked():
    host, base, experts = scores(rows=3, width=WIDTH, count=2, spread=3.0, dtype=torch.float64)
    weights = torch.tensor([[0.3, 0.7]]).expand(3, 2)
    full = fuse(host, base, experts, "match", weights=weights, ridge=0.0)
    assert torch.equal(full.alpha, fuse(host, base, experts, "match", weights=weights.double(), ridge=0.0).alpha)
    assert not torch.equal(full.alpha, fuse(host, base, experts, "match", weights=weights, ridge=0.0, steps=1).alpha)


def test_where_evidence_comes_from():
    model = tiny_model(seed=5)
    ids = torch.randint(3, WIDTH, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
    prompt = torch.tensor([6, 6])
    run = lambda source, drawn: process_positions(
        lp.Chain([processor("mixture", evidence_from=source)]), ids, logits, prompt_lengths=prompt, drawn=drawn)
    everything, only_prompt, nothing = run("all", True), run("given", True), run("none", True)
    assert torch.equal(run("given", False), everything), "in scoring all tokens are given"
    torch.testing.assert_close(everything[:, :6], only_prompt[:, :6], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(everything[:, 8:], only_prompt[:, 8:], atol=1e-2)
    torch.testing.assert_close(everything[:, 0], nothing[:, 0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(only_prompt[:, 8:], nothing[:, 8:], atol=1e-2)
    # The base stands in for the host on a prompt: the expert's weight grows with what it gave the tokens over it.
    made = processor("mixture")
    tokens = torch.tensor([4])
    base, expert = torch.zeros(1, WIDTH), torch.zeros(1, WIDTH)
    expert[0, 4] = 3.0
    found = made.evidence(tokens, None, base, expert)[0]
    assert (found[1:] > found[0]).all()


def test_a_mixture_learns_which_expert_a_text_belongs_to():
    made = processor("mixture", 2)
    host, base, experts = scores(rows=1, width=WIDTH, count=2, spread=2.0, dtype=torch.float32)
    total = torch.zeros(1, made.evidence_size)
    for token in experts[1].softmax(-1).topk(5).indices[0]:
        total = made.accumulate(total, made.evidence(token[None], host, base, *experts))
    assert total.softmax(-1).argmax() == 2  # the second expert, upscaled


# --- the paper ---


def test_the_figures_that_papers_print_and_those_they_should():
    assert [round(100 * x, 1) for x in gap_closure(46.09, 29.93, 47.79)] == [96.4, 90.5]
    assert [round(100 * x, 1) for x in gap_closure(39.42, 37.93, 45.68)] == [86.3, 19.2]


# --- parameters ---


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"bounds": (-1.0, 2.0)}, "bounds must be a number in"),
        ({"bounds": (0.0, math.nan)}, "bounds must be a number in"),
        ({"bounds": (2.0, 1.0)}, "bounds must be a number in"),
        ({"bounds": (1.0,)}, "bounds must be .low, high."),
        ({"bounds": 2}, "bounds must be .low, high."),
        ({"bounds": (1, (0, 2))}, "bounds must be .low, high."),
        ({"mode": "grid", "bounds": (0.31, 0.39)}, "multiple of 0.1"),
        ({"target": "L", "bounds": (0.31, 0.39)}, "multiple of 0.1"),
        ({"mode": "guess"}, "mode must be one of static, upscale"),
        ({"target": "K"}, "target must be one of R, F, J, L"),
        ({"kind": "both"}, "kind must be one of level, shift"),
        ({"evidence_from": "host"}, "evidence_from must be one of"),
        ({"centre": math.nan}, "centre must be a number in"),
        ({"share": 0.5}, "share must be a number in"),
        ({"plausibility": 2.0}, "plausibility must be a number in"),
        ({"kl_budget": -1.0}, "kl_budget must be a number at least 0"),
        ({"mode": "static", "alpha": math.nan}, "alpha must be a number"),
        ({"alpha": 1.0}, "mode='newton' takes no alpha; give it to 'static' or 'mixture'"),
        ({"mode": "match", "beta": 0.3}, "mode='match' takes no beta; give it to 'upscale' or 'mixture'"),
        ({"mode": "static", "alpha": (1.0, 2.0)}, "alpha must be a number, or one an expert"),
        ({"mode": "upscale", "beta": math.inf}, "beta must be a number"),
        ({"mode": "upscale", "beta": (0.2, 0.4)}, "beta must be a number for mode='upscale'"),
        ({"mode": "mixture", "beta": ()}, "needs a beta or an alpha"),
        ({"mode": "match", "weights": (1.0, 2.0)}, "weights must be one number an expert"),
        ({"mode": "match", "weights": 1.0}, "weights must be one number an expert"),
        ({"mode": "match", "weights": (0.0,)}, "weights must not all be 0"),
        ({"mode": "match", "weights": "even"}, "weights must be one of uniform, evidence"),
    ],
)
def test_bad_parameters_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        processor(**{"mode": "newton", **options})


def test_the_number_of_experts_must_fit_the_mode():
    for mode in ("upscale", "grid", "newton"):
        with pytest.raises(ValueError, match="takes one expert, got 2; use 'mixture', 'match' or 'select'"):
            processor(mode, 2)
    with pytest.raises(ValueError, match="mode='match' needs at least one expert"):
        processor("match", 0)
    with pytest.raises(ValueError, match="base must be a Companion"):
        DynamicFusionLogitsProcessor(tiny_companion(WIDTH), None)


def test_a_missing_model_and_another_tokenizer_are_refused_before_the_first_token():
    with pytest.raises(ValueError, match="'fusion' needs the parameter 'base'"):
        lp.Chain.from_spec([{"name": "fusion", "expert": "mini"}])
    other = lp.Companion(tiny_model(width=WIDTH), tiny_tokenizer(WIDTH, bos_token="w5"))
    chain = lp.Chain([DynamicFusionLogitsProcessor(other, tiny_companion(WIDTH), "newton")])
    with pytest.raises(ValueError, match="another tokenizer"):
        lp.generate(tiny_model(), chain, tokenizer=tiny_tokenizer(), input_ids=torch.tensor([[5, 6]]), max_new_tokens=2)


def test_what_learns_from_generated_tokens_refuses_assistants():
    for made, allowed in ((processor("newton"), True), (processor("mixture"), False),
                          (processor("mixture", evidence_from="none"), True)):  # fmt: skip
        assert made.supports_assisted is allowed


def test_experts_and_base_of_different_prompts_are_warned_of():
    tiny = tiny_companion(WIDTH).model
    other, base, same = (lp.Companion(tiny, prompt=prompt) for prompt in ([1, 5], [1, 6], [1, 6]))
    with pytest.warns(UserWarning, match="read different prompts"):
        DynamicFusionLogitsProcessor((same, other), base)
    with pytest.warns(UserWarning, match="read different prompts"):
        DynamicFusionLogitsProcessor(same, tiny_companion(WIDTH))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DynamicFusionLogitsProcessor(same, base)
