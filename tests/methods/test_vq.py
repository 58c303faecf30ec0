import math

import pytest
import torch
from heads.conftest import Stub, calibration
from torch.nn.functional import linear

import logitproc as lp
from logitproc.heads import KINDS
from logitproc.heads.clustering import means
from logitproc.methods.vq import VQLogitsProcessor, share_logits, uncapped


def head_of_means(weight, codes=9, weighted=True, seed=0):
    """A head whose codes are weighted means of the rows of `weight`, with a bias."""
    random = torch.Generator().manual_seed(seed)
    mapping = torch.randint(0, codes, (len(weight),), generator=random)
    mapping[:codes] = torch.arange(codes)
    omega = torch.rand(len(weight), generator=random) + 0.1 if weighted else torch.ones(len(weight))
    bias = torch.randn(len(weight), generator=random) if weighted else None
    kind = KINDS["weighted" if weighted else "paper"]
    head = kind.build(means(weight, omega, mapping, codes), mapping, bias, dtype=weight.dtype)
    head.token_weights, head.token_bias = omega, bias
    return head


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_worked_example():
    # Tokens 0 and 2 share a code with weights 1 and 3: (1 * 2 + 3 * 6) / 4 = 5; token 1 is alone.
    mapping, omega = torch.tensor([0, 1, 0]), torch.tensor([1.0, 2.0, 3.0])
    assert share_logits(torch.tensor([[2.0, 7.0, 6.0]]), mapping, omega, 2).tolist() == [[5, 7, 5]]


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_of_dense_logits_is_the_logit_of_the_mean_row(weighted):
    weight, states = draw(50, 8).double(), draw(20, 8, seed=1).double()
    head = head_of_means(weight, weighted=weighted)
    shared = share_logits(linear(states, weight), head.mapping[0].long(), head.token_weights.double(), 9)
    expected = linear(states, head.codes.detach())[:, head.mapping[0].long()]
    assert float((shared - expected).abs().max()) < 1e-10


@pytest.mark.parametrize("weighted", [False, True])
def test_the_preview_shows_what_the_head_returns(weighted):
    weight, states = draw(50, 8), draw(20, 8, seed=1)
    head = head_of_means(weight, weighted=weighted)
    found = VQLogitsProcessor(head)(torch.zeros(20, 1).long(), linear(states, weight))
    torch.testing.assert_close(found, head(states), rtol=1e-5, atol=1e-5)


def test_preview_head_and_converted_model_say_the_same_greedily(model):
    head = head_of_means(model.get_output_embeddings().weight.detach())
    prompt = torch.tensor([[5, 6, 7]])
    preview = model.generate(
        prompt, logits_processor=[lp.Chain([VQLogitsProcessor(head)])], max_new_tokens=12
    )
    with lp.attach(model, head):
        attached = model.generate(prompt, max_new_tokens=12)
    converted = lp.convert(model, head).generate(prompt, max_new_tokens=12)
    assert preview.tolist() == attached.tolist() == converted.tolist()


def test_a_dense_bias_is_not_counted_twice():
    beta = draw(61)
    cal = calibration(bias=beta)
    for kind in ("paper", "weighted"):
        head = lp.VQHead.fit(Stub(cal), cal, codes=20, kind=kind)
        preview = VQLogitsProcessor(head)(torch.zeros(600, 1).long(), linear(cal.states, cal.weight, beta))
        torch.testing.assert_close(preview, head(cal.states), rtol=1e-4, atol=1e-4)


def test_soft_capped_logits_are_uncapped_for_the_mean():
    weight, states, cap = draw(50, 8), draw(20, 8, seed=1), 10.0
    head, raw = head_of_means(weight), linear(draw(20, 8, seed=1), weight)
    capped = cap * (raw / cap).tanh()
    torch.testing.assert_close(uncapped(capped, cap), raw, rtol=1e-4, atol=1e-4)
    found = VQLogitsProcessor(head, softcap=cap)(torch.zeros(20, 1).long(), capped)
    torch.testing.assert_close(found, cap * (head(states) / cap).tanh(), rtol=1e-4, atol=1e-4)
    assert math.isfinite(uncapped(torch.tensor(cap), cap))


def test_a_forbidden_token_leaves_the_mean_of_the_others():
    mapping, omega = torch.tensor([0, 0, 0]), torch.ones(3)
    scores = torch.tensor([[2.0, -torch.inf, 6.0], [1.0, -torch.inf, -torch.inf]])
    assert share_logits(scores, mapping, omega, 1).tolist() == [[4, -math.inf, 4], [1, -math.inf, -math.inf]]


def test_scores_beyond_the_head_are_left_alone_and_a_wider_head_is_cut():
    processor = VQLogitsProcessor.example(20)
    scores = draw(3, 25)
    out = processor(torch.zeros(3, 1).long(), scores)
    assert torch.equal(out[:, 20:], scores[:, 20:]) and not torch.equal(out[:, :20], scores[:, :20])
    assert processor(torch.zeros(3, 1).long(), scores[:, :15]).shape == (3, 15)


@pytest.mark.parametrize("kind", ["distilled", "tiebreak", "residual"])
def test_codes_that_are_no_means_have_no_preview(kind):
    head = KINDS[kind].build(torch.zeros(4, 2), torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"{kind!r} has no preview"):
        VQLogitsProcessor(head)


def test_a_softcap_must_be_positive():
    with pytest.raises(ValueError, match="softcap must be a number"):
        VQLogitsProcessor(VQLogitsProcessor.example(9).head, softcap=0.0)
