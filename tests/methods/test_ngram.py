"""`ngram`: worked numbers of the specification, each rule against dictionaries, each option's promise."""

import math

import numpy as np
import pytest
import torch
from ngram_reference import Reference

import logitproc as lp
from logitproc.counting import NGramCounter
from logitproc.methods.ngram import DEFAULTS, OFF, NGramStyleLogitsProcessor
from logitproc.ops import loop_guard
from logitproc.ops.history import affordable_temperature

A, B, C = 0, 1, 2
RULES = ("paper", "lift", "backoff", "ratio")
WEIGHTS = (0.1, 0.3, 0.6, 0.6, 0.6)


def zipf_documents(seed, vocab, documents=30, length=25):
    rng = np.random.default_rng(seed)
    return np.minimum(rng.zipf(1.4, size=(documents, length)) - 1, vocab - 2).tolist()


@pytest.fixture(scope="module")
def documents():
    return zipf_documents(0, 50)


@pytest.fixture(scope="module")
def prior(documents):
    return lp.NGramPrior.from_ids(documents, order=3, vocab_size=50)


def processor(prior, rule="backoff", **options):
    """The bare formula of a rule, and the options that a test is about."""
    options = OFF | {"strength": 0.3} | options
    if rule == "ratio":
        options.setdefault("background", lp.NGramPrior.from_ids(zipf_documents(9, 50), 3, 50))
    return NGramStyleLogitsProcessor(prior, rule=rule, **options)


def random_rows(seed=0, rows=6, length=7, vocab=50):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 12, (rows, length), generator=generator)
    return tokens, 3 * torch.randn(rows, vocab, generator=generator)


# --- worked numbers ---


@pytest.mark.parametrize(
    "count, total, expected",
    [(1, 1, 0.030333), (2, 2, 0.058853), (10, 10, 0.238119), (32, 32, 0.500016), (100, 100, 0.757583),
     (0, 1, 3.0303e-5)],
)  # fmt: skip
def test_add_k_over_a_real_vocabulary(count, total, expected):
    # One document `7 8 7 8 ...` sees 8 after 7 `total` times; P_2(8 | 7) is read off the paper's bias.
    documents = [[7, 8]] * total
    prior = lp.NGramPrior.from_ids(documents, order=2, vocab_size=32_000)
    target = 8 if count else 9
    mixed = math.exp(prior.log_mixture([target], [7])[0])
    unigram = ((total if count else 0) + 1e-3) / (2 * total + 32)
    assert (mixed * 0.4 - 0.1 * unigram) / 0.3 == pytest.approx(expected, rel=2e-5)


def test_the_worked_bias_of_the_specification_and_its_odds():
    # P_1 = .001; seen once in a bigram context of 10 and once in a trigram context of 1, V = 32,000:
    # .1 ln(.001) + .3 ln(1.001/42) + .6 ln(1.001/33) = -.691 - 1.121 - 2.097 = -3.909; odds e^3.909.
    v = 32_000
    corpus = [[100, 101, 102]] + [[101, 200 + i] for i in range(9)]
    corpus += [[300 + i] for i in range(900)]
    total = sum(map(len, corpus))
    prior = lp.NGramPrior.from_ids(corpus, order=3, vocab_size=v)
    bias = processor(prior, rule="paper", strength=1.0)
    z = torch.zeros(1, v)
    change = (bias(torch.tensor([[100, 101]]), z) - z)[0]
    p1 = 1.001 / (total + 32)
    expected = 0.1 * math.log(p1) + 0.3 * math.log(1.001 / 42) + 0.6 * math.log(1.001 / 33)
    assert change[102].item() == pytest.approx(expected, rel=1e-6)
    worked = 0.1 * math.log(0.001) + 0.3 * math.log(1.001 / 42) + 0.6 * math.log(1.001 / 33)
    assert worked == pytest.approx(-3.9091, abs=1e-4) and math.exp(-worked) == pytest.approx(49.85, abs=0.01)
    assert change[300].item() == pytest.approx(0.1 * math.log(p1), rel=1e-6)  # known as a unigram only
    assert change[31_999].item() == 0.0


def test_lift_of_one_and_of_ten_occurrences():
    prior = lp.NGramPrior.from_ids([[5]] + [[6]] * 10, order=1, vocab_size=16)
    change = processor(prior, rule="lift", strength=1.0, weights=(1.0,))(
        torch.tensor([[0]]), torch.zeros(1, 16)
    )[0]
    assert change[5].item() == pytest.approx(math.log(1001), abs=1e-5)
    assert change[6].item() == pytest.approx(math.log(10001), abs=1e-5)
    assert change[7].item() == 0.0


# Printed by KenLM's `lmplz -o 3 --discount_fallback` for the documents `a b a b c`, `a b c`, `b c a`,
# with V = 5: a, b, c, </s>, <unk>. log10 p, then log10 of the back-off.
FIXTURE_DOCUMENTS = [[A, B, A, B, C], [A, B, C], [B, C, A]]
END, UNKNOWN, START = 3, 4, 5
FIXTURE_DISCOUNTS = [(0.5, 1, 1.5), (0.555556, 1.166667, 3), (0.5, 1, 1.5)]
FIXTURE = {
    (UNKNOWN,): (-1, None), (END,): (-0.6478175, None), (A,): (-0.54136217, -0.2410321),
    (B,): (-0.6478175, -0.2410321), (C,): (-0.78914666, -0.25527254), (START,): (None, -0.2410321),
    (A, END): (-0.557027, None), (C, END): (-0.4593925, None), (START, A): (-0.3537688, -0.30103),
    (B, A): (-0.5041859, -0.30103), (C, A): (-0.4179998, -0.30103), (START, B): (-0.557027, -0.30103),
    (A, B): (-0.39046487, -0.30103), (B, C): (-0.43055022, -0.30103),
    (C, A, END): (-0.19473207, None), (B, C, END): (-0.2950396, None), (A, B, A): (-0.4904428, None),
    (B, C, A): (-0.44655526, None), (START, A, B): (-0.15275303, None), (B, A, B): (-0.15275303, None),
    (START, B, C): (-0.16397204, None), (A, B, C): (-0.28494498, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def fixture_prior():
    return lp.NGramPrior.from_ids(FIXTURE_DOCUMENTS, 3, 5, eos=END, discounts=FIXTURE_DISCOUNTS)


def test_kneser_ney_is_that_of_kenlm(fixture_prior):
    for gram, (log10, _) in FIXTURE.items():
        if log10 is not None:
            start = gram[0] == START
            context = [t for t in gram[:-1] if t != START]
            value = fixture_prior.log_prob([gram[-1]], context, bos=start)[0]
            assert value / math.log(10) == pytest.approx(log10, abs=2e-6), gram


def test_backoffs_and_discounts_are_those_of_kenlm(fixture_prior, tmp_path):
    fixture_prior.to_arpa(tmp_path / "lm.arpa")
    words = {"t0": A, "t1": B, "t2": C, "</s>": END, "<s>": START, "<unk>": UNKNOWN}
    backoffs = {}
    for line in (tmp_path / "lm.arpa").read_text().splitlines():
        if len(fields := line.split("\t")) == 3:
            backoffs[tuple(words[w] for w in fields[1].split())] = float(fields[2])
    for gram, (_, backoff) in FIXTURE.items():
        if backoff is not None:
            assert backoffs[gram] == pytest.approx(backoff, abs=2e-6), gram


def test_discounts_are_estimated_from_the_counts_of_counts(caplog):
    # Left neighbours: a {<s>, b, c}, b {<s>, a}, c {b}, </s> {a, c}: n1 = 1, n2 = 2, n3 = 1, n4 = 0,
    # Y = 1/5, D = 1 - 2/5 x 2, 2 - 3/5 x 1/2, 3. Bigrams have n3 = 0 and trigrams too: the fallback.
    prior = lp.NGramPrior.from_ids(FIXTURE_DOCUMENTS, 3, 5, eos=END)
    first, second, third = prior.kneser_ney.discounts
    assert first == pytest.approx((0.2, 1.7, 3.0))
    assert second == third == (0.5, 1.0, 1.5)
    assert "discounts of order 2" in caplog.text and "discounts of order 1;" not in caplog.text


def test_kneser_ney_by_hand(fixture_prior):
    # p(a) = 1.5/8 + .5/5 = .2875; p(b|a) = (2 - 1.166667)/3 + .574074 x .225 = .406944
    assert math.exp(fixture_prior.log_prob([A])[0]) == pytest.approx(0.2875)
    assert math.exp(fixture_prior.log_prob([B], [UNKNOWN, A])[0]) == pytest.approx(0.406944, abs=1e-6)


# --- against dictionaries ---


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_equals_the_dictionary_reference(rule, order):
    documents, v = zipf_documents(1, 50), 50
    prior = lp.NGramPrior.from_ids(documents, order, v)
    reference = Reference(documents, order, v)
    other = zipf_documents(2, 50)
    background = lp.NGramPrior.from_ids(other, order, v) if rule == "ratio" else None
    bias = processor(prior, rule=rule, strength=0.7, background=background)
    tokens, z = random_rows(order)
    tokens[0] = torch.tensor(documents[0][:7])  # a history that matches at every order
    change = (bias(tokens, z) - z).double()
    for row, history in enumerate(tokens.tolist()):
        if rule in ("paper", "lift"):
            g = [reference.sparse(rule, history, t, 1e-3, WEIGHTS) for t in range(v)]
        else:
            g = [math.log(reference.kneser_ney(history, t)) for t in range(v)]
            if rule == "ratio":
                below = Reference(other, order, v)
                g = [x - math.log(below.kneser_ney(history, t)) for t, x in enumerate(g)]
        expected = 0.7 * torch.tensor(g, dtype=torch.float64)
        if rule in ("backoff", "ratio"):  # centred: E_p[g] = 0
            expected -= (z[row].double().softmax(0) * expected).sum()
        torch.testing.assert_close(change[row], expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("confidence", ["wb", "count(5)"])
@pytest.mark.parametrize("rule", ["paper", "lift"])
def test_confidence_multiplies_the_term_of_its_context(documents, prior, rule, confidence):
    reference = Reference(documents, 3, 50)
    tokens, z = random_rows()
    change = processor(prior, rule, strength=1.0, confidence=confidence)(tokens, z) - z
    for row, history in enumerate(tokens.tolist()):
        expected = [reference.sparse(rule, history, t, 1e-3, WEIGHTS, confidence) for t in range(50)]
        torch.testing.assert_close(change[row], torch.tensor(expected), atol=5e-6, rtol=1e-5)


def test_witten_bell_trusts_one_follower_seen_once_by_half():
    prior = lp.NGramPrior.from_ids([[1, 2]], order=2, vocab_size=8)
    trusted, plain = (
        processor(prior, strength=1.0, confidence=c)(torch.tensor([[1]]), torch.zeros(1, 8))
        for c in ("wb", "none")
    )
    torch.testing.assert_close(trusted, plain / 2)


def test_the_mixture_scores_text_with_the_orders_whose_context_was_seen(documents, prior):
    reference = Reference(documents, 3, 50)
    text = documents[3] + [49, 3, 1]  # 49 was never seen
    got = prior.log_mixture(text)
    for t, token in enumerate(text):
        assert math.exp(got[t]) == pytest.approx(reference.mixture(text[:t], token, 1e-3, WEIGHTS))


def test_only_the_512_commonest_followers_count_ties_to_lower_ids():
    corpus = [[0, t] for t in range(1, 601)] + [[0, 600]]
    prior = lp.NGramPrior.from_ids(corpus, order=2, vocab_size=700)
    bias = processor(prior, rule="lift", strength=1.0, weights=(0.0, 1.0))
    changed = (bias(torch.tensor([[0]]), torch.zeros(1, 700))[0] != 0).nonzero().flatten().tolist()
    assert changed == [*range(1, 512), 600]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_of_every_context_sums_to_one(order, documents):
    prior = lp.NGramPrior.from_ids(documents, order, 50, eos=49)
    for history in ([], [0], [0, 1], documents[0][:4], [48, 47]):
        total = sum(math.exp(prior.log_prob([t], history)[0]) for t in range(50))
        assert total == pytest.approx(1, abs=1e-9)


# --- promises of the rules ---


@pytest.mark.parametrize("rule", RULES)
def test_strength_zero_returns_the_scores_bit_for_bit(prior, rule):
    tokens, z = random_rows()
    assert torch.equal(processor(prior, rule, strength=0.0)(tokens, z), z)


def test_paper_only_lowers_and_leaves_the_unseen_bitwise_alone(prior):
    tokens, z = random_rows()
    masses = []
    for strength in (0.1, 0.5, 1.0):
        out = processor(prior, "paper", strength=strength)(tokens, z)
        seen = torch.zeros(50, dtype=torch.bool)
        seen[torch.from_numpy(prior.orders[0].ids)] = True
        assert torch.equal(out[:, ~seen], z[:, ~seen])
        assert (out[:, seen] < z[:, seen]).all()
        masses.append(out.softmax(-1)[:, seen].sum(-1))
    assert (masses[0] >= masses[1]).all() and (masses[1] >= masses[2]).all()


def test_paper_moves_the_log_odds_of_two_tokens_by_their_difference(documents, prior):
    tokens, z = random_rows()
    change = processor(prior, "paper", strength=0.4)(tokens, z) - z
    g = [Reference(documents, 3, 50).sparse("paper", tokens[0].tolist(), t, 1e-3, WEIGHTS) for t in (0, 1)]
    assert (change[0, 0] - change[0, 1]).item() == pytest.approx(0.4 * (g[0] - g[1]), abs=1e-5)


def test_lift_only_raises_and_equals_the_floored_form(documents, prior):
    # The floored form: unseen tokens get ln(k / (N_n + k V)) in every matched order.
    tokens, z = random_rows()
    reference = Reference(documents, 3, 50)
    out = processor(prior, "lift", strength=0.3)(tokens, z)
    assert (out >= z).all()
    for row, history in enumerate(tokens.tolist()):
        floored = z[row].double().clone()
        for context in reference.matched(history):
            counts = reference.counts[len(context)][context]
            n = sum(counts.values())
            for t in range(50):
                p = (counts.get(t, 0) + 1e-3) / (n + 1e-3 * 50)
                floored[t] += 0.3 * WEIGHTS[len(context)] * math.log(p)
        torch.testing.assert_close(out[row].double().softmax(0), floored.softmax(0), atol=1e-6, rtol=1e-4)


def test_backoff_at_full_strength_on_constant_logits_is_kneser_ney(prior):
    tokens, _ = random_rows()
    p = processor(prior, strength=1.0)(tokens, torch.zeros(6, 50)).softmax(-1)
    for row, history in enumerate(tokens.tolist()):
        expected = [math.exp(prior.log_prob([t], history)[0]) for t in range(50)]
        torch.testing.assert_close(p[row], torch.tensor(expected), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_ratio_of_equal_priors_changes_nothing(prior, strength):
    tokens, z = random_rows()
    out = processor(prior, "ratio", background=prior, strength=strength)(tokens, z)
    torch.testing.assert_close(out, z, atol=1e-6, rtol=0)


# --- options ---


def test_a_mask_keeps_every_probability_outside_and_the_sum_inside(prior):
    tokens, z = random_rows()
    p = z.softmax(-1)
    inside = p >= 0.1 * p.amax(-1, keepdim=True)
    for rule in RULES:
        q = processor(prior, rule, strength=1.0, plausibility=0.1)(tokens, z).softmax(-1)
        torch.testing.assert_close(q[~inside], p[~inside], atol=1e-7, rtol=1e-5)
        torch.testing.assert_close((q * inside).sum(-1), (p * inside).sum(-1))
        assert not torch.allclose(q, p)


def test_a_mask_of_one_or_of_zero_changes_nothing_or_everything(prior):
    tokens, z = random_rows()
    out = processor(prior, strength=1.0, plausibility=1.0)(tokens, z)
    torch.testing.assert_close(out, z, atol=1e-6, rtol=0)
    everything = processor(prior, strength=1.0, plausibility=1e-30)(tokens, z).softmax(-1)
    plain = processor(prior, strength=1.0, plausibility=0.0)(tokens, z).softmax(-1)
    torch.testing.assert_close(everything, plain)


def test_drop_forbids_what_is_outside(prior):
    tokens, z = random_rows()
    p = z.softmax(-1)
    out = processor(prior, "lift", plausibility=0.1, plausibility_mode="drop")(tokens, z)
    assert torch.equal(out == -torch.inf, p < 0.1 * p.amax(-1, keepdim=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_clip_bounds_the_bias(prior, rule):
    tokens, z = random_rows()
    change = processor(prior, rule, strength=1.0, clip=0.25)(tokens, z) - z
    assert change.abs().max() <= 0.25 + 1e-6 and change.abs().max() > 0.2


def test_a_budget_bounds_the_divergence_and_is_idle_where_it_is_not_needed(prior):
    tokens, z = random_rows()
    log_p = z.double().log_softmax(-1)

    def divergence(out):
        log_q = out.double().log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    full = processor(prior, strength=1.0)(tokens, z)
    tight = processor(prior, strength=1.0, schedule="budget(0.05)")(tokens, z)
    assert (divergence(full) > 0.05).any()
    assert (divergence(tight) <= 0.05 + 1e-5).all()
    assert (divergence(tight)[divergence(full) > 0.05] > 0.049).all()
    loose = processor(prior, strength=1.0, schedule="budget(1000)")(tokens, z)
    torch.testing.assert_close(loose, full)


def test_the_price_in_surprisal_by_hand():
    # p = (1/2, 1/4, 1/4), bias (0, -1, 1), no rise: the last two keep 1/2 together, so 2^(-1/T) (e^-1 + e) = 1.
    p, bias = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.0, -1.0, 1.0]])
    temperature = affordable_temperature(p.log(), bias, 0.0)
    assert temperature.item() == pytest.approx(1 / math.log2(math.exp(-1) + math.e), abs=1e-5)
    q = (p.log() / temperature + bias).softmax(-1)
    torch.testing.assert_close(q, torch.tensor([[0.5, 0.0596, 0.4404]]), atol=1e-4, rtol=0)
    # ln 2 (q_2 + q_3 - 1/2) is the rise: .1 allows them 1/2 + .1/ln 2 = .6443, and the whole bias .6068.
    assert affordable_temperature(p.log(), bias, 0.1).item() == 1.0


@pytest.mark.parametrize("rule, options", [("backoff", {"plausibility": 0.003}), ("lift", {}), ("ratio", {})])
@pytest.mark.parametrize("nats", [0.0, 0.1])
def test_the_surprisal_rises_by_no_more_than_it_may_and_the_sum_inside_stays(prior, rule, options, nats):
    tokens, z = random_rows(rows=40)
    log_p, schedule = z.double().log_softmax(-1), f"surprisal({nats})" if nats else "surprisal"
    rise = lambda out: -((out.double().softmax(-1) - log_p.exp()) * log_p).sum(-1)
    free = processor(prior, rule, strength=1.0, schedule="surprisal(100)", **options)(tokens, z)
    bound = processor(prior, rule, strength=1.0, schedule=schedule, **options)(tokens, z)
    dear = rise(free) > nats
    assert dear.any() and (rise(bound) <= nats + 1e-5).all() and (rise(bound)[dear] > 0.8 * nats - 1e-5).all()
    assert not dear.all() and torch.equal(bound[~dear], free[~dear])
    inside = z > z.amax(-1, keepdim=True) + math.log(options.get("plausibility", 1e-30))
    assert torch.equal(bound[~inside], z[~inside])
    torch.testing.assert_close((bound.softmax(-1) * inside).sum(-1), (z.softmax(-1) * inside).sum(-1))
    if not options:  # where nothing is outside, a bound that does not bind is no change
        torch.testing.assert_close(free.softmax(-1), processor(prior, rule, strength=1.0)(tokens, z).softmax(-1))


def test_at_a_price_in_surprisal_nothing_has_more_of_the_bias_less_divergence():
    generator = torch.Generator().manual_seed(0)
    scores, bias = torch.randn(2, 30, 9, dtype=torch.float64, generator=generator)
    log_p = (2 * scores).log_softmax(-1)
    surprisal = lambda q: -(q * log_p).sum(-1)
    value = lambda q: (q * (bias - q.log() + log_p)).sum(-1)
    temperature = affordable_temperature(log_p, bias, 0.05)
    best = (log_p / temperature + bias).softmax(-1)
    allowed = surprisal(log_p.exp()) + 0.05
    found = 0
    for scale in (0.01, 0.1, 1.0):
        for start in (best.log(), log_p + 0.5 * bias):  # near it, and near what scaling the bias gives
            for _ in range(50):
                other = (start + scale * torch.randn(30, 9, generator=generator)).softmax(-1)
                cheap = surprisal(other) <= allowed
                found += cheap.sum().item()
                assert (value(other) <= value(best) + 1e-4)[cheap].all()
    assert found > 1000


def test_a_ramp_grows_over_generated_tokens_only(prior):
    tokens, z = random_rows(length=6)
    ramp = processor(prior, strength=0.8, schedule="ramp(4)")
    for generated, strength in [(0, 0.0), (1, 0.2), (3, 0.6), (4, 0.8), (6, 0.8)]:
        out = ramp.apply(tokens, z, torch.full((6,), generated))
        expected = processor(prior, strength=strength)(tokens, z)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_the_entropy_schedule_is_full_on_a_flat_row_and_nothing_on_a_sure_one(prior):
    tokens, _ = random_rows()
    flat, sure = torch.zeros(6, 50), torch.zeros(6, 50)
    sure[:, 3] = 100.0
    entropy, constant = processor(prior, schedule="entropy"), processor(prior)
    torch.testing.assert_close(entropy(tokens, flat), constant(tokens, flat))
    torch.testing.assert_close(entropy(tokens, sure), sure)


def test_special_and_exempt_tokens_keep_their_scores(documents):
    prior = lp.NGramPrior.from_ids(documents, 3, 50, eos=49)
    tokens, z = random_rows()
    for rule in ("paper", "lift", "backoff"):
        out = processor(prior, rule=rule, strength=1.0, exempt=(1, 2))(tokens, z)
        assert torch.equal(out[:, [1, 2, 49]], z[:, [1, 2, 49]])
        with_end = processor(prior, rule=rule, strength=1.0, eos="prior")(tokens, z)
        assert (with_end[:, 49] != z[:, 49]).all()
    loop, flat = torch.tensor([[1, 2, 3, 1, 2]]), torch.zeros(1, 50)
    guarded = processor(prior, strength=1.0, exempt=(3,), guard=0.5)(loop, flat)
    assert guarded[0, 3].item() == pytest.approx(-0.5)  # the guard spares none


def test_columns_beyond_the_vocabulary_are_left_alone(prior):
    tokens, z = random_rows(vocab=64)
    for rule in RULES:
        out = processor(prior, rule, strength=1.0)(tokens, z)
        assert torch.equal(out[:, 50:], z[:, 50:])
    with pytest.raises(ValueError, match="vocabulary of 50 tokens; this model scores 40"):
        processor(prior)(tokens, z[:, :40])


def test_padding_and_special_ids_never_match(documents):
    prior = lp.NGramPrior.from_ids(documents, 3, 50, eos=49)
    bias = processor(prior, rule="lift", strength=1.0)
    history, z = documents[0][:2], torch.zeros(1, 50)
    alone = bias(torch.tensor([history[1:]]), z)
    for stranger in (-1, 49, 5000):
        assert torch.equal(bias(torch.tensor([[stranger, history[1]]]), z), alone)
    assert not torch.equal(bias(torch.tensor([history]), z), alone)


def test_the_start_of_a_text_is_a_context_only_when_asked():
    prior = lp.NGramPrior.from_ids([[1, 2]] * 3 + [[2, 1]], 2, 8, eos=0)
    prior.tokenizer["bos"] = 7
    prior.tokenizer["special"] = [0, 7]
    z = torch.zeros(1, 8)
    asked = processor(prior, strength=1.0, bos=True)
    plain = processor(prior, strength=1.0)
    start = asked(torch.tensor([[7]]), z)
    assert torch.equal(start, asked(torch.empty(1, 0, dtype=torch.int64), z))  # invented
    assert (
        start[0, 1] - start[0, 2] > plain(torch.tensor([[7]]), z)[0, 1] - plain(torch.tensor([[7]]), z)[0, 2]
    )


def test_the_guard_penalises_what_would_continue_the_loop_and_nothing_else():
    # a b c d a b c: the suffix a b c was followed by d, so L = 3 and .8 x 1.75 = 1.4
    tokens = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    penalty = -loop_guard(torch.zeros(1, 6), tokens, torch.tensor([7]), 0.8, 1.75, 2, 10.0)
    torch.testing.assert_close(penalty, torch.tensor([[0, 0, 0, 1.4, 0, 0]]))


def test_the_guard_grows_by_its_base_up_to_its_cap():
    for length, expected in zip((2, 3, 4, 5, 6), (0.8, 1.4, 2.45, 4.2875, 7.503125), strict=True):
        run = list(range(1, length + 1))
        tokens = torch.tensor([[*run, 9, *run]])
        for cap in (100.0, 2.0):
            out = loop_guard(torch.zeros(1, 12), tokens, torch.tensor([tokens.shape[1]]), 0.8, 1.75, 2, cap)
            assert -out[0, 9].item() == pytest.approx(min(expected, cap))


def test_the_guard_reads_generated_tokens_only(prior):
    tokens = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    guard = processor(prior, strength=0.0, guard=0.8)
    z = torch.zeros(1, 50)
    assert guard.apply(tokens, z, torch.tensor([7]))[0, 3].item() == pytest.approx(-1.4)
    assert torch.equal(guard.apply(tokens, z, torch.tensor([3])), z)


# --- the prior ---


def test_a_saved_prior_is_the_same_prior_and_the_same_bytes(prior, tmp_path):
    prior.save(tmp_path / "a")
    again = lp.NGramPrior.load(tmp_path / "a")
    again.save(tmp_path / "b")
    for name in ("artifact.json", "artifact.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    tokens, z = random_rows()
    assert torch.equal(processor(prior)(tokens, z), processor(again)(tokens, z))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_arpa_restores_the_same_numbers(documents, tmp_path, order):
    prior = lp.NGramPrior.from_ids(documents, order, 50, eos=49)
    prior.to_arpa(tmp_path / "lm.arpa")
    again = lp.NGramPrior.from_arpa(tmp_path / "lm.arpa", prior.tokenizer)
    text = documents[5] + [48, 7, 49]
    for bos in (False, True):
        np.testing.assert_allclose(
            again.log_prob(text, bos=bos), prior.log_prob(text, bos=bos), rtol=0, atol=1e-12
        )
    again.save(tmp_path / "saved")
    saved = lp.NGramPrior.load(tmp_path / "saved")
    np.testing.assert_array_equal(saved.log_prob(text), again.log_prob(text))
    tokens, z = random_rows()
    torch.testing.assert_close(processor(saved)(tokens, z), processor(prior)(tokens, z))
    with pytest.raises(ValueError, match="holds no counts"):
        processor(saved, "lift")(tokens, z)


def test_kenlm_reads_the_export_and_agrees(documents, tmp_path):
    kenlm = pytest.importorskip("kenlm", reason="the optional package kenlm is not installed")
    prior = lp.NGramPrior.from_ids(documents, 3, 50, eos=49)
    prior.to_arpa(tmp_path / "lm.arpa")
    model = kenlm.Model(str(tmp_path / "lm.arpa"))
    for text in (documents[0], documents[7], [48, 3, 3, 47, 0, 1]):
        theirs = [score for score, _, _ in model.full_scores(" ".join(f"t{t}" for t in text))]
        ours = prior.log_prob([*text, 49], bos=True) / math.log(10)
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    "text, message",
    [("hello", "not an ARPA file"), ("\\data\\\nngram 1=1\n\n\\1-grams:\n-1\tt1\n", "truncated"),
     ("\\data\\\nngram 1=2\n\n\\1-grams:\n-1\tt1\n\n\\end\\\n", "header says 2"),
     ("\\data\\\nngram 1=1\n\n\\1-grams:\n-1\tdog\n\n\\end\\\n", "'dog' is no id")],
)  # fmt: skip
def test_a_file_that_is_not_our_arpa_is_refused(prior, tmp_path, text, message):
    (tmp_path / "lm.arpa").write_text(text)
    with pytest.raises(ValueError, match=message):
        lp.NGramPrior.from_arpa(tmp_path / "lm.arpa", prior.tokenizer)


@pytest.mark.parametrize(
    "options, message",
    [({"strength": 1.5}, "strength must be a number in \\[0, 1\\], got 1.5"),
     ({"strength": math.nan}, "strength must be"), ({"strength": "high"}, "strength must be"),
     ({"rule": "best"}, "rule must be one of paper, lift"), ({"clip": -1.0}, "clip must be"),
     ({"schedule": "ramp"}, "schedule must be one of"), ({"schedule": "budget(0)"}, "schedule must be"),
     ({"schedule": "surprisal(-1)"}, "schedule must be one of constant, .*surprisal, surprisal\\(m\\)"),
     ({"confidence": "count"}, "confidence must be one of"), ({"plausibility": 2}, "plausibility must be"),
     ({"rule": "ratio"}, "needs a background"), ({"weights": (1.0,)}, "weights must hold 3"),
     ({"exempt": (50,)}, "exempt must be"), ({"exempt": 3}, "exempt must be a list"),
     ({"exempt": (1.5,)}, "exempt must be a whole number"), ({"weights": (0.1, math.inf, 0)}, "weights must be"),
     ({"weights": ("a", 0, 0)}, "weights must be a number"), ({"k": math.inf}, "k must be a number in"),
     ({"confidence": "count(1e)"}, "confidence must be one of"), ({"schedule": "ramp(-4)"}, "schedule must be"),
     ({"weights": 3}, "weights must be a list"), ({"bos": "maybe"}, "bos must be true or false"),
     ({"guard_length": 1.5, "guard": 1.0}, "guard_length must be a whole number")],
)  # fmt: skip
def test_a_parameter_outside_its_range_is_refused(prior, options, message):
    with pytest.raises(ValueError, match=message):
        NGramStyleLogitsProcessor(prior, **options)


def test_priors_of_two_tokenizers_have_no_ratio(prior):
    other = lp.NGramPrior.from_ids([[1, 2]], 3, 60)
    with pytest.raises(ValueError, match=r"must share a tokenizer, got ids \(50 tokens\) and ids \(60 tokens\)"):
        processor(prior, "ratio", background=other)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_left_out_is_what_the_study_chose_for_the_rule(prior, rule):
    background = prior if rule == "ratio" else None
    made = NGramStyleLogitsProcessor(prior, rule=rule, background=background)
    assert {key: getattr(made, key) for key in DEFAULTS[rule]} == DEFAULTS[rule]
    said = {"backoff": (1.0, "wb", 0.003, "surprisal", 1.2), "paper": (0.1, "none", 0.0, "constant", 0.0)}
    shown = tuple(getattr(made, key) for key in ("strength", "confidence", "plausibility", "schedule", "guard"))
    assert shown == said.get(rule, (0.2, *said["paper"][1:]))  # as `describe` shows
    given = NGramStyleLogitsProcessor(prior, rule=rule, background=background, strength=0.0, guard=0.5)
    assert (given.strength, given.guard) == (0.0, 0.5)
    assert all(DEFAULTS["paper"][key] == off for key, off in OFF.items())  # the printed rule stays as printed


@pytest.mark.parametrize("order", [0, 9, 2.5, "3"])
def test_an_order_that_is_no_order_is_refused(order):
    with pytest.raises(ValueError, match="order must be a whole number from 1 to 5"):
        lp.NGramPrior.from_ids([[1, 2]], order, 8)


# --- fitting files ---


@pytest.fixture(scope="module")
def tokenizer():
    from conftest import tiny_tokenizer

    return tiny_tokenizer(97)


def test_an_interrupted_fit_resumes_and_gives_the_same_bytes(tokenizer, tmp_path, monkeypatch):
    corpus = tmp_path / "corpus.txt"
    words = [t for t in tokenizer.get_vocab() if t.startswith("w")]
    rng = np.random.default_rng(0)
    corpus.write_text("\n".join(" ".join(rng.choice(words, 20)) for _ in range(2000)))
    lp.NGramPrior.fit(corpus, tokenizer, out=tmp_path / "whole", sample_by="line")

    real, calls = NGramCounter.add, []

    def interrupted(self, documents):
        real(self, documents)
        self._spill()
        calls.append(len(documents))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(NGramCounter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lp.NGramPrior.fit(corpus, tokenizer, out=tmp_path / "resumed", sample_by="line")
    assert not (tmp_path / "resumed").exists() and (tmp_path / "resumed.partial").is_dir()
    with pytest.raises(ValueError, match="another corpus"):
        lp.NGramPrior.fit(["other text"], tokenizer, out=tmp_path / "resumed")
    lp.NGramPrior.fit(corpus, tokenizer, out=tmp_path / "resumed", sample_by="line")
    assert sum(calls) == 2000  # nothing was counted twice
    names = ["artifact.json", "artifact.safetensors"]
    assert [(tmp_path / "whole" / n).read_bytes() for n in names] == [
        (tmp_path / "resumed" / n).read_bytes() for n in names
    ]
    assert not (tmp_path / "resumed.partial").exists()


def test_an_interrupted_fit_of_an_iterable_resumes_with_the_same_texts_only(tokenizer, tmp_path, monkeypatch):
    texts = {first: [f"w{first} w{3 + i % 90} w{5 + i % 7}" for i in range(1500)] for first in (7, 8)}
    interrupted, other, again, whole = (iter(texts[first]) for first in (7, 8, 7, 7))
    real = NGramCounter.add

    def interrupt(self, documents):
        real(self, documents)
        self._spill()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(NGramCounter, "add", interrupt)
        lp.NGramPrior.fit(interrupted, tokenizer, out=tmp_path / "prior")
    with pytest.raises(ValueError, match="another corpus"):
        lp.NGramPrior.fit(other, tokenizer, out=tmp_path / "prior")
    resumed = lp.NGramPrior.fit(again, tokenizer, out=tmp_path / "prior")
    assert resumed.documents == 1500
    assert resumed.fingerprint() == lp.NGramPrior.fit(whole, tokenizer).fingerprint()


def test_a_full_disk_during_a_fit_leaves_no_prior_and_what_was_counted(tokenizer, tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(NGramCounter, "finish", full)
    with pytest.raises(OSError, match="No space left"):
        lp.NGramPrior.fit(["some text"], tokenizer, out=tmp_path / "prior")
    assert not (tmp_path / "prior").exists() and (tmp_path / "prior.partial").is_dir()


def test_a_fit_counts_what_the_tokenizer_gives(tokenizer):
    words = [w for w in tokenizer.get_vocab() if w.startswith("w")]
    texts = [" ".join(np.random.default_rng(seed).choice(words, 300)) for seed in range(5)]
    tokenizer(texts, truncation=True, max_length=4, padding=True)  # leaves its mark on a fast tokenizer
    fitted = lp.NGramPrior.fit(texts, tokenizer)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    counted = lp.NGramPrior.from_ids(ids, 3, fitted.vocab_size, fitted.tokenizer["eos"])
    for ours, theirs in zip(fitted.counts, counted.counts, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_bad_input_leaves_nothing_behind(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    for corpus in (tmp_path / "empty.txt", tmp_path / "missing.txt", []):
        with pytest.raises((ValueError, FileNotFoundError)):
            lp.NGramPrior.fit(corpus, tokenizer, out=tmp_path / "prior")
    assert [p.name for p in tmp_path.iterdir()] == ["empty.txt"]


def test_a_prior_of_another_tokenizer_is_refused(tokenizer):
    from conftest import tiny_tokenizer

    prior = lp.NGramPrior.fit(["some text"], tokenizer)
    chain = lp.Chain([NGramStyleLogitsProcessor(prior)])
    chain.check(tokenizer=tokenizer)
    with pytest.raises(ValueError, match="was fitted for the tokenizer"):
        chain.check(tokenizer=tiny_tokenizer(98))
