"""Suppression: hand-worked numbers, the fixed point of the published rule, matches against a brute-force scan."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import WIDTH, tiny_model, tiny_tokenizer

import logitproc as lp
from logitproc.methods.suppression import exempt_ids, overuse_penalty, reference_shares, share_penalty

Suppression = lp.SuppressionLogitsProcessor
EOS = 2
ABOUT = {"fingerprint": "", "name": "ids", "vocab_size": WIDTH, "bos": 1, "eos": EOS, "special": [0, 1, EOS]}


def ledger(items=(), label=None, **options) -> lp.TokenLedger:
    made = lp.TokenLedger(ABOUT, **options)
    if items:
        made.update(items, label)
    return made


def reference(items) -> lp.NGramPrior:
    return lp.NGramPrior.from_ids(items, order=1, vocab_size=WIDTH)


def bias(processor: Suppression, tokens=(), generated=None) -> torch.Tensor:
    """What the processor adds to one row of random scores, rounded to what float32 keeps."""
    scores = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))
    history = torch.tensor([list(tokens)], dtype=torch.int64).reshape(1, -1)
    count = torch.tensor([len(tokens) if generated is None else generated])
    return (processor.apply(history, scores, count).double() - scores.double())[0]


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected).to(found), atol=tolerance, rtol=0)


# --- the published rule ---


def test_paper_by_hand():
    # 1000 tokens with shares 2, 1, .5 and .1 %, and a filler: -7.5 per percent, capped at -7.5.
    text = [10] * 20 + [11] * 10 + [12] * 5 + [13] * 1 + [14] * 964
    out = bias(Suppression(ledger([text]), rule="paper"))
    close(out[10:14], [-7.5, -7.5, -3.75, -0.75])
    odds = out[[10, 12, 13]].exp()
    close(odds, [5.531e-4, 0.02352, 0.4724], 5e-5)
    assert not out[[*range(10), *range(15, WIDTH)]].any()


def test_paper_biases_the_hundred_commonest_and_of_equals_the_lower_ids():
    counts = np.array([0, 5, 3, 3, 3, 9])
    penalty = share_penalty(counts, 7.5, top=4)
    assert penalty.nonzero()[0].tolist() == [1, 2, 3, 5]
    many = np.concatenate([np.full(150, 7), np.zeros(20)]).astype(np.int64)
    assert share_penalty(many, 7.5, top=100).nonzero()[0].tolist() == list(range(100))
    assert share_penalty(many, 7.5, top=None).nonzero()[0].tolist() == list(range(150))


@pytest.mark.parametrize("temperature, acts_as", [(0.3, -25.0), (0.7, -10.714), (0.9, -8.333), (1.3, -5.769)])
def test_a_bias_acts_divided_by_the_temperature_unless_it_is_compensated(temperature, acts_as):
    text = [[10] * 50 + [11] * 50]
    close(bias(Suppression(ledger(text), rule="paper"))[10] / temperature, acts_as, 1e-3)
    compensated = Suppression(ledger(text), rule="paper", temperature=temperature)
    close(bias(compensated)[10] / temperature, -7.5)


def lambert(x: float) -> float:
    """W(x) for x > 0 by Newton: w exp(w) = x."""
    w = math.log1p(x)
    for _ in range(50):
        w -= (w * math.exp(w) - x) / (math.exp(w) * (w + 1))
    return w


def test_the_stationary_share_is_a_value_of_lamberts_function():
    for percent, stationary in ((10, 0.4220), (5, 0.3533), (1, 0.2088)):
        assert lambert(7.5 * percent) / 7.5 == pytest.approx(stationary, abs=5e-5)
    # Independent tokens: the expected counts of each round are added, so the run is deterministic.
    p = 1 / np.arange(1, 5001)
    p /= p.sum()
    counts = np.zeros(5000)
    for _ in range(280):
        penalty = np.minimum(share_penalty(counts, 7.5, None), 7.5) if counts.any() else np.zeros(5000)
        weight = p * np.exp(-penalty)
        counts += 500 * weight / weight.sum()
    z = weight.sum()  # the mass that the biases leave
    for token in range(5):
        now = weight[token] / z * 100
        assert now == pytest.approx(lambert(7.5 * 100 * p[token] / z) / 7.5, rel=2e-3)
    assert weight[0] / z < 0.006 < p[0], "the commonest token is driven below .6 %"


def test_the_simulation_also_holds_for_drawn_tokens():
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 5001)
    p /= p.sum()
    counts = np.zeros(5000, np.int64)
    for _ in range(280):
        penalty = np.minimum(share_penalty(counts, 7.5, 100), 7.5) if counts.any() else np.zeros(5000)
        weight = p * np.exp(-penalty)
        counts += rng.multinomial(500, weight / weight.sum())
    np.testing.assert_allclose(100 * counts[:5] / counts.sum(), [0.50, 0.43, 0.38, 0.36, 0.33], atol=0.06)
    entropy = lambda q: -(q * np.log(np.maximum(q, 1e-300))).sum()
    assert entropy(p) == pytest.approx(6.19, abs=0.01)
    assert entropy(counts / counts.sum()) == pytest.approx(7.80, abs=0.02)


# --- ratio ---


def test_ratio_by_hand():
    # 80 of 10,000 tokens where the reference has .2 %: ln 4 raw, ln(41000 / 11000) with A = 1000.
    counts, shares = np.array([80, 9920]), np.array([0.002, 0.998])
    assert overuse_penalty(counts, shares, 1.0, 0)[0] == pytest.approx(1.3863, abs=5e-5)
    assert overuse_penalty(counts, shares, 1.0, 1000)[0] == pytest.approx(1.3157, abs=5e-5)
    assert overuse_penalty(counts, shares, 1.0, 0)[1] == 0


def test_a_text_like_its_reference_is_left_alone_and_no_penalty_is_negative():
    shares = np.random.default_rng(0).dirichlet(np.ones(50))
    assert np.abs(overuse_penalty(shares * 10_000, shares, 3.0, 0)).max() < 1e-12
    counts = np.random.default_rng(1).integers(0, 400, 50)
    penalty = overuse_penalty(counts, shares, 1.0, 100)
    assert (penalty >= 0).all() and (penalty[counts / counts.sum() <= shares] == 0).all()
    assert (overuse_penalty(counts, shares, 1.0, 1e12) < 1e-4).all(), "no evidence, no penalty"


def test_the_fixed_point_of_ratio_is_a_geometric_mean_of_base_and_reference():
    for strength, expected in ((1.0, 0.4), (3.0, 0.2828)):
        share, base, ref = 0.8, 0.8, 0.2  # percent; the rest of the mass is so large that Z = 1
        for _ in range(200):
            penalty = overuse_penalty(np.array([share, 100 - share]), np.array([ref, 100 - ref]) / 100, strength, 0)
            share += 0.2 * (base * math.exp(-penalty[0]) - share)
        assert share == pytest.approx(expected, abs=1e-3)


def test_the_reference_is_add_one_over_the_vocabulary_without_special_tokens():
    prior = lp.NGramPrior.from_ids([[5, 5, 6], [5]], order=2, vocab_size=WIDTH, eos=EOS)
    shares = reference_shares(prior)
    assert shares.sum() == pytest.approx(1)
    assert shares[5] == pytest.approx(4 / (4 + WIDTH)) and shares[EOS] == shares[9] == 1 / (4 + WIDTH)


def test_scopes_pool_keep_apart_or_take_the_least():
    made = ledger([[10] * 50 + [11] * 50], "a")
    made.update([[10] * 50 + [12] * 50], "b")
    real = reference([list(range(3, WIDTH))])
    settings = {"reference": real, "shrinkage": 0.0, "strength": 1.0, "cap": 100.0}
    pooled = bias(Suppression(made, **settings, scope="global"))
    own = bias(Suppression(made, **settings, scope="label", label="a"))
    common = bias(Suppression(made, **settings))
    assert Suppression(made, **settings).scope == "common", "the default of ratio"
    assert pooled[[10, 11, 12]].lt(0).all()
    assert own[[10, 11]].lt(0).all() and own[12] == 0
    assert common[10] < 0 and not common[[11, 12]].any(), "what marks a label is spared"
    assert not bias(Suppression(made, **settings, scope="label", label="new")).any()


# --- options of all rules ---


@pytest.mark.parametrize("rule", ["paper", "ratio", "dry"])
def test_exempt_and_special_tokens_keep_their_scores_and_the_cap_holds(rule):
    made = ledger([[5, 10, 11, 10, 11]] * 9, texts=True)
    options = {"rule": rule, "length": 1, "strength": 50.0, "cap": 3.0}
    options |= {"reference": reference([[5]])} if rule == "ratio" else {}
    free = bias(Suppression(made, **options), [10])
    assert free[11] == pytest.approx(-3, abs=1e-6) and free.min() >= -3 - 1e-6 and free.max() <= 0
    assert not bias(Suppression(made, **options, exempt=(10, 11)), [10])[[10, 11, 0, 1, EOS]].any()


@pytest.mark.parametrize("rule", ["paper", "ratio", "dry"])
@pytest.mark.parametrize("shrinkage", [0.0, 1000.0])
def test_an_empty_ledger_returns_the_scores_bit_for_bit(rule, shrinkage):
    extra = {"reference": reference([[5]])} if rule == "ratio" else {}
    made = Suppression(ledger(texts=True), rule=rule, shrinkage=shrinkage, **extra)
    scores = torch.randn(3, WIDTH)
    assert torch.equal(made(torch.full((3, 4), 5), scores), scores)


def test_a_generation_never_sees_its_own_counts():
    made = ledger([[10, 11]])
    processor = Suppression(made, rule="paper")
    before = bias(processor)
    made.update([[12] * 100])
    processor.ledger.view()
    assert torch.equal(bias(processor), before) and bias(processor)[12] == 0
    assert bias(Suppression(made, rule="paper"))[12] < 0
    with pytest.raises(ValueError, match="view of a ledger"):
        processor.ledger.update([[5]])


def test_exempt_ids_by_kind():
    tokenizer = tiny_tokenizer()
    assert exempt_ids(tokenizer) == ()
    assert exempt_ids(tokenizer, words=["w9", "w11"]) == (9, 11)
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(lp.pocket("base"))
    words = lambda **kinds: set(real.convert_ids_to_tokens(exempt_ids(real, **kinds)))
    assert {",", ".", '"'} <= words(punctuation=True) and not {"a", "▁the"} & words(punctuation=True)
    assert {"▁the", "▁of", "▁The"} <= words(function_words=True) and "the" not in words(function_words=True)
    assert "7" in words(digits=True)
    assert not set(exempt_ids(real, punctuation=True, digits=True)) & set(real.all_special_ids)


# --- dry ---


def test_dry_by_hand():
    # An item holds 10 11 12 13 14 15 16. After its first n tokens the next one has a match of length n.
    made = ledger([[10, 11, 12, 13, 14, 15, 16]], texts=True)
    options = {"rule": "dry", "strength": 0.8, "base": 1.75, "min_items": 1, "length": 2, "anchor": False}
    free = Suppression(made, **options, cap=100.0)
    for n, nats in ((1, 0.0), (2, 0.8), (3, 1.4), (4, 2.45), (5, 4.2875), (6, 7.503)):
        out = bias(free, range(10, 10 + n))
        assert out[10 + n].item() == pytest.approx(-nats, abs=1e-3)
        assert not out[[t for t in range(WIDTH) if t != 10 + n]].any()
    capped = Suppression(made, **options, cap=3.0)
    assert bias(capped, range(10, 16))[16] == pytest.approx(-3.0, abs=1e-6)
    short = Suppression(made, **options, cap=100.0, longest=3)
    assert bias(short, range(10, 16))[16] == pytest.approx(-1.4, abs=1e-6)


def test_breakers_end_a_match_and_are_never_penalised():
    made = ledger([[10, 11, 4, 12, 13, 14]], texts=True)
    options = {"rule": "dry", "min_items": 1, "anchor": False, "breakers": (4,)}
    assert not bias(Suppression(made, **options, length=2), [10, 11]).any(), "4 would follow"
    assert not bias(Suppression(made, **options, length=2), [11, 4, 12]).any(), "one token since the breaker"
    out = bias(Suppression(made, **options, length=1), [10, 11, 4, 12, 13])
    assert out.nonzero().flatten().tolist() == [14] and out[14].item() == pytest.approx(-0.8 * 1.75, abs=1e-6)


def test_a_phrase_of_too_few_items_does_not_count():
    made = ledger([[10, 11, 10, 11, 10, 11], [10, 12]], texts=True)
    out = bias(Suppression(made, rule="dry", length=1, min_items=1, anchor=False), [10])
    assert out.nonzero().flatten().tolist() == [11, 12]
    two = Suppression(made, rule="dry", length=1, min_items=2, anchor=False)
    assert not bias(two, [10]).any(), "one item says it three times"
    made.update([[10, 12]])
    two = Suppression(made, rule="dry", length=1, min_items=2, anchor=False)
    assert bias(two, [10]).nonzero().flatten().tolist() == [12]


def test_the_start_of_a_text_matches_as_a_token_and_prompts_do_not_match():
    made = ledger([[10, 11, 12]], texts=True)
    options = {"rule": "dry", "length": 2, "min_items": 1}
    anchored, loose = Suppression(made, **options), Suppression(made, **options, anchor=False)
    assert bias(anchored, [50, 51, 10], generated=1)[11] < 0, "the start and one token are two"
    assert not bias(loose, [50, 51, 10], generated=1).any()
    assert not bias(anchored, [50, 10, 11, 60, 10], generated=2).any(), "not at the start"
    assert not bias(loose, [50, 10, 11], generated=1).any(), "10 was prompted"
    assert bias(loose, [50, 10, 11], generated=2)[12] < 0


def brute_force(texts, history, length, longest, min_items, anchor, breakers) -> dict[int, int]:
    """token -> longest match: scans all texts for every suffix of the history."""
    start = ["start"] if anchor else []
    usable = [*start, *history]
    while any(token in breakers for token in usable):
        usable = usable[1:]
    found = {}
    for n in range(length, min(longest, len(usable)) + 1):
        followers: dict[int, set] = {}
        for number, text in enumerate(texts):
            symbols = [*start, *text]
            for i in range(len(symbols) - n):
                if symbols[i : i + n] == usable[len(usable) - n :]:
                    followers.setdefault(symbols[i + n], set()).add(number)
        found |= {t: n for t, items in followers.items() if len(items) >= min_items and t not in breakers}
    return found


@pytest.mark.parametrize("length, min_items, anchor, breakers", [
    (1, 1, False, ()), (2, 2, True, (4,)), (1, 3, True, (3, 5)), (3, 1, True, ()),
])  # fmt: skip
def test_dry_agrees_with_a_scan_on_random_texts(length, min_items, anchor, breakers):
    rng = np.random.default_rng(length)
    texts = [rng.integers(3, 8, rng.integers(0, 12)).tolist() for _ in range(30)]
    made = ledger(texts, texts=True)
    processor = Suppression(made, rule="dry", length=length, longest=length + 4, min_items=min_items, anchor=anchor,
                            breakers=breakers, strength=1.0, base=2.0, cap=1e6)  # fmt: skip
    matched = 0
    for _ in range(150):
        history = rng.integers(3, 8, rng.integers(0, 10)).tolist()
        expected = torch.zeros(WIDTH, dtype=torch.float64)
        for token, n in brute_force(texts, history, length, length + 4, min_items, anchor, breakers).items():
            expected[token] = -(2.0 ** (n - length))
            matched += 1
        close(bias(processor, [60, 61, *history], generated=len(history)), expected, 1e-5)
    assert matched > 50


# --- in generate ---


def test_left_padded_and_single_prompts_give_one_text_and_one_ledger():
    model, prompts = tiny_model(), [[5, 6, 7, 8, 9], [8, 7], [5]]
    made = ledger([[10, 11, 12, 13] * 5, [20, 21] * 9] * 3, texts=True)
    for rule in ("paper", "dry"):
        chain = lp.Chain([Suppression(made, rule=rule, length=1, strength=9.0)])
        padded = torch.tensor([[0] * (5 - len(p)) + p for p in prompts])
        options = {"max_new_tokens": 9, "do_sample": False}
        batch = lp.generate(model, chain, input_ids=padded, attention_mask=(padded != 0).long(), **options)[:, 5:]
        alone = [lp.generate(model, chain, input_ids=torch.tensor([p]), **options)[0, len(p) :] for p in prompts]
        assert torch.equal(batch, torch.stack(alone))
        both, one = ledger(), ledger()
        both.update(batch)
        one.update(alone)
        assert both.hash() == one.hash() and both.counts().sum() == batch.numel()


def test_temperature_is_the_identity_at_one_and_spreads_above():
    from transformers import TemperatureLogitsWarper

    scores, none = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)), torch.empty(4, 0)
    warp = lambda t: TemperatureLogitsWarper(t)(none, scores).softmax(-1)
    assert torch.equal(warp(1.0), scores.softmax(-1))
    close(warp(1e7), torch.full_like(scores, 1 / WIDTH))
    entropies = [torch.special.entr(warp(t)).sum(-1) for t in (0.3, 0.7, 0.9, 1.3, 3.0)]
    assert all((b >= a).all() for a, b in itertools.pairwise(entropies))


# --- bad input ---


@pytest.mark.parametrize("options, sentence", [
    ({"rule": "papr"}, "rule must be one of paper, ratio, dry"),
    ({"scope": "all"}, "scope must be one of global, label, common"),
    ({"rule": "ratio"}, "needs a reference"),
    ({"rule": "paper", "reference": 1}, "no other rule takes one"),
    ({"rule": "paper", "scope": "label"}, "needs the label of the rows"),
    ({"rule": "dry"}, "texts=True"),
    ({"rule": "dry", "scope": "common"}, "'global' or 'label'"),
    ({"rule": "paper", "strength": -1.0}, "strength must be a number at least 0, got -1.0"),
    ({"rule": "paper", "top": 0}, "top must be a number at least 1"),
    ({"rule": "paper", "exempt": (WIDTH,)}, "exempt must be a number in"),
    ({"rule": "dry", "length": 9, "longest": 5}, "longest must be a number at least 9"),
])  # fmt: skip
def test_bad_parameters_are_refused_with_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Suppression(ledger([[5]]), **options)


def test_a_ledger_of_another_tokenizer_is_refused():
    chain = lp.Chain([Suppression(ledger([[5]]), rule="paper")])
    with pytest.raises(ValueError, match="token-ledger was fitted for the tokenizer"):
        chain.check(tokenizer=tiny_tokenizer())
    other = lp.NGramPrior.from_ids([[5]], order=1, vocab_size=WIDTH)
    other.tokenizer = {**other.tokenizer, "fingerprint": "b", "name": "other"}
    with pytest.raises(ValueError, match="tokens of other, the ledger those of ids"):
        Suppression(ledger([[5]]), rule="ratio", reference=other)
    with pytest.raises(ValueError, match="must be a TokenLedger, got str"):
        Suppression("folder", rule="paper")
