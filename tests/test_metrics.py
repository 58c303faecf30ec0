"""Text statistics: worked numbers, and each promise of the docstrings."""

import math

import numpy as np
import pytest

from logitproc import metrics
from logitproc.prior import NGramPrior

A, B, C, D, E = range(3, 8)


@pytest.fixture(scope="module")
def prior() -> NGramPrior:
    """Counts of the corpus "a b c d", "c d a", "a"; end of document is 2."""
    return NGramPrior.from_ids([[A, B, C, D], [C, D, A], [A]], order=3, vocab_size=10, eos=2)


def test_rep_4_of_two_rounds_is_one_in_five():
    # abcd bcda cdab dabc abcd: five, of which four differ.
    assert metrics.rep_n([A, B, C, D] * 2) == pytest.approx(0.2)
    assert metrics.rep_n([A, B, C, D] * 2, n=2) == pytest.approx(3 / 7)


def test_nothing_repeats_in_a_text_too_short_for_an_ngram():
    assert metrics.rep_n([A, B, C]) == metrics.rep_n([]) == 0


def test_distinct_n_counts_texts_together_and_spans_none():
    # ab, ba and ab: two of three. Joined, "b a" between the texts would be a fourth.
    assert metrics.distinct_n([[A, B, A], [A, B]], 2) == pytest.approx(2 / 3)
    assert metrics.distinct_n([[A, A], [A]], 1) == pytest.approx(1 / 3)
    assert math.isnan(metrics.distinct_n([[A]], 2))
    for function in (lambda: metrics.distinct_n([[A]], 0), lambda: metrics.rep_n([A], 0)):
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            function()


def test_unigram_overlap_takes_the_commonest_tokens_lower_ids_first(prior):
    # Counts: a 3, c 2, d 2, b 1; the end of a document, three times, is no token of a text.
    text = [A, A, B, C, D, E]
    assert metrics.unigram_overlap(text, prior) == pytest.approx(5 / 6)
    assert metrics.unigram_overlap(text, prior, top=1) == pytest.approx(2 / 6)
    assert metrics.unigram_overlap(text, prior, top=2) == pytest.approx(3 / 6)
    assert metrics.unigram_overlap([2], prior) == 0
    assert math.isnan(metrics.unigram_overlap([], prior))


def test_bigram_seen_is_the_share_of_bigrams_of_the_corpus(prior):
    # ab yes, bd no, da yes, aa no.
    assert metrics.bigram_seen([A, B, D, A, A], prior) == pytest.approx(0.5)
    assert math.isnan(metrics.bigram_seen([A], prior))
    with pytest.raises(ValueError, match="n must be from 1 to 1"):
        metrics.bigram_seen([A, B], NGramPrior.from_ids([[A, B]], order=1, vocab_size=10))


@pytest.mark.parametrize(
    "text, bound",
    [
        ([E, A, B, C, D, E], 4),  # abc, bcd
        ([A, B, C, D, A], 5),  # abc, bcd, cda: the bound, as "a b c d a" is in no document
        ([A, B, C, E, B, C, D, A], 4),  # the longer of two runs
        ([A, B, E, C, D], 2),  # no trigram, but a bigram
        ([B, A, D, B], 1),
        ([E, E], 0),
        ([], 0),
    ],
)
def test_copied_span_is_bounded_from_above(prior, text, bound):
    assert metrics.longest_copied_span_bound(text, prior) == bound


def test_the_bound_is_never_below_the_longest_span_that_was_copied():
    rng = np.random.default_rng(0)
    corpus = rng.integers(3, 9, size=(6, 12)).tolist()
    prior = NGramPrior.from_ids(corpus, order=3, vocab_size=9)
    spans = {tuple(d[i:j]) for d in corpus for i in range(12) for j in range(i + 1, 13)}
    for text in rng.integers(3, 9, size=(40, 10)).tolist():
        pieces = [text[i:j] for i in range(10) for j in range(i + 1, 11)]
        copied = max((len(piece) for piece in pieces if tuple(piece) in spans), default=0)
        bound = metrics.longest_copied_span_bound(text, prior)
        assert bound >= copied and (bound >= 3 or bound == copied)


def test_a_prior_knows_its_ngrams(prior):
    assert prior.contains([A, B, C, A], 1).tolist() == [True] * 4
    assert prior.contains([A, B, C, A], 2).tolist() == [True, True, False]
    assert prior.contains([A, B, C, A], 3).tolist() == [True, False]
    assert prior.contains([A, B], 3).tolist() == []
    assert prior.contains([-1, 99], 1).tolist() == [False, False]
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"from 1 to 3, the order of this prior; got {n}"):
            prior.contains([A], n)


def test_aggregates_of_nineteen_texts_at_2_and_one_at_830():
    # (19 * 2 + 830) / 20 = 43.4; exp((19 ln 2 + ln 830) / 20) = 2.7035.
    found = metrics.aggregate(np.log([2] * 19 + [830]), [10] * 20)
    assert found["arithmetic"] == pytest.approx(43.4)
    assert found["geometric"] == pytest.approx(2.7035, abs=1e-4)
    assert found["token_weighted"] == pytest.approx(found["geometric"])  # texts of one length
    assert found["median"] == pytest.approx(2) and found["maximum"] == pytest.approx(830)


def test_token_weighted_perplexity_weighs_tokens():
    # (3 ln 2 + 1 ln 32) / 4 = 2 ln 2.
    assert metrics.aggregate(np.log([2, 32]), [3, 1])["token_weighted"] == pytest.approx(4)


def test_a_huge_loss_gives_an_infinite_perplexity_and_no_texts_an_error():
    assert metrics.aggregate([1000.0, 0.0], [1, 1])["arithmetic"] == math.inf
    for losses, tokens in (([], []), ([1.0], [])):
        with pytest.raises(ValueError, match="a loss and a length for each text"):
            metrics.aggregate(losses, tokens)


def test_bootstrap_interval_is_that_of_a_mean():
    # Standard error of a mean of 400 normal draws: 1/20, so the interval is close to ±1.96/20.
    values = np.random.default_rng(1).normal(size=400)
    mean, low, high = metrics.bootstrap(values)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - half, abs=0.01) and high == pytest.approx(mean + half, abs=0.01)
    assert metrics.bootstrap(values) == (mean, low, high) != metrics.bootstrap(values, seed=1)


def test_bootstrap_of_two_prompts_by_hand():
    # Means of resamples: 0 and 1 with probability 1/4 each, so both lie within the interval.
    assert metrics.bootstrap([0.0, 1.0]) == (0.5, 0.0, 1.0)


def test_one_prompt_or_an_infinite_value_has_no_interval():
    mean, low, high = metrics.bootstrap([2.0])
    assert mean == 2 and math.isnan(low) and math.isnan(high)
    mean, low, high = metrics.bootstrap([2.0, math.inf])
    assert mean == math.inf and math.isnan(low) and math.isnan(high)
    for values in ([], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="one number a prompt"):
            metrics.bootstrap(values)


def test_pairing_removes_what_prompts_have_in_common():
    rng = np.random.default_rng(0)
    prompts = rng.normal(scale=10, size=50)
    a, b = prompts + 1 + rng.normal(scale=0.1, size=50), prompts
    mean, low, high = metrics.paired_bootstrap(a, b)
    assert low < 1 < high and high - low < 0.1 < metrics.bootstrap(a).high - metrics.bootstrap(a).low
    assert metrics.paired_bootstrap(a, a) == (0, 0, 0)
    with pytest.raises(ValueError, match="got 1 and 2"):
        metrics.paired_bootstrap([1.0], [1.0, 2.0])


def test_a_prior_without_counts_is_refused_by_name(prior, tmp_path):
    prior.to_arpa(tmp_path / "prior.arpa")
    imported = NGramPrior.from_arpa(tmp_path / "prior.arpa", prior.tokenizer)
    assert metrics.bigram_seen([A, B, D], imported) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="holds no counts, which unigram_overlap needs"):
        metrics.unigram_overlap([A], imported)
