"""AlignDistil: a worked example, each sentence of the docstrings, published methods as settings, the theory."""

import itertools
import math

import pytest
import torch
from conftest import WIDTH, tiny_model
from torch import Tensor
from transformers import TopPLogitsWarper, UnbatchedClassifierFreeGuidanceLogitsProcessor

import logitproc as lp
from logitproc.companion import Companion, tiny_companion
from logitproc.methods.aligndistil import (
    AlignDistilLogitsProcessor,
    distill_loss,
    r_from_code_beta2,
    teacher,
)

INF = math.inf
IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 4, 11], [3, 8, 5, 20]])


def scores(count: int, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    shape = shape or (5, 23)
    return [(2 * torch.randn(*shape, generator=random, dtype=torch.float64)).to(dtype) for _ in range(count)]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def pair() -> tuple[Companion, Companion]:
    return tiny_companion(WIDTH), tiny_companion(WIDTH, seed=1)


def processed(host: Tensor, **settings) -> Tensor:
    return AlignDistilLogitsProcessor(**settings)(IDS, host)


@pytest.fixture
def host() -> Tensor:
    """Scores of a host for IDS."""
    return tiny_model(seed=5)(IDS).logits[:, -1].detach()


# --- the teacher ---


def test_a_worked_example():
    # plus (.5, .3, .2), minus (.25, .25, .5): TVD (.25 + .05 + .3)/2 = .3, a = 2 * .3 + .1 = .7, and
    # log pi* = log plus + .7 log(plus / minus): weights .5 * 2^.7, .3 * 1.2^.7, .2 * .4^.7.
    plus, minus = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    log_p, a = teacher(plus, minus, plus, r=2.0, eps=0.1)
    weights = torch.tensor([0.5 * 2**0.7, 0.3 * 1.2**0.7, 0.2 * 0.4**0.7])
    close(a, torch.tensor(0.7), 1e-6)
    close(log_p.exp(), weights / weights.sum(), 1e-6)


def test_without_a_coefficient_the_teacher_is_the_anchor():
    plus, minus, anchor = scores(3)
    close(teacher(plus, minus, anchor, r=0.0, eps=0.0)[0], anchor.log_softmax(-1))
    log_p, a = teacher(plus, plus + 3, anchor, r=5.0, eps=0.2)  # nothing to disagree about
    close(log_p, anchor.log_softmax(-1))
    close(a, torch.full_like(a, 0.2))


def test_the_coefficient_lies_between_eps_and_r_and_the_code_doubles_it():
    plus, minus = scores(2, 200, 23)
    a = teacher(plus, minus, plus, r=3.0, eps=0.5)[1]
    assert (a >= 0.5).all() and (a <= 3.5).all() and a.max() - a.min() > 1
    code = teacher(plus, minus, plus, r=10.0, eps=1e-3, tvd_units="code")[1]
    paper = teacher(plus, minus, plus, r=r_from_code_beta2(10), eps=1e-3)[1]
    assert r_from_code_beta2(10) == 20
    close(paper, code)
    by_hand = (plus.softmax(-1) - minus.softmax(-1)).abs().sum(-1) * 10 + 1e-3  # as the released code
    close(code, by_hand)


def test_total_variation_is_symmetric_bounded_and_blind_to_order_and_offset():
    tvd = lambda p, q: teacher(p, q, torch.zeros_like(p), r=1.0, eps=0.0)[1]
    p, q = scores(2)
    tv, order = tvd(p, q), torch.randperm(p.shape[1], generator=torch.Generator().manual_seed(0))
    close(tvd(q, p), tv)
    close(tvd(p[:, order], q[:, order]), tv)
    close(tvd(p + 7, q - 3), tv)
    assert (tv > 0).all() and (tv < 1).all()
    apart = torch.tensor([0.0, 1.0, -1e3, -1e3])
    close(tvd(apart, apart.flip(0)), torch.tensor(1.0))


def test_theorem_1_reaches_the_dpo_model_and_the_reference():
    dpo, reference = scores(2)
    at = lambda ratio: teacher(dpo, reference, reference, coefficient=ratio)[0]  # ratio = beta0 / beta
    close(at(1.0), dpo.log_softmax(-1))
    close(at(0.0), reference.log_softmax(-1))
    close(at(0.3), (0.3 * dpo + 0.7 * reference).log_softmax(-1))


def test_leading_axes_are_rows():
    plus, minus, anchor = scores(3, 4, 3, 23)
    settings = dict(r=2.0, plausibility=0.05, kl_cap=0.3)
    log_p, a = teacher(plus, minus, anchor, **settings)
    for i, k in itertools.product(range(4), range(3)):
        alone, its_a = teacher(plus[i, k], minus[i, k], anchor[i, k], **settings)
        close(log_p[i, k], alone)
        close(a[i, k], its_a)


def test_the_divergence_from_the_anchor_grows_with_the_coefficient():
    plus, minus, anchor = scores(3)
    d, p, before = plus.log_softmax(-1) - minus.log_softmax(-1), anchor.softmax(-1), torch.zeros(5)
    for a in (0.1, 0.5, 1.0, 2.0, 4.0):
        log_p = teacher(plus, minus, anchor, coefficient=a)[0]
        kl = (log_p.exp() * (log_p - p.log())).sum(-1)
        mean = (log_p.exp() * d).sum(-1)  # mu(a)
        close(kl, a * mean - (p * (a * d).exp()).sum(-1).log())  # a mu(a) - A(a)
        assert (kl >= before).all()
        before = kl


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cap_holds_and_a_large_one_changes_nothing(dtype):
    plus, minus, anchor = scores(3, 50, 23, dtype=dtype)
    free, a = teacher(plus, minus, anchor, r=4.0)
    for budget in (0.0, 0.01, 0.2, 1.0):
        log_p, capped = teacher(plus, minus, anchor, r=4.0, kl_cap=budget)
        kl = (log_p.exp() * (log_p - anchor.log_softmax(-1))).sum(-1)
        assert (kl <= budget + 1e-6).all()
        assert (kl[capped < a - 1e-6] > budget - 1e-4).all()  # it is the largest that holds
    log_p, capped = teacher(plus, minus, anchor, r=4.0, kl_cap=100.0)
    torch.testing.assert_close((log_p, capped), (free, a))


def test_the_coefficient_is_clamped():
    plus, minus = scores(2, 100, 23)
    free = teacher(plus, minus, plus, r=1.0)[1]
    low, high = free.quantile(0.3).item(), free.quantile(0.7).item()
    close(teacher(plus, minus, plus, r=1.0, clamp=(low, high))[1], free.clamp(low, high))


# --- what is forbidden ---


@pytest.mark.parametrize("anchor, plus, minus", [*itertools.product((0.5, -INF), repeat=3)])
def test_every_combination_of_forbidden_tokens(anchor, plus, minus):
    p, m, a = scores(3, 6, dtype=torch.float32)
    a[2], p[2], m[2] = anchor, plus, minus
    for u, coefficient in itertools.product((0.0, 0.4, 1.0), ("adaptive", 0.0, 20.0)):
        log_p, found = teacher(p, m, a, anchor_weight=u, coefficient=coefficient, kl_cap=5.0)
        assert not log_p.isnan().any() and not (log_p == INF).any() and found.isfinite()
        assert (log_p[2] == -INF) == (-INF in (anchor, plus))
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_token_forbidden_in_minus_alone_has_no_log_ratio():
    plus, minus = torch.tensor([0.4, 0.4, 0.2]).log(), torch.tensor([0.5, 0.5, 0.0]).log()
    # Renormalised on the first two tokens plus and minus agree, so nothing changes at all.
    log_p, a = teacher(plus, minus, plus, r=1.0, eps=0.0)
    close(a, torch.tensor(0.0), 1e-6)
    close(log_p.exp(), plus.exp(), 1e-6)


def test_a_row_with_nothing_left_is_the_anchor():
    anchor, plus, minus = torch.tensor([[1.0, 2, -INF], [-INF] * 3]), torch.tensor([-INF, -INF, 0.0]), torch.zeros(3)
    log_p, _ = teacher(plus.expand(2, 3), minus.expand(2, 3), anchor)
    close(log_p[0], anchor[0].log_softmax(-1), 1e-6)
    assert (log_p[1] == -INF).all()


def test_plausibility_forbids_the_tail_and_keeps_the_argmax():
    plus, minus, anchor = scores(3, 40, 23)
    log_p = teacher(plus, minus, anchor, coefficient=1.0, plausibility=0.1)[0]
    p = anchor.softmax(-1)
    assert torch.equal(log_p > -INF, p >= 0.1 * p.amax(-1, keepdim=True) * (1 - 1e-12))
    assert (log_p.gather(1, anchor.argmax(-1, keepdim=True)) > -INF).all()
    every = teacher(plus, minus, anchor, coefficient=1.0, plausibility=0.0)[0]
    assert every.isfinite().all()
    close(log_p, every.masked_fill(log_p == -INF, -INF).log_softmax(-1))


def test_scores_and_their_log_softmax_give_the_same_and_rounding_happens_before():
    plus, minus, anchor = scores(3, dtype=torch.float32)
    given = dict(r=2.0, plausibility=0.05)
    log_p = teacher(plus, minus, anchor, **given)[0]
    close(teacher(*(z.log_softmax(-1) for z in (plus, minus, anchor)), **given)[0], log_p, 1e-5)
    rounded = anchor[:3, :].repeat(1, 5)[:, :WIDTH].bfloat16()
    made = AlignDistilLogitsProcessor(pair()[0], coefficient=20.0)
    assert torch.equal(made(IDS, rounded), made(IDS, rounded.float()).bfloat16())


# --- the processor, and published methods as its settings ---


def test_the_processor_is_the_teacher(host):
    reverse, dpo = pair()
    plus, minus = dpo(IDS), reverse(IDS)
    close(processed(host, reverse=reverse), teacher(host, minus, host)[0], 1e-5)
    close(processed(host, reverse=reverse, dpo=dpo, r=3.0), teacher(plus, minus, host, r=3.0)[0], 1e-5)
    by_dpo = processed(host, reverse=reverse, dpo=dpo, anchor="dpo")
    close(by_dpo, teacher(plus, minus, plus)[0], 1e-5)


def test_a_host_that_is_no_anchor_still_forbids(host):
    reverse, dpo = pair()
    host[0, 10:] = -INF
    out = processed(host, reverse=reverse, dpo=dpo, anchor="dpo", plausibility=0.1)
    assert (out[0, 10:] == -INF).all() and (out[0, :10] > -INF).any() and (out[1:] > -INF).any(-1).all()


def test_dera_in_both_roles(host):
    # The same two models, once the aligned one as the host and once the reference.
    other = tiny_companion(WIDTH)
    aligned, reference = host, other(IDS)
    expected = (2.5 * aligned + (1 - 2.5) * reference).log_softmax(-1)
    close(processed(aligned, reverse=other, coefficient=1.5), expected, 1e-4)
    as_companion = Companion(tiny_model(seed=5))
    close(processed(reference, dpo=as_companion, coefficient=2.5), expected, 1e-4)


def test_theorem_1_adaptive(host):
    dpo = pair()[1]
    tvd = (dpo(IDS).softmax(-1) - host.softmax(-1)).abs().sum(-1, keepdim=True) / 2
    w = 2.0 * tvd + 1e-3
    expected = (w * dpo(IDS) + (1 - w) * host).log_softmax(-1)
    close(processed(host, dpo=dpo, r=2.0), expected, 1e-4)


def test_proxy_tuning(host):
    base, expert = pair()
    expected = (host + 0.7 * (expert(IDS) - base(IDS))).log_softmax(-1)
    close(processed(host, dpo=expert, reverse=base, coefficient=0.7), expected, 1e-4)
    # A host that is the small base itself becomes the expert.
    close(processed(base(IDS), dpo=expert, reverse=base, coefficient=1.0), expert(IDS).log_softmax(-1), 1e-4)


def test_dexperts_filters_the_host_first(host):
    anti, expert = pair()
    nucleus = TopPLogitsWarper(0.9)(IDS, host.clone())
    expected = (nucleus + 2 * (expert(IDS) - anti(IDS))).log_softmax(-1)
    close(processed(host, dpo=expert, reverse=anti, coefficient=2.0, host_top_p=0.9), expected, 1e-4)
    same = Companion(tiny_model(seed=5))
    alone = processed(host, dpo=same, reverse=same, coefficient=2.0, host_top_p=0.9)
    close(alone, nucleus.log_softmax(-1), 1e-4)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_contrastive_decoding(host, strength):
    amateur = pair()[0]
    out = processed(host, reverse=amateur, coefficient=strength, anchor_weight=1 - strength, plausibility=0.1)
    expert = host.log_softmax(-1)
    plausible = expert.exp() >= 0.1 * expert.exp().amax(-1, keepdim=True)
    expected = (expert - strength * amateur(IDS).log_softmax(-1)).masked_fill(~plausible, -INF)
    close(out, expected.log_softmax(-1), 1e-4)
    assert torch.equal(out.argmax(-1), expected.argmax(-1))


def test_contrastive_decoding_in_its_other_form(host):
    amateur, beta = pair()[0], 0.5
    out = processed(host, reverse=amateur, coefficient=beta, plausibility=0.1)
    close(out, ((1 + beta) * host - beta * amateur(IDS)).masked_fill(out == -INF, -INF).log_softmax(-1), 1e-4)
    weight = beta / (1 + beta)
    other = processed(host, reverse=amateur, coefficient=weight, anchor_weight=1 - weight, plausibility=0.1)
    finite = out > -INF
    close(((1 + beta) * other).log_softmax(-1)[finite], out[finite], 1e-4)
    assert torch.equal(out.argmax(-1), other.argmax(-1))


def test_classifier_free_guidance_equals_that_of_transformers():
    model, without = tiny_model(seed=5), [7, 8]
    companion = Companion(model, prompt=without)
    prompt, gamma = IDS[:1], 1.7
    guided = UnbatchedClassifierFreeGuidanceLogitsProcessor(
        gamma, model, unconditional_ids=torch.tensor([without]), use_cache=False
    )
    chain = lp.Chain([AlignDistilLogitsProcessor(companion, coefficient=gamma - 1)])
    ids, bound = prompt, chain.bind(prompt)
    for _ in range(3):
        logits = model(ids).logits[:, -1].detach()
        ours, theirs = bound(ids, logits), guided(ids, logits).detach().log_softmax(-1)
        close(ours, theirs, 1e-4)
        ids = torch.cat([ids, ours.argmax(-1, keepdim=True)], 1)
    one = lp.Chain([AlignDistilLogitsProcessor(companion, coefficient=0.0)])
    assert torch.equal(one.bind(prompt)(ids, logits), logits)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({}, "needs reverse, dpo or both"),
        ({"reverse": True, "anchor": "dpo"}, "needs the model dpo"),
        ({"reverse": True, "anchor": "base"}, "anchor must be one of host, dpo"),
        ({"reverse": True, "tvd_units": "nats"}, "tvd_units must be one of paper, code"),
        ({"reverse": True, "coefficient": "constant"}, "'adaptive' or a number"),
        ({"reverse": True, "coefficient": math.nan}, "'adaptive' or a number"),
        ({"reverse": True, "r": -1.0}, "r must be a number"),
        ({"reverse": True, "plausibility": 1.5}, "plausibility must be a number in"),
        ({"reverse": True, "clamp": (1.0, 0.0)}, r"clamp \(high\) must be a number in \[1"),
        ({"reverse": True, "clamp": 1.0}, "clamp must be .low, high., got 1.0"),
        ({"reverse": True, "clamp": (1.0,)}, "clamp must be .low, high."),
        ({"reverse": True, "dpo": pair()}, "dpo must be a Companion .*, got tuple"),
        ({"reverse": True, "kl_cap": -0.1}, "kl_cap must be a number at least 0"),
        ({"reverse": True, "anchor_weight": 0.0, "plausibility": 0.0}, "needs plausibility above 0"),
    ],
)
def test_a_wrong_parameter_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        AlignDistilLogitsProcessor(**wrong | ({"reverse": pair()[0]} if wrong else {}))


# --- distillation ---


def test_the_loss_is_zero_at_the_teacher_alone_and_hides_what_is_masked():
    plus, minus, student = scores(3, 2, 4, 9)
    log_p, a = teacher(plus, minus, plus)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    close(distill_loss(log_p + 5, log_p, a, 0.1, mask), torch.tensor(0.0, dtype=torch.float64))
    assert distill_loss(student, log_p, a, 0.1, mask) > 0
    other = log_p.masked_fill(~mask[..., None], -INF)
    student.requires_grad_()
    loss = distill_loss(student, other, a, 0.1, mask)
    close(loss, distill_loss(student, log_p, a, 0.1, mask))
    loss.backward()
    assert student.grad.isfinite().all() and (student.grad[~mask] == 0).all() and (student.grad[mask] != 0).all()


def test_the_loss_weighs_each_token_by_beta0_over_a():
    plus, minus, student = scores(3, 2, 3, 9)
    log_p, a = teacher(plus, minus, plus, r=20.0)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    log_q = student.log_softmax(-1)
    terms = 0.1 / a * (log_q.exp() * (log_q - log_p)).sum(-1)
    by_hand = (terms[0].mean() + terms[1, 0]) / 2
    close(distill_loss(student, log_p, a, 0.1, mask), by_hand)
    close(distill_loss(student, log_p, a, 0.1, mask, length_norm=False), (terms[0].sum() + terms[1, 0]) / 2)
    clipped = terms * (0.1 / a).clamp(max=0.02) / (0.1 / a)
    close(distill_loss(student, log_p, a, 0.1, mask, beta_clip=0.02), (clipped[0].mean() + clipped[1, 0]) / 2)


def test_the_gradient_of_the_loss():
    plus, minus, student = scores(3, 1, 2, 7)
    log_p, a = teacher(plus, minus, plus)
    mask, student = torch.tensor([[True, True]]), student.requires_grad_()
    loss = lambda z: distill_loss(z, log_p, a, 0.1, mask)
    assert torch.autograd.gradcheck(loss, (student,), rtol=1e-6)  # central differences
    loss(student).backward()
    log_q = student.detach().log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1, keepdim=True)
    close(student.grad, (0.1 / a)[..., None] / 2 * log_q.exp() * (log_q - log_p - kl))


# --- what the objective is: an enumerable model, vocabulary 3, length 2 ---


class Enumerable:
    """A random model of two tokens: logs of p(first) [3] and p(second | first) [3, 3], as one [4, 3] table."""

    def __init__(self, seed: int):
        self.log_p = scores(1, 4, 3, seed=seed)[0].log_softmax(-1)

    def expect(self, per_step: Tensor) -> Tensor:
        """E_y sum_t f(prefix_t): per_step [4], the empty prefix first."""
        return per_step[0] + (self.log_p[0].exp() * per_step[1:]).sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0, 2.0, 3.5])
def test_the_objective_of_theorem_1_is_the_distance_to_the_teacher_plus_a_prefix_term(ratio):
    reference, dpo, policy = (Enumerable(seed) for seed in (1, 2, 3))
    beta, beta0 = 0.3, 0.3 * ratio
    reward = beta0 * (policy.log_p.exp() * (dpo.log_p - reference.log_p)).sum(-1)
    objective = policy.expect(reward - beta * kl(policy.log_p, reference.log_p))
    log_teacher, _ = teacher(dpo.log_p, reference.log_p, reference.log_p, coefficient=ratio)
    log_z = (ratio * dpo.log_p + (1 - ratio) * reference.log_p).logsumexp(-1)
    close(objective, policy.expect(beta * log_z - beta * kl(policy.log_p, log_teacher)))
    if ratio in (0.0, 1.0):
        close(log_z, torch.zeros_like(log_z))
    else:
        assert (log_z > 0).all() if ratio > 1 else (log_z < 0).all()


def test_the_same_for_the_contrastive_version():
    dpo, reverse, policy, beta0, beta = Enumerable(1), Enumerable(2), Enumerable(3), 0.1, 0.04
    d = dpo.log_p - reverse.log_p
    log_teacher, a = teacher(dpo.log_p, reverse.log_p, dpo.log_p, coefficient=beta0 / beta)
    prefix = (dpo.log_p + a[:, None] * d).logsumexp(-1)  # A_t(a)
    objective = beta0 * (policy.log_p.exp() * d).sum(-1) - beta * kl(policy.log_p, dpo.log_p)
    close(policy.expect(objective), policy.expect(beta * prefix - beta * kl(policy.log_p, log_teacher)))
    assert (prefix >= a * kl(dpo.log_p, reverse.log_p)).all()


def test_the_same_for_the_adaptive_version():
    dpo, reverse, policy, beta0 = Enumerable(1), Enumerable(2), Enumerable(3), 0.1
    d = dpo.log_p - reverse.log_p
    log_teacher, a = teacher(dpo.log_p, reverse.log_p, dpo.log_p, r=20.0)
    beta = beta0 / a
    prefix = (dpo.log_p + a[:, None] * d).logsumexp(-1)
    objective = beta0 * (policy.log_p.exp() * d).sum(-1) - beta * kl(policy.log_p, dpo.log_p)
    close(policy.expect(-beta * kl(policy.log_p, log_teacher)), policy.expect(objective - beta * prefix))
