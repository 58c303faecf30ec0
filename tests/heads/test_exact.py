import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig

import logitproc as lp
from logitproc import ops
from logitproc.heads import KINDS as HEADS
from logitproc.heads import ExactHead
from logitproc.heads.clustering import kmeans, means
from logitproc.heads.planes import Planes, round_states, scores, unpack
from logitproc.ops import cpu, dispatch, native

V, D = 1500, 136  # two groups of 128 columns, the second mostly padding
KINDS = ("exact_nested", "exact_int8")
DTYPES = (torch.float32, torch.bfloat16)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def awkward(seed=0, dtype=torch.float32):
    """Rows of very different length, with outliers, zeros and duplicates."""
    weight = draw(V, D, seed=seed) * torch.linspace(0.2, 2, V)[:, None]
    weight[5] = 0
    weight[[40, 900, 1100]] = weight[7].clone()  # exact ties
    weight[11, 3] = 40
    weight[12] *= 1e4
    weight[13] *= 1e-12
    weight[20:40] = weight[19] + 1e-3 * draw(20, D, seed=1)  # near ties
    return weight.to(dtype)


def states_near(weight, seed=0, n=200):
    """States that favour certain rows, ties and near ties among them, and states that favour none."""
    random = torch.Generator().manual_seed(seed)
    favoured = torch.randint(0, V, (n,), generator=random)
    favoured[:40] = torch.tensor([7, 19, 25, 40]).repeat(10)[:n]
    strength = 3 * torch.rand(n, 1, generator=random) * (torch.arange(n) % 4 > 0)[:, None]
    rows = weight[favoured].float()
    h = (
        torch.randn(n, D, generator=random)
        + strength * rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-6) * 3
    )
    h[::7, 5] = 60  # outliers
    return h.to(weight.dtype)


def layer(weight, bias=None):
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    made.weight = nn.Parameter(weight.clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.to(weight.dtype))
    return made


def one_by_one(call, states):
    return torch.cat([call(h[None]) for h in states])


# --- planes ---


def number(bits):
    return bits.view(torch.float32).double()


@pytest.mark.parametrize("dtype", DTYPES)
def test_planes_hold_half_of_each_weight_and_the_bounds_are_never_below_the_truth(dtype):
    weight = awkward(dtype=dtype)
    made = Planes.of(weight)
    assert [(x.shape, x.dtype) for x in made] == [(x.shape, x.dtype) for x in Planes.empty(D, V)]
    hi, lo = unpack(made.high).double(), unpack(made.low).double()
    assert hi.min() == -8 and hi.max() == 7 and lo.min() == -8 and lo.max() == 7
    scale = (made.codes.double() * number(made.units)[:, None, None])[..., None]
    inside = lambda values: values.flatten(1)[:, :D]
    w, w1, w2 = weight.double(), inside(16 * hi * scale), inside((16 * hi + lo) * scale)
    assert ((w - w2).abs() <= inside(scale.abs().expand_as(hi)) / 2 * (1 + 1e-9)).all()
    for bound, rows in ((made.first, w - w1), (made.second, w - w2), *((made.norms, x) for x in (w, w1, w2))):
        assert (number(bound) >= rows.norm(dim=1)).all()
    lost = lambda bound: float((number(bound) / number(made.norms)).nanmedian())  # a row of zeros
    assert lost(made.second) < 0.006 < 0.07 < lost(made.first) < 0.09


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_true_logit_of_every_token_lies_within_the_bound(dtype):
    weight = awkward(dtype=dtype)
    made, h = Planes.of(weight), states_near(weight)
    states = round_states(h)
    truth = h.double() @ weight.double().T
    y = scores(made, "high", states)
    for score, rho in ((y, made.first), (y + scores(made, "low", states), made.second)):
        bound = states.norms[:, None] * number(rho) + states.lost[:, None] * number(made.norms)
        assert ((score.double() - truth).abs() <= bound + 1e-6 * truth.abs()).all()


@pytest.mark.parametrize(
    "backend, rows, columns, threads",
    [("cpu", 1500, D, 1), ("cpu", 1500, 128, 3), ("cpu", 1500, 700, 3), ("triton", 40, D, 1)],
)
def test_all_kernels_give_the_same_scores_bit_for_bit(backend, rows, columns, threads):
    if reason := dispatch.unavailable(backend):
        pytest.skip(reason)
    weight = draw(rows, columns) * torch.linspace(0.2, 2, rows)[:, None]
    weight[3], weight[4, 5] = 0, 1e30
    made, states = Planes.of(weight), round_states(draw(7 if backend == "cpu" else 3, columns, seed=1))
    some = torch.randint(0, rows, (rows // 15,), generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for half in ("high", "low"):
            with ops.backend("reference"):
                plain = scores(made, half, states)
                assert torch.equal(scores(made, half, states, some), plain[:, some]) and plain.isfinite().all()
            with ops.backend(backend):
                assert torch.equal(scores(made, half, states), plain)
                assert torch.equal(scores(made, half, states, some), plain[:, some])
                assert torch.equal(scores(made, half, states.one(2), some[:1]), plain[2:3, some[:1]])
                assert scores(made, half, states, some[:0]).shape == (len(states.t), 0)
    finally:
        torch.set_num_threads(before)


def test_a_processor_without_these_instructions_gets_the_same_scores(tmp_path, monkeypatch):
    if cpu.library() is None:
        pytest.skip("there is no C++ compiler")
    made, states = Planes.of(draw(90, D)), round_states(draw(5, D, seed=1))
    expected = scores(made, "high", states)
    source = tmp_path / "portable.cpp"
    source.write_text(f'#include "{Path(cpu.__file__).with_name("planes.h")}"\n')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", tuple(flag for flag in native.FLAGS if not flag.startswith("-m")))
    portable = native.load(source)
    assert portable is not None
    monkeypatch.setattr(cpu, "library", lambda: portable)
    assert torch.equal(scores(made, "high", states), expected)


def test_large_pages_hold_the_same_bytes():
    held = draw(3 << 20)  # 12 MiB: some whole pages, and ends that are none
    before = held.clone()
    cpu.hold_in_large_pages(held)
    assert torch.equal(held, before)


def test_states_are_rounded_to_16_bits():
    h = draw(4, 200)
    h[2] = 0
    states = round_states(h)
    error = (states.t[:, None].double() * states.whole[:, :200] - h).norm(dim=1)
    assert (error <= states.lost + 1e-12).all() and (states.lost < 1e-3 * states.norms + 1e-12).all()


# --- the same token ---


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_winner_is_that_of_the_dense_head(kind, dtype, bias):
    weight = awkward(dtype=dtype)
    own = layer(weight, 3 * draw(V, seed=5) if bias else None)
    head, h = ExactHead.of(own, kind), states_near(weight)
    assert torch.equal(one_by_one(head.top, h).argmax(-1), one_by_one(own, h).argmax(-1))
    for several in h.split(4):
        assert torch.equal(head.top(several).argmax(-1), own(several).argmax(-1))
    causes = ("ambiguous", "overflow", "special", "stale", "wide")
    assert sum(head.counters[cause] for cause in causes) < head.counters["rows"] / 2


@pytest.mark.parametrize("kind", KINDS)
def test_no_certificate_covers_a_wrong_winner(kind):
    """Without fallback: whatever is not flagged is right, and what is flagged is what `checked` computes again."""
    for dtype in DTYPES:
        weight = awkward(seed=3, dtype=dtype)
        own, h = layer(weight), states_near(weight, seed=3)
        checked, deferred = ExactHead.of(own, kind), ExactHead.of(own, kind, mode="deferred")
        for state in h:
            before = sum(checked.counters[c] for c in ("ambiguous", "overflow", "special"))
            checked.top(state[None])
            found = deferred.top(state[None]).argmax(-1)
            sure = deferred.certified()
            assert sure == (before == sum(checked.counters[c] for c in ("ambiguous", "overflow", "special")))
            assert not sure or torch.equal(found, own(state[None]).argmax(-1))


def test_of_equal_rows_the_lowest_id_wins():
    weight = awkward(dtype=torch.bfloat16)
    head, h = ExactHead.of(layer(weight)), weight[7][None] * 4
    assert weight[[7, 40, 900]].unique(dim=0).shape[0] == 1
    logits = head.top(h)
    assert logits.argmax(-1) == (h.float() @ weight.float().T).bfloat16().argmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_m_best_are_those_of_the_dense_head(kind):
    weight = awkward(dtype=torch.bfloat16)
    own, h = layer(weight), states_near(weight)
    head = ExactHead.of(own, kind, m=5)
    for state in h[:60]:
        dense, found = own(state[None])[0], head.top(state[None])[0]
        least = dense.topk(5).values[-1]
        assert torch.equal((dense >= least).nonzero(), (found >= found.topk(5).values[-1]).nonzero())


def test_a_capped_model_breaks_the_ties_that_capping_makes():
    weight = awkward(dtype=torch.bfloat16)
    own, h = layer(weight), states_near(weight) * 2
    head = ExactHead.of(own, softcap=20.0)
    cap = lambda logits: ((logits / 20.0).tanh() * 20.0).argmax(-1)
    assert torch.equal(cap(one_by_one(head.top, h)), cap(one_by_one(own, h)))
    assert one_by_one(own, h).argmax(-1).ne(cap(one_by_one(own, h))).any(), "capping matters here"


# --- fallback ---


def test_what_cannot_be_certified_is_computed_densely_and_counted():
    weight = awkward()
    own = layer(weight)
    h = states_near(weight, n=20)
    head = ExactHead.of(own, capacity=1)
    assert torch.equal(one_by_one(head.top, h).argmax(-1), one_by_one(own, h).argmax(-1))
    assert head.counters["overflow"] > 0
    head = ExactHead.of(own)
    odd = h[:4].clone()
    odd[0], odd[1, 2], odd[2, 3] = 0, torch.inf, torch.nan
    assert torch.equal(head.top(odd)[:3].nan_to_num(), own(odd)[:3].nan_to_num())
    assert head.counters["special"] == 3
    for scale in (1e-30, 1e37):
        assert torch.equal(head.top(h[3:4] * scale).nan_to_num(), own(h[3:4] * scale).nan_to_num())
    assert head.counters["special"] == 5
    assert torch.equal(head.top(h[:5]), own(h[:5])) and head.counters["wide"] == 1
    assert head.counters["calls"] == 4 and head.counters["rows"] == 11
    head.reset_counters()
    assert not any(head.counters.values())


def test_edited_or_cast_rows_are_dense_until_refreshed():
    weight = awkward()
    head, h = ExactHead.of(layer(weight)), states_near(weight, n=4)
    head.weight[0] += 1
    assert torch.equal(head.top(h), head.full(h)) and head.counters["stale"] == 1
    head.refresh()
    assert torch.isinf(head.top(h)).any() and head.counters["stale"] == 1
    head.to(torch.bfloat16)
    assert torch.equal(head.top(h.bfloat16()), head.full(h.bfloat16())) and head.counters["stale"] == 2
    head.refresh()
    assert torch.isinf(head.top(h.bfloat16())).any()
    assert head.top(h.bfloat16()).argmax(-1).tolist() == head.full(h.bfloat16()).argmax(-1).tolist()


# --- why not otherwise ---


def test_bounds_from_centroids_would_keep_nearly_every_token():
    weight = draw(V, D)
    labels = kmeans(weight, torch.ones(V), 60, torch.Generator().manual_seed(0))
    centroids = means(weight, torch.ones(V), labels, 60).float()[labels]
    kept = []
    for winner in range(0, 400, 20):
        h = draw(D, seed=winner) + 0.6 * weight[winner]
        upper = centroids @ h + (weight - centroids).norm(dim=1) * h.norm()
        kept.append((upper >= (weight @ h).max()).float().mean())
    assert torch.stack(kept).mean() > 0.9


def test_a_rule_of_six_sigma_loses_winners():
    # Residuals of k-means point where their row points: along a winning state they are no noise.
    weight = draw(V, D)
    labels = kmeans(weight, torch.ones(V), 60, torch.Generator().manual_seed(0))
    centroids = means(weight, torch.ones(V), labels, 60).float()[labels]
    residual = (weight - centroids).norm(dim=1)
    lost = 0
    for winner in range(0, 400, 10):
        h = weight[winner] + 0.1 * draw(D, seed=winner)
        if residual[winner] > 0 and (weight @ h).argmax() == winner:
            sigma = residual * h.norm() / math.sqrt(D)
            lost += bool((centroids @ h + 6 * sigma)[winner] < (weight @ h).max())
    assert lost > 0


# --- in a model ---


@pytest.fixture(params=DTYPES, ids=str)
def model(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=331, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4, bos_token_id=1, eos_token_id=None,
        pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=request.param).eval()


PROMPT = torch.tensor([[5, 6, 7, 5, 6, 7]])


def generate(model, **settings):
    torch.manual_seed(1)
    return model.generate(PROMPT, max_new_tokens=20, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same_and_certified(kind, model, tmp_path):
    expected = generate(model, do_sample=False)
    head = ExactHead.of(model, kind)
    with lp.attach(model, head):
        assert torch.equal(generate(model, do_sample=False), expected)
        assert head.counters["rows"] >= 20 and not head.counters["uncovered"]
        assert torch.equal(generate(model, do_sample=False, prompt_lookup_num_tokens=2), expected)
    converted = lp.convert(model, head)
    converted.save_pretrained(tmp_path / "m")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(generate(loaded, do_sample=False), expected)
    assert loaded.lm_head.counters["rows"] >= 20 and not loaded.lm_head.counters["stale"]


def test_calls_that_need_more_than_m_logits_get_the_dense_ones_and_are_counted(model):
    head = ExactHead.of(model, m=5)
    covered = (
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "top_k": 3, "top_p": 0.9},
        {"do_sample": False},
    )
    others = (
        {"do_sample": True, "top_k": 6}, {"do_sample": True, "top_k": 0}, {"do_sample": True}, {"num_beams": 2},
        {"repetition_penalty": 1.2}, {"logits_processor": [lp.Chain()]}, {"min_new_tokens": 3},
        {"output_scores": True, "return_dict_in_generate": True},
    )  # fmt: skip
    for settings, dense in [*((s, False) for s in covered), *((s, True) for s in others)]:
        expected = generate(model, **settings)
        head.reset_counters()
        with lp.attach(model, head):
            found = generate(model, **settings)
        if "output_scores" in settings:
            found, expected = found.sequences, expected.sequences
        assert (head.counters["uncovered"] > 0) == dense, settings
        if dense or model.dtype is torch.float32 or not settings["do_sample"]:
            assert torch.equal(found, expected), settings
    with lp.attach(model, head):
        assert torch.isfinite(model(PROMPT).logits).all()  # outside generate: perplexity needs them all


def test_bad_input_is_refused_in_one_sentence():
    own = layer(awkward())
    cases = {
        "kind must be one of exact_int8, exact_nested, got 'exact'": {"kind": "exact"},
        "mode must be one of checked, deferred, got 'lazy'": {"mode": "lazy"},
        "m must be between 1 and 64, got 0": {"m": 0},
        "m must be between 1 and 64, got 65": {"m": 65},
    }
    for sentence, given in cases.items():
        with pytest.raises(ValueError, match=sentence):
            ExactHead.of(own, **given)
    scaled = AutoModelForCausalLM.from_config(GraniteConfig(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0, logits_scaling=4.0,
    ))  # fmt: skip
    with pytest.raises(ValueError, match="changes its logits after the head, not by soft-capping alone"):
        ExactHead.of(scaled)
    scaled.lm_head = nn.Sequential(scaled.lm_head)
    with pytest.raises(ValueError, match="linear output layer; this model has Sequential"):
        ExactHead.of(scaled)
    own.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        ExactHead.of(own)


def test_a_step_reads_a_fraction_of_the_bytes():
    own = nn.Linear(4096, 128_256, bias=False, device="meta", dtype=torch.bfloat16)
    with torch.device("meta"):
        heads = [HEADS[kind](4096, 128_256, dtype="bfloat16") for kind in ("dense", *reversed(KINDS))]
    dense, int8, nested = (head.bytes_per_step() for head in heads)
    assert dense == own.weight.nbytes + 2 * (4096 + 128_256)
    assert dense / int8 > 1.9 and dense / nested > 3.7
