import math

import pytest
import torch
from torch.nn.functional import linear

from logitproc.heads import (
    KINDS,
    DenseHead,
    Int4Head,
    Int8Head,
    RefinedHead,
    ScreenedHead,
    Statistics,
    VQHead,
    evaluate,
    refine,
    vq,
)  # fmt: skip
from logitproc.heads.clustering import kmeans, means
from logitproc.heads.vq import Problem, distil, matched_bias, posterior_loss

from .conftest import D, Stub, V, calibration, random_head

FITTED = ("paper", "weighted", "distilled", "tiebreak", "residual")


class Unreadable:
    """A text that nobody may read: what is wrong with a call is said before."""

    def __iter__(self):
        raise AssertionError("the text was read")


def fit(cal, kind, codes=16, **options):
    return VQHead.fit(Stub(cal), cal, codes=codes, kind=kind, **options)


def problem(cal, codes=16):
    return Problem(cal, cal, Statistics.of(cal), codes, 0, None)


@pytest.fixture(scope="module")
def heads(cal):
    return {kind: fit(cal, kind, **({"rank": 3} if kind == "tiebreak" else {})) for kind in FITTED}


# --- ties ---


@pytest.mark.parametrize("kind", ["paper", "weighted", "distilled"])
def test_tokens_of_a_code_differ_by_their_bias_only_and_at_most_k_tokens_ever_win(heads, kind):
    head, (_, states) = heads[kind], random_head()
    states = torch.cat([states, 3 * torch.randn(4000, D, generator=torch.Generator().manual_seed(0))])
    logits, code = head(states), head.mapping[0].long()
    first = (code[:, None] == torch.arange(16)).int().argmax(0)[code]  # the lowest token of each token's code
    bias = 0 if head.bias is None else head.bias
    assert torch.equal(logits, (states @ head.codes.T)[:, code] + bias) or torch.allclose(
        logits - bias, (logits - bias)[:, first], atol=1e-6
    )
    if kind == "paper":
        assert torch.equal(logits, logits[:, first])
    assert len(logits.argmax(-1).unique()) <= 16


def test_worked_example():
    # Codes (1, 0) and (0, 2), h = (3, 1): scores 3 and 2; tokens 0 and 2 share code 0.
    mapping = torch.tensor([0, 1, 0])
    head = KINDS["paper"].build(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), mapping)
    assert head(torch.tensor([[3.0, 1.0]])).tolist() == [[3, 2, 3]]
    head = KINDS["weighted"].build(head.codes, mapping, torch.tensor([0.0, 2.0, 0.5]))
    assert head(torch.tensor([[3.0, 1.0]])).tolist() == [[3, 4, 3.5]]
    # ln q(1) = 4 - ln(e^3 + e^4 + e^3.5)
    expected = 4 - math.log(math.exp(3) + math.exp(4) + math.exp(3.5))
    assert head.log_prob(torch.tensor([3.0, 1.0]), torch.tensor(1)).item() == pytest.approx(
        expected, rel=1e-6
    )


def test_a_code_is_the_mean_of_its_rows_or_their_weighted_mean(cal, heads):
    for kind, weights in (("paper", torch.ones(V)), ("weighted", Statistics.of(cal.split()[0]).curvature)):
        head = heads[kind]
        code = head.mapping[0].long()
        for k in range(16):
            w = weights[code == k].double()
            mean = (w[:, None] * cal.weight[code == k].double()).sum(0) / w.sum()
            torch.testing.assert_close(head.codes[k].double(), mean, rtol=1e-5, atol=1e-6)


def test_singletons_keep_their_rows_bit_for_bit(cal, heads):
    head = heads["weighted"]
    code = head.mapping[0].long()
    alone = (torch.bincount(code)[code] == 1).nonzero()[:, 0]
    assert len(alone) >= 12
    assert torch.equal(head.codes[code[alone]], cal.weight[alone])


def test_whitening_with_equal_variances_and_weights_is_euclidean_kmeans():
    weight, _ = random_head()
    generator = lambda: torch.Generator().manual_seed(0)
    plain = kmeans(weight, torch.ones(V), 9, generator())
    assert torch.equal(kmeans(weight @ torch.eye(D), torch.full((V,), 0.5), 9, generator()), plain)


def test_rows_held_in_half_precision_are_clustered_as_well(cal, heads, monkeypatch):
    monkeypatch.setattr(vq, "_POINTS", 0)
    rough = fit(cal, "weighted")
    exact = vq.whiten(cal.weight.float(), cal.statistics.root.float())
    assert exact.dtype is torch.bfloat16
    assert rough.about["held_out"]["kl"] < 1.2 * heads["weighted"].about["held_out"]["kl"]


# --- reductions ---


@pytest.mark.parametrize("kind", ["paper", "weighted"])
def test_as_many_codes_as_tokens_give_the_dense_head(cal, kind):
    head = fit(cal, kind, codes=V)
    assert torch.equal(head.codes, cal.weight)
    difference = head(cal.states) - linear(cal.states, cal.weight)
    if kind == "paper":
        assert torch.equal(difference, torch.zeros_like(difference))
    else:  # the matched bias: up to one constant
        assert float((difference - difference.mean()).abs().max()) < 2e-2


def test_rank_0_and_one_book_are_weighted(cal):
    for kind, option, share in (("tiebreak", {"rank": 0}, 0.75), ("residual", {"books": 1}, 0.0)):
        expected = fit(cal, "weighted", singletons=share)
        assert torch.equal(fit(cal, kind, **option)(cal.states), expected(cal.states))


def test_refining_all_tokens_gives_the_dense_head_and_fewer_come_closer(cal, heads):
    dense = linear(cal.states, cal.weight)
    refined = [RefinedHead.of(heads["weighted"], cal.weight, best=n) for n in (4, 20, V)]
    torch.testing.assert_close(refined[-1](cal.states), dense, rtol=1e-5, atol=1e-5)
    kl = [evaluate(head, cal).kl for head in (heads["weighted"], *refined)]
    assert kl == sorted(kl, reverse=True)
    assert torch.isfinite(refined[0](cal.states)).all()


def test_screening_with_all_directions_gives_the_dense_head_and_more_come_closer(cal):
    dense = linear(cal.states, cal.weight)
    screened = [VQHead.fit(Stub(cal), cal, screened=n) for n in (3, 6, D)]
    torch.testing.assert_close(screened[-1](cal.states), dense, rtol=1e-4, atol=1e-4)
    kl = [evaluate(head, cal).kl for head in screened]
    assert kl == sorted(kl, reverse=True)
    assert evaluate(RefinedHead.of(screened[0], cal.weight, best=10), cal).kl < kl[0]


@pytest.mark.parametrize("given", [{"codes": 16}, {"screened": 4}])
def test_refining_is_an_option_of_the_fit_and_its_report(cal, given):
    plain, refined = (VQHead.fit(Stub(cal), cal, refine=n, **given) for n in (0, 10))
    expected = RefinedHead.of(plain, cal.weight, best=10)
    assert torch.equal(refined(cal.states), expected(cal.states))
    assert refined.about["held_out"] == evaluate(expected, cal.parts[1])._asdict() != plain.about["held_out"]
    assert refined.about["refine"] == 10 and refined.about["floors"] is None
    assert (plain.about["floors"] is None) == ("screened" in given)


def test_many_states_are_refined_in_blocks(cal, heads, monkeypatch):
    head = RefinedHead.of(heads["weighted"], cal.weight, best=4)
    expected = head(cal.states)
    monkeypatch.setattr(refine, "_GATHERED", 100)
    torch.testing.assert_close(head(cal.states), expected)
    assert head(cal.states[:6].reshape(2, 3, D)).shape == (2, 3, V)


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D)])
def test_no_states_have_no_logits(cal, heads, shape):
    screened = ScreenedHead.of(cal.weight, None, torch.eye(D), directions=4)
    refined = [RefinedHead.of(inner, cal.weight, best=4) for inner in (heads["weighted"], screened)]
    for head in (heads["weighted"], screened, *refined):
        assert head(torch.empty(shape)).shape == (*shape[:-1], V)


def test_a_dense_bias_is_kept():
    beta = torch.randn(V, generator=torch.Generator().manual_seed(1))
    cal = calibration(bias=beta)
    stub = Stub(cal)
    dense = linear(cal.states, cal.weight, beta)
    paper = VQHead.fit(stub, cal, codes=V, kind="paper")
    torch.testing.assert_close(paper(cal.states), dense)
    assert evaluate(VQHead.fit(stub, cal, codes=30, kind="weighted"), cal).kl < 0.2


# --- what the kinds promise ---


def test_the_kinds_beat_the_paper_at_the_same_number_of_codes(cal, heads):
    kl = {kind: head.about["held_out"]["kl"] for kind, head in heads.items()}
    assert kl["weighted"] < kl["paper"] / 2
    assert kl["distilled"] <= kl["weighted"]
    assert kl["tiebreak"] < kl["weighted"]


def test_the_matched_bias_gives_every_code_its_dense_mass_and_agrees_with_token_level_iteration(cal):
    statistics = Statistics.of(cal)
    mapping = torch.randint(0, 9, (V,), generator=torch.Generator().manual_seed(0))
    codes = means(cal.weight, torch.ones(V), mapping, 9).float()
    bias = matched_bias(codes, mapping, problem(cal), passes=2000, tolerance=1e-7)
    scores = (cal.states @ codes.T).double()[:, mapping]
    cluster = torch.nn.functional.one_hot(mapping, 9).double()
    q = (scores + bias).softmax(-1).mean(0) @ cluster
    torch.testing.assert_close(q, statistics.probability @ cluster, rtol=1e-4, atol=1e-6)
    token = torch.zeros(V, dtype=torch.float64)
    for _ in range(3000):
        token += statistics.probability.log() - (scores + token).softmax(-1).mean(0).log()
    difference = token - bias
    assert float((difference - difference.mean()).abs().max()) < 1e-3


def test_tokens_of_a_tiebreak_head_are_told_apart_by_the_context(heads):
    head, (_, states) = heads["tiebreak"], random_head(1)
    logits, code = head(states), head.mapping[0].long()
    a, b = (code == code.mode().values).nonzero()[:2, 0]
    assert (logits[:, a] > logits[:, b]).unique().numel() == 2


def test_residual_codes_lie_in_their_books(heads):
    mapping = heads["residual"].mapping
    assert mapping.shape == (2, V)
    assert mapping[0].max() < 8 <= mapping[1].min()


@torch.enable_grad()
def test_the_gradient_of_distillation_is_that_of_autograd_and_the_loss_is_convex():
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
    states, teacher = draw(30, 4), draw(30, 5).softmax(-1)
    theta, alpha = draw(5, 4).requires_grad_(), draw(5).requires_grad_()
    loss, by_theta, by_alpha = posterior_loss(theta, alpha, states, teacher)
    loss.backward()
    torch.testing.assert_close(by_theta, theta.grad)
    torch.testing.assert_close(by_alpha, alpha.grad)
    other, end = draw(5, 4), draw(5)
    along = [
        float(
            posterior_loss(theta + t * (other - theta), alpha + t * (end - alpha), states, teacher)[
                0
            ].detach()
        )
        for t in torch.linspace(0, 1, 11)
    ]
    assert all(2 * along[i] <= along[i - 1] + along[i + 1] + 1e-12 for i in range(1, 10))
    step = 1e-6
    moved = posterior_loss(theta, alpha + step * torch.eye(5)[0].double(), states, teacher)[0]
    assert float((moved - loss).detach() / step) == pytest.approx(by_alpha[0].item(), abs=1e-5)


def test_distillation_lowers_the_divergence_it_trains_on(cal):
    setting = problem(cal)
    start = KINDS["weighted"].solve(setting, singletons=0.5)
    end = list(distil(start, setting, 40, batch=100))[-1]
    assert evaluate(end, cal).kl < evaluate(start, cal).kl


def test_distillation_of_the_papers_codes_adds_no_bias(cal):
    head = fit(cal, "distilled", start="paper", epochs=30)
    assert head.bias is None and head.num_float_params() == 16 * D
    assert head.about["held_out"]["kl"] < fit(cal, "paper").about["held_out"]["kl"]


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_under_autocast_one_state_has_the_logits_it_has_among_others(heads, states):
    h = random_head()[1][:3].to(states)
    with torch.autocast("cpu", torch.bfloat16):
        one, several = heads["weighted"](h[:1]), heads["weighted"](h)[:1]
    assert one.dtype is several.dtype is torch.bfloat16
    torch.testing.assert_close(one, several)


# --- from K logits ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_and_the_greedy_token_need_k_logits_only(heads, dtype):
    for kind in ("paper", "weighted"):
        head = KINDS[kind].build(heads[kind].codes, heads[kind].mapping, heads[kind].bias, dtype=dtype)
        _, states = random_head(2, dtype=dtype)
        logits = head(states)
        tokens = torch.arange(V).repeat(10, 1)
        found = head.log_prob(states[:10, None], tokens)
        torch.testing.assert_close(found, logits[:10].log_softmax(-1), rtol=1e-5, atol=1e-5)
        assert torch.equal(head.greedy(states), logits.argmax(-1))


def test_the_greedy_table_gives_ties_within_and_across_codes_to_the_lowest_token():
    codes = torch.tensor([[1.0], [1.0], [0.5]])
    mapping = torch.tensor([2, 1, 0, 0, 1])
    head = KINDS["weighted"].build(codes, mapping, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0]))
    states = torch.tensor([[2.0], [-1.0], [0.0]])
    assert head.greedy(states).tolist() == head(states).argmax(-1).tolist() == [1, 0, 0]


def test_sampling_in_two_stages_follows_the_distribution(heads):
    state = random_head(3)[1][:1]
    for kind in ("paper", "weighted"):
        p = heads[kind](state).softmax(-1)[0]
        draws = heads[kind].sample(state.expand(40_000, -1), torch.Generator().manual_seed(0))
        counts = torch.bincount(draws, minlength=V)
        likely = p * 40_000 >= 5
        chi2 = ((counts - p * 40_000).square() / (p * 40_000))[likely].sum()
        n = int(likely.sum())
        assert float(chi2) < n + 4 * math.sqrt(2 * n)


def test_heads_with_more_than_a_code_say_nothing_from_k_logits(heads):
    with pytest.raises(ValueError, match="'tiebreak' has more than one code"):
        heads["tiebreak"].greedy(random_head()[1])


# --- accounts, files, determinism ---


@pytest.mark.parametrize("kind", FITTED)
def test_a_saved_head_gives_bit_equal_logits(heads, kind, tmp_path):
    heads[kind].save(tmp_path / "head")
    loaded = VQHead.load(tmp_path / "head")
    assert type(loaded) is type(heads[kind]) and loaded.about == heads[kind].about
    assert torch.equal(loaded(random_head()[1]), heads[kind](random_head()[1]))


def test_bfloat16_heads_are_kept_bit_for_bit(tmp_path):
    cal = calibration(dtype=torch.bfloat16)
    head = fit(cal, "tiebreak", rank=2)
    head.save(tmp_path / "head")
    loaded = VQHead.load(tmp_path / "head")
    assert loaded.codes.dtype is torch.bfloat16 and loaded.bias.dtype is torch.float32
    out = head(cal.states)
    assert out.dtype is torch.bfloat16 and torch.equal(loaded(cal.states), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [{"codes": 16}, {"codes": 16, "kind": "residual"}, {"screened": 4}])
def test_a_refined_head_keeps_the_rows_it_needs(given, dtype, tmp_path):
    cal = calibration(dtype=dtype, bias=torch.linspace(-1, 1, V).to(dtype))
    for n in (0, 5):
        head = VQHead.fit(Stub(cal), cal, refine=n, **given)
        head.save(tmp_path / str(n))
        loaded = VQHead.load(tmp_path / str(n))
        assert type(loaded) is type(head) and loaded.about == head.about
        assert torch.equal(loaded(cal.states), head(cal.states))


def test_the_same_seed_gives_the_same_head_and_another_seed_another(cal):
    a, b, c = (fit(cal, "weighted", seed=seed, singletons=0.2) for seed in (0, 0, 1))
    assert torch.equal(a.mapping, b.mapping) and torch.equal(a(cal.states), b(cal.states))
    assert not torch.equal(a.mapping, c.mapping)


def test_parameters_and_bytes_are_counted(heads):
    assert heads["paper"].num_float_params() == 16 * D
    assert heads["weighted"].num_float_params() == 16 * D + V
    assert heads["tiebreak"].num_float_params() == 16 * D + V + V * 3 + 3 * D
    head = KINDS["weighted"].build(torch.zeros(16, D).bfloat16(), torch.zeros(V), torch.zeros(V))
    # codes, mapping, bias; for each row the state, K scores in float32, the logits
    assert head.bytes_per_step(3) == 2 * 16 * D + 4 * V + 4 * V + 3 * (2 * D + 4 * 16 + 2 * V)
    dense = DenseHead.of(torch.zeros(V, D).bfloat16())
    assert dense.bytes_per_step() == 2 * V * D + 2 * D + 2 * V


def test_a_fit_reports_its_progress_and_its_price(cal):
    seen = []
    head = VQHead.fit(Stub(cal), cal, codes=16, report=seen.append)
    assert {"floor", "k-means", "bias"} <= {event.stage for event in seen}
    assert all(1 <= event.step <= event.steps for event in seen)
    assert head.about["floors"]["codes"] == 16
    assert head.about["floors"]["minimum"] <= head.about["floors"]["floor"]
    assert head.about["held_out"]["tokens"] == 60
    assert head.about["floors"]["information"] <= head.about["held_out"]["kl"]


def test_memory_does_not_hold_every_row_with_every_code(monkeypatch, cal):
    from logitproc.heads import calibration as module

    monkeypatch.setattr(module, "_ELEMENTS", 7 * V)
    small = Statistics.of(cal)
    monkeypatch.undo()
    torch.testing.assert_close(small.mass, Statistics.of(cal).mass)
    torch.testing.assert_close(small.products, Statistics.of(cal).products, rtol=1e-5, atol=1e-3)


# --- low bits ---


def test_int8_is_within_half_a_step_of_every_weight():
    weight, states = random_head()
    weight[3] = 0
    head = Int8Head.of(weight)
    error = (head.quantised.float() * head.scales[:, None] - weight).abs()
    assert (error <= head.scales[:, None] / 2 * 1.0001).all()
    torch.testing.assert_close(head(states), linear(states, weight), atol=0.15, rtol=0)
    for d, width in ((D, V), (64, 80)):  # unpacked, and through torch's kernel
        weight, states = random_head(d=d, width=width)
        out = Int8Head.of(weight.bfloat16())(states.bfloat16())
        torch.testing.assert_close(out.float(), linear(states, weight), atol=0.5, rtol=0.02)


def test_int4_is_worse_than_int8_and_not_by_much():
    weight, states = random_head(d=64, width=80)
    truth = linear(states, weight)
    error = lambda head: float((head(states.bfloat16()).float() - truth).norm() / truth.norm())
    assert error(Int8Head.of(weight.bfloat16())) < error(Int4Head.of(weight.bfloat16())) < 0.1


# --- bad input ---


def test_bad_input_is_refused_in_one_sentence(cal):
    cases = {
        "62 codes are more than the 61 tokens": {"codes": 62},
        "codes must be a whole number of at least 1, got 0": {"codes": 0},
        "option of 'paper' 'rank'": {"codes": 8, "kind": "paper", "rank": 2},
        "kind of head 'wieghted'. Did you mean 'weighted'": {"codes": 8, "kind": "wieghted"},
        "16 codes cannot be divided among 3 books": {"codes": 16, "kind": "residual", "books": 3},
        "15 codes cannot be divided among 2 books": {"codes": 15, "kind": "residual"},
        "books must be a whole number of at least 1, got '2'": {"codes": 8, "kind": "residual", "books": "2"},
        "books must be a whole number of at least 1, got 1.5": {"codes": 8, "kind": "residual", "books": 1.5},
        "start must be one of weighted, paper, got 'tiebreak'": {"codes": 8, "kind": "distilled", "start": "tiebreak"},
        "codes is missing: how many the head has; or give screened": {},
        "screened takes directions in place of codes; leave out codes": {"codes": 8, "screened": 4},
        "leave out codes, kind and its options": {"kind": "paper", "screened": 4},
        "refine must be at most 61, the number of tokens of the vocabulary, got 62": {"codes": 8, "refine": 62},
        "refine must be a whole number of at least 0, got -1": {"codes": 8, "refine": -1},
        "screened must be at most 12, the number of features of a hidden state, got 13": {"screened": 13},
        "screened must be a whole number of at least 0, got 0.5": {"screened": 0.5},
        "rank must be at most 12, the number of features": {"codes": 8, "kind": "tiebreak", "rank": 13},
        "epochs must be a whole number of at least 1, got 0": {"codes": 8, "kind": "distilled", "epochs": 0},
        r"singletons must be a number in .0, 1., got 2": {"codes": 8, "singletons": 2},
    }
    for sentence, given in cases.items():
        for text in (cal, Unreadable()):
            with pytest.raises((ValueError, LookupError), match=sentence):
                VQHead.fit(Stub(cal), text, **given)
    for given in ({"codes": 40}, {"screened": 4}):
        least = given.get("codes", 10)
        with pytest.raises(ValueError, match=f"too short: it has 9 tokens; give at least {least}, better ten times"):
            VQHead.fit(Stub(cal), cal.first(9), **given)
    with pytest.raises(ValueError, match="collected from another model"):
        VQHead.fit(Stub(calibration(seed=5)), cal, codes=8)
    for best, sentence in ((0, "whole number of at least 1, got 0"), (62, "at most 61, the number of tokens")):
        with pytest.raises(ValueError, match=f"best must be a? ?{sentence}"):
            RefinedHead.of(KINDS["paper"].build(torch.zeros(4, D), torch.zeros(V)), cal.weight, best=best)
    for directions, sentence in ((0, "whole number of at least 1, got 0"), (13, "at most 12, the number of features")):
        with pytest.raises(ValueError, match=f"directions must be a? ?{sentence}"):
            ScreenedHead.of(cal.weight, None, torch.eye(D), directions=directions)
    broken = calibration()
    broken.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        VQHead.fit(Stub(broken), broken, codes=8)


def test_a_folder_that_holds_something_else_is_refused(tmp_path, heads):
    heads["paper"].save(tmp_path / "head")
    text = (tmp_path / "head/artifact.json").read_text()
    (tmp_path / "head/artifact.json").write_text(text.replace('"kind": "paper"', '"kind": "ngram-prior"'))
    with pytest.raises(ValueError, match="holds a 'ngram-prior', not a fitted head"):
        VQHead.load(tmp_path / "head")
