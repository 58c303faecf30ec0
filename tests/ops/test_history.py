"""Kernels that read the tokens so far: each against its definition in plain torch, in float64 and float32."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from logitproc import NGramPrior, NGramStyleLogitsProcessor, ops
from logitproc.methods.suppression import PhraseIndex, lower_phrases
from logitproc.ops import cpu

INF = math.inf
CUDA = torch.cuda.is_available()


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")),
        pytest.param("interpreter", marks=pytest.mark.skipif(CUDA, reason="there is a CUDA device")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]),
    ]
)
def kernels(request):
    """Kernels of one backend, and `device`, where their tensors are."""
    if request.param == "cpu":
        module = cpu
    else:
        pytest.importorskip("triton", reason="the package triton is not installed")
        from logitproc.ops import triton as module
    device = torch.device("cuda" if request.param == "cuda" else "cpu")
    with ops.backend("cpu" if request.param == "cpu" else "triton"):
        yield SimpleNamespace(
            device=device, interpreted=request.param == "interpreter",
            add_ngrams=module.add_ngrams, loop_guard=module.loop_guard, lower_phrases=module.lower_phrases,
        )  # fmt: skip


def a_prior(seed, vocabulary, order=3):
    """Of documents with many repeated words, so that contexts of all orders are found."""
    words = np.minimum(np.random.default_rng(seed).zipf(1.4, size=(60, 40)), vocabulary) - 1
    return NGramPrior.from_ids(words.tolist(), order, vocabulary, eos=0)


def case(rule, vocabulary, width, rows, order=3, seed=0, **options):
    """(scores, tokens, ngrams): a few -inf, ids outside the vocabulary, texts that are shorter than a context."""
    random = torch.Generator().manual_seed(seed)
    if rule == "ratio":
        options["background"] = a_prior(seed + 1, vocabulary, order)
    processor = NGramStyleLogitsProcessor(a_prior(seed, vocabulary, order), rule=rule, strength=0.7, **options)
    scores = 4 * torch.randn(rows, width, generator=random)
    scores[:, 1:][torch.rand(rows, width - 1, generator=random) < 0.1] = -INF
    tokens = torch.randint(-1, min(vocabulary, 9), (rows, 12), generator=random)
    tokens[::3, :11] = -1
    tokens[1::3, -1] = vocabulary + 5
    return scores, tokens, processor._ngrams


RULES = {
    "paper": ("paper", {}, {}),
    "lift": ("lift", {"exempt": (1, 4)}, {}),
    "backoff": ("backoff", {"exempt": (1, 4), "confidence": "wb"}, {"centred": True}),
    "bos": ("backoff", {"bos": True, "eos": "prior"}, {"centred": True}),
    "ratio": ("ratio", {"confidence": "count(2)"}, {"centred": True}),
    "keep": ("backoff", {"exempt": (3,)}, {"centred": True, "plausibility": 0.05}),
    "drop": ("lift", {"exempt": (3,)}, {"plausibility": 0.05, "drop": True}),
    "two kept": ("ratio", {}, {"centred": True, "plausibility": 1e-12}),
    "clip": ("backoff", {}, {"centred": True, "clip": 0.5}),  # no kernel: plain torch
    "surprisal": ("backoff", {"exempt": (3,)}, {"plausibility": 0.003, "surprisal": 0.0}),
    "surprisal, all": ("ratio", {"confidence": "wb"}, {"centred": True, "surprisal": 0.1}),
    "surprisal, drop": ("lift", {"exempt": (3,)}, {"plausibility": 0.003, "drop": True, "surprisal": 0.1}),
}


def error(found, exact):
    finite = exact.isfinite()
    assert torch.equal(found[~finite].double(), exact[~finite])
    return (found.double() - exact)[finite].abs().max().item() if finite.any() else 0.0


def placed(device, *values):
    return [value.to(device) for value in values]


@pytest.mark.parametrize(
    "vocabulary, width, rows, order",
    [(1, 1, 1, 1), (2, 7, 3, 3), (50, 64, 4, 5), (1500, 2100, 2, 3), (7001, 7919, 3, 5)],
)
@pytest.mark.parametrize("rule", RULES)
def test_ngrams_are_as_close_to_float64_as_plain_torch(rule, vocabulary, width, rows, order, kernels):
    if kernels.interpreted and vocabulary > 5000:
        pytest.skip("the interpreter is slow")
    name, made, options = RULES[rule]
    made = {key: tuple(i for i in value if i < vocabulary) if key == "exempt" else value for key, value in made.items()}
    scores, tokens, ngrams = placed(kernels.device, *case(name, vocabulary, width, rows, order, **made))
    factor = torch.rand(rows, 1, device=kernels.device) if order == 3 else None
    kept = scores.clone()
    found = kernels.add_ngrams(scores, tokens, ngrams, factor, **options)
    if rule == "clip":
        assert found is NotImplemented
        return
    assert torch.equal(scores, kept)
    exact = ops.add_ngrams(scores.double(), tokens, ngrams, factor, **options)
    with ops.backend("reference"):
        plain = ops.add_ngrams(scores, tokens, ngrams, factor, **options)
    assert error(found, exact) <= error(plain, exact) + (1e-3 if "surprisal" in options else 1e-5)  # 20 bisections
    assert error(found.double().softmax(-1), exact.softmax(-1)) < 1e-5
    unbiased = torch.nn.functional.pad(~ngrams.allowed, (0, width - vocabulary), value=True)
    assert torch.equal(found[:, unbiased], scores[:, unbiased])


@pytest.mark.parametrize("options", [{}, {"centred": True}, {"plausibility": 0.1}, {"plausibility": 0.1, "drop": True},
                                     {"surprisal": 0.0}])  # fmt: skip
def test_a_row_without_a_finite_score_stays_as_it_is(options, kernels):
    scores, tokens, ngrams = placed(kernels.device, *case("backoff", 50, 64, 3))
    scores[1] = -INF
    scores[2, 1:] = -INF  # nothing but an exempt token
    out = kernels.add_ngrams(scores, tokens, ngrams, **options)
    assert torch.equal(out[1:], scores[1:])


@pytest.mark.parametrize("exempt", [range(50), (), range(0, 50, 2)])
def test_where_everything_or_nothing_is_exempt(exempt, kernels):
    scores, tokens, ngrams = placed(kernels.device, *case("backoff", 50, 50, 2, exempt=tuple(exempt)))
    for options in ({"centred": True}, {"plausibility": 0.1, "drop": True}):
        found = kernels.add_ngrams(scores, tokens, ngrams, **options)
        assert error(found, ops.add_ngrams(scores.double(), tokens, ngrams, **options)) < 1e-5
        assert torch.equal(found[:, list(exempt)], scores[:, list(exempt)])


@pytest.mark.parametrize("rule", RULES)
def test_a_row_does_not_depend_on_the_rows_beside_it_or_on_threads(rule, kernels):
    if kernels.interpreted:
        pytest.skip("the interpreter is slow")
    name, made, options = RULES[rule]
    scores, tokens, ngrams = placed(kernels.device, *case(name, 40_000, 50_000, 9, **made))
    call = lambda part: ops.add_ngrams(scores[part], tokens[part], ngrams, **options)
    together = call(slice(None))
    assert torch.equal(together, torch.cat([call(slice(i, i + 1)) for i in range(9)]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(call(slice(None)), together)
    finally:
        torch.set_num_threads(threads)


def test_strided_scores_and_tokens_are_read_as_they_stand(kernels):
    scores, tokens, ngrams = placed(kernels.device, *case("backoff", 50, 128, 2))
    for part in (scores[:, ::2], scores[:, :64]):
        expected = kernels.add_ngrams(part.contiguous(), tokens, ngrams, centred=True)
        for history in (tokens[:, 3:], tokens.T.contiguous().T):
            assert torch.equal(kernels.add_ngrams(part, history, ngrams, centred=True), expected)
    assert kernels.add_ngrams(scores[:0], tokens[:0], ngrams).shape == (0, 128)


def test_nothing_is_read_or_written_outside_of_scores_or_tokens_that_are_too_few(kernels):
    scores, tokens, ngrams = placed(kernels.device, *case("backoff", 50, 64, 2))
    assert kernels.add_ngrams(scores[:, :49], tokens, ngrams) is NotImplemented
    assert kernels.add_ngrams(scores, tokens[:, :1], ngrams) is NotImplemented


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_more_scores_than_an_int32_counts():
    width = 151_936
    scores, tokens, ngrams = placed(torch.device("cuda"), *case("backoff", width, width, 2))
    rows = 2**31 // width + 2
    many = scores.repeat(rows // 2 + 1, 1)[:rows]
    history = tokens.repeat(rows // 2 + 1, 1)[:rows]
    for options in ({}, {"centred": True}, {"plausibility": 0.1}):
        found = ops.add_ngrams(many, history, ngrams, **options)
        assert torch.equal(found[-2:].sort(0).values, ops.add_ngrams(scores, tokens, ngrams, **options).sort(0).values)


def test_ids_outside_the_vocabulary_are_refused_where_a_table_is_made():
    prior = a_prior(0, 50)
    prior.orders[2].ids[0] = 60
    made = NGramStyleLogitsProcessor(prior, rule="lift")
    with pytest.raises(ValueError, match="ids outside their vocabulary of 50"):
        made(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 50))


# --- loop guard ---

DRY = (0.8, 1.75, 2, 10.0)


def loop_case(rows=6, columns=60, width=11, seed=0):
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-1, 3, (rows, columns), generator=random)
    tokens[0] = 2  # one token for ever
    tokens[1, ::7] = width + 3
    generated = torch.randint(0, columns + 9, (rows,), generator=random)
    generated[0] = columns
    scores = torch.randn(rows, width, generator=random)
    scores[:, 1] = -INF
    return scores, tokens, generated


@pytest.mark.parametrize("columns", [2, 3, 60, 300])
@pytest.mark.parametrize("options", [DRY, (3.0, 1.1, 1, 3.0), (0.1, 1.2, 3, 1.0)])
def test_the_loop_guard_is_that_of_plain_torch(columns, options, kernels):
    scores, tokens, generated = placed(kernels.device, *loop_case(columns=columns))
    kept = scores.clone()
    found = kernels.loop_guard(scores, tokens, generated, *options)
    assert torch.equal(scores, kept)
    with ops.backend("reference"):
        torch.testing.assert_close(found, ops.loop_guard(scores, tokens, generated, *options))
    assert columns < 60 or not torch.equal(found, scores)


@pytest.mark.parametrize("columns", [0, 1])
def test_the_loop_guard_asks_for_two_tokens(columns):
    scores, tokens, generated = loop_case(columns=columns)
    assert ops.loop_guard(scores, tokens, generated, *DRY) is scores


def test_the_loop_guard_in_place_writes_where_it_reads(kernels):
    scores, tokens, generated = placed(kernels.device, *loop_case())
    expected = kernels.loop_guard(scores, tokens, generated, *DRY)
    for guard in (kernels.loop_guard, ops.loop_guard):
        mine = scores.clone()
        assert guard(mine, tokens, generated, *DRY, in_place=True) is mine
        torch.testing.assert_close(mine, expected)
    wide = torch.zeros_like(scores).repeat(1, 2)[:, ::2].copy_(scores)
    torch.testing.assert_close(ops.loop_guard(wide, tokens, generated, *DRY, in_place=True), expected)


# --- phrases ---


@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("length, longest", [(1, 1), (1, 4), (3, 6)])
def test_phrases_are_lowered_as_in_plain_torch(length, longest, anchor, kernels):
    random = np.random.default_rng(0)
    texts = random.integers(0, 4, (50, 9))
    index = PhraseIndex(texts, 30, length, longest, 2, anchor, breakers=(3,), silent=(1,)).to(kernels.device)
    tokens = torch.from_numpy(np.where(random.random((25, longest)) < 0.1, -1, texts[:25, :longest]))
    tokens[::5, -1] = 30  # outside the vocabulary
    generated = torch.from_numpy(random.integers(0, longest + 3, 25))
    scores, nats = torch.randn(25, 37), torch.rand(longest - length + 1).cumsum(0)
    scores[:, 2] = -INF
    scores, tokens, generated, nats = placed(kernels.device, scores, tokens, generated, nats)
    kept = scores.clone()
    found = kernels.lower_phrases(scores, tokens, generated, index, nats)
    assert torch.equal(scores, kept)
    with ops.backend("reference"):
        torch.testing.assert_close(found, lower_phrases(scores, tokens, generated, index, nats))
    assert not torch.equal(found, scores)
    assert torch.equal(found[3:4], kernels.lower_phrases(scores[3:4], tokens[3:4], generated[3:4], index, nats))


def test_texts_with_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="ids outside their vocabulary of 3"):
        PhraseIndex([np.array([1, 2, -1])], 3, 1, 2, 1, True, (), ())
