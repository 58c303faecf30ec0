"""Scoring: hand-worked figures, teacher forcing against step by step, windows, padding, sums."""

import math
import weakref
from dataclasses import dataclass

import pytest
import torch
from conftest import WIDTH, tiny_tokenizer
from test_companion import FollowLogitsProcessor
from test_speculative import BlendLogitsProcessor
from torch import Tensor

import logitproc as lp
from logitproc import scoring
from logitproc.companion import tiny_companion
from logitproc.scoring import compare, process_positions, score_continuations, score_corpus, score_tokens


@dataclass(eq=False)
class Tilt(lp.Processor):
    """Reads nothing: raises every third id."""

    strength: float = 1.0

    def step(self, tokens: Tensor, scores: Tensor) -> Tensor:
        return scores + self.strength * (torch.arange(scores.shape[-1]) % 3 == 0)


@dataclass(eq=False)
class Echo(lp.Processor):
    """Reads two tokens: raises the older one, lowers the newer one."""

    context = 2

    def step(self, tokens: Tensor, scores: Tensor) -> Tensor:
        change = torch.tensor([2.0, -1.0]) * (tokens >= 0)
        return scores.scatter_add(1, tokens.clamp(min=0), change)


@dataclass(eq=False)
class Tally(lp.Processor):
    """Reads everything: lowers each id by its count, those of the prompt by half of it."""

    context = None

    def step(self, tokens: Tensor, scores: Tensor, *, generated: Tensor) -> Tensor:
        age = torch.arange(tokens.shape[1], 0, -1)
        weight = torch.where(age <= generated[:, None], 1.0, 0.5) * (tokens >= 0)
        return scores - torch.zeros_like(scores).scatter_add(1, tokens.clamp(min=0), weight)


@dataclass(eq=False)
class Forbid(lp.Processor):
    ids: tuple[int, ...] = (5,)

    def step(self, tokens: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor(self.ids), -math.inf)


CHAINS = {
    "context 0": lp.Chain([Tilt()]),
    "context 2": lp.Chain([Echo(), Tilt(0.3)]),
    "context all": lp.Chain([Echo(), Tally()]),
    "forbidding": lp.Chain([Tally(), Forbid((1, 2, 3))]),
    "companions": lp.Chain([Echo(), FollowLogitsProcessor(tiny_companion(WIDTH)), Tally()]),
    "evidence": lp.Chain([Tally(), BlendLogitsProcessor(tiny_companion(WIDTH)), Tilt()]),
}
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def assert_equal(found: Tensor, expected: Tensor, chain: lp.Chain) -> None:
    """Bit for bit; companions round as their forward passes are long."""
    tolerance = 1e-5 if chain.companions else 0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(4, WIDTH, shape, generator=torch.Generator().manual_seed(seed))


def both_sides(rows: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """ids and mask of ragged rows, padded on the left and on the right with an ordinary id."""
    length = max(map(len, rows))
    fill = lambda row: torch.full((length - len(row),), 7)
    seen = lambda row: torch.ones_like(row)
    return {
        "left": (
            torch.stack([torch.cat([fill(r), r]) for r in rows]),
            torch.stack([torch.cat([fill(r) * 0, seen(r)]) for r in rows]),
        ),
        "right": (
            torch.stack([torch.cat([r, fill(r)]) for r in rows]),
            torch.stack([torch.cat([seen(r), fill(r) * 0]) for r in rows]),
        ),
    }


# --- figures ---


def scores_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_divergences_of_two_tokens_worked_by_hand():
    # m = (.375, .625). JS = (.5 log2 .5/.375 + .5 log2 .5/.625 + .25 log2 .25/.375 + .75 log2 .75/.625) / 2
    #    = (.207519 - .160964 - .146241 + .197276) / 2 = .048795 bits; the tokens moved .25, so TV = .25.
    # KL(q||p) = .25 ln .5 + .75 ln 1.5 = .130812;  KL(p||q) = .5 ln 2 + .5 ln(2/3) = .143841.
    found = compare(scores_of(0.5, 0.5), scores_of(0.25, 0.75), torch.tensor([1]))
    assert found["js"].item() == pytest.approx(0.048795, abs=5e-7)
    assert found["kl"].item() == pytest.approx(0.130812, abs=5e-7)
    assert found["reverse_kl"].item() == pytest.approx(0.143841, abs=5e-7)
    assert found["tv"].item() == pytest.approx(0.25)
    assert found["base_nll"].item() == pytest.approx(math.log(2))
    assert found["nll"].item() == pytest.approx(-math.log(0.75))


def test_disjoint_distributions_have_a_js_of_one_bit_and_infinite_kl():
    found = compare(scores_of(1, 0, 0), scores_of(0, 1, 0), torch.tensor([0]))
    assert found["js"].item() == found["tv"].item() == 1
    assert found["kl"].item() == found["reverse_kl"].item() == found["nll"].item() == math.inf
    assert found["base_nll"].item() == 0
    assert (bool(found["agree"]), bool(found["flip"])) == (False, True)


def test_three_tokens_of_which_the_chain_forbids_one():
    # q = (2/3, 1/3, 0) from p = (.5, .25, .25): m = (7/12, 7/24, 1/8), TV = .25, KL(q||p) = ln(4/3).
    found = compare(scores_of(0.5, 0.25, 0.25), scores_of(2 / 3, 1 / 3, 0), torch.tensor([2]))
    by_hand = 0.5 * (0.5 * math.log2(6 / 7) + 0.25 * math.log2(6 / 7) + 0.25 * math.log2(2))
    by_hand += 0.5 * (2 / 3 * math.log2(8 / 7) + 1 / 3 * math.log2(8 / 7))
    assert found["js"].item() == pytest.approx(by_hand)
    assert found["kl"].item() == pytest.approx(math.log(4 / 3))
    assert found["reverse_kl"].item() == found["nll"].item() == math.inf
    assert found["tv"].item() == pytest.approx(0.25)


def test_tokens_that_both_forbid_change_nothing():
    narrow = compare(scores_of(0.5, 0.5), scores_of(0.25, 0.75), torch.tensor([1]))
    wide = compare(scores_of(0.5, 0.5, 0), scores_of(0.25, 0.75, 0), torch.tensor([1]))
    assert {k: v.item() for k, v in wide.items()} == pytest.approx({k: v.item() for k, v in narrow.items()})


def test_a_tiny_change_keeps_its_digits():
    # To second order JS = Var_p(d) / 8 nats; d = 1e-5 on a token of probability 1/2: Var = 1e-10 / 4.
    base = torch.zeros(1, 2, dtype=torch.float64)
    found = compare(base, base + torch.tensor([[1e-5, 0.0]]), torch.tensor([0]))
    assert found["js"].item() == pytest.approx(1e-10 / 32 / math.log(2), rel=1e-4)


def test_large_scores_do_not_overflow():
    base, processed = torch.tensor([[2000.0, 0.0, -2000.0]]), torch.tensor([[-2000.0, 0.0, 2000.0]])
    found = compare(base, processed, torch.tensor([0]))
    assert found["js"].item() == 1 and found["kl"].item() == found["nll"].item() == 4000


# --- positions ---


@every_chain
@pytest.mark.parametrize("max_rows", [None, 5])
def test_every_position_equals_a_call_of_the_chain(chain, max_rows):
    ids, logits = random_ids(3, 9), torch.randn(3, 9, WIDTH)
    before = logits.clone()
    found = process_positions(chain, ids, logits, max_rows=max_rows)
    for t in range(9):
        assert_equal(found[:, t], chain(ids[:, : t + 1], logits[:, t]), chain)
    assert torch.equal(logits, before)


@every_chain
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_padded_position_equals_a_call_of_the_bound_chain(chain, side):
    rows = [random_ids(n, seed=n) for n in (9, 6, 4)]
    prompts = torch.tensor([4, 3, 1])
    ids, mask = both_sides(rows)[side]
    logits = torch.randn(3, 9, WIDTH)
    found = process_positions(chain, ids, logits, mask, prompts)
    for b, row in enumerate(rows):
        offset = 9 - len(row) if side == "left" else 0
        prompt = offset + int(prompts[b])
        bound = chain.bind(ids[b : b + 1, :prompt], mask[b : b + 1, :prompt])
        for t in range(prompt - 1, offset + len(row)):
            expected = bound(ids[b : b + 1, : t + 1], logits[b : b + 1, t])
            assert_equal(found[b, t], expected[0], chain)


@every_chain
def test_teacher_forcing_gives_the_probabilities_that_generate_drew_from(model, chain):
    rows = [random_ids(n, seed=n) for n in (3, 6)]
    ids, mask = both_sides(rows)["left"]
    out = lp.generate(
        model, chain, input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False,
        output_scores=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    new = out.sequences[:, 6:]
    nll = lambda steps: -torch.stack(steps, 1).log_softmax(-1).gather(2, new[..., None]).mean((1, 2))
    found = score_continuations(model, chain, [row.tolist() for row in rows], new.tolist(), batch_size=2)
    for b in range(2):
        assert found[b]["tokens"] == 8
        assert found[b]["nll"] == pytest.approx(nll(out.scores)[b].item(), abs=1e-5)
        assert found[b]["base_nll"] == pytest.approx(nll(out.logits)[b].item(), abs=1e-5)


# --- tokens ---


def test_the_base_loss_is_the_loss_of_transformers(model):
    ids = random_ids(2, 128)
    found = score_tokens(model, CHAINS["context 2"], ids)
    loss = model(input_ids=ids, labels=ids).loss.item()
    assert found["base_nll"][found["scored"]].mean().item() == pytest.approx(loss, rel=1e-6)
    assert found["scored"].tolist() == [[False] + [True] * 127] * 2


@every_chain
def test_padding_on_either_side_changes_no_figure(model, chain):
    rows = [random_ids(n, seed=n) for n in (9, 2, 5)]
    prompts = torch.tensor([4, 1, 2])
    for ids, mask in both_sides(rows).values():
        found = score_tokens(model, chain, ids, mask, prompts)
        for b, row in enumerate(rows):
            alone = score_tokens(model, chain, row[None], prompt_lengths=prompts[b : b + 1])
            at = mask[b].bool()
            for name in alone:
                torch.testing.assert_close(found[name][b, at], alone[name][0], rtol=1e-5, atol=1e-5)
                assert not found[name][b, ~at].any()


def test_a_chain_that_changes_nothing_gives_zero_and_the_same_loss(model):
    for chain in (lp.Chain(), lp.Chain([Tilt(0.0)])):
        found = score_tokens(model, chain, random_ids(2, 12))
        assert torch.equal(found["nll"], found["base_nll"])
        for name in ("js", "kl", "reverse_kl", "tv", "flip"):
            assert not found[name].any(), name
        assert torch.equal(found["agree"].bool(), found["scored"])


def test_a_forbidden_token_is_infinitely_unlikely_and_nothing_becomes_nan(model):
    ids = torch.tensor([[1, 8, 5, 9, 5]])
    found = score_tokens(model, lp.Chain([Forbid((5, 6))]), ids)
    assert found["nll"][0].isinf().tolist() == [False, False, True, False, True]
    for name, values in found.items():
        assert not values.isnan().any(), name


def test_only_the_wanted_tokens_are_scored_and_the_divergences_can_be_left_out(model):
    ids, only = random_ids(1, 6), torch.tensor([[True, False, True, False, False, True]])
    every = score_tokens(model, CHAINS["context 2"], ids)
    some = score_tokens(model, CHAINS["context 2"], ids, divergence=False, only=only)
    assert set(some) == {"base_nll", "nll", "scored"}
    assert some["scored"].tolist() == [[False, False, True, False, False, True]]
    torch.testing.assert_close(some["nll"], every["nll"] * some["scored"], rtol=0, atol=1e-6)


def test_a_text_that_is_too_long_or_too_short(model):
    assert not score_tokens(model, lp.Chain(), random_ids(2, 1))["scored"].any()
    assert score_tokens(model, lp.Chain(), random_ids(1, 129))["scored"].sum() == 128
    with pytest.raises(ValueError, match="reads 128 tokens, the text has 130"):
        score_tokens(model, lp.Chain(), random_ids(1, 130))


# --- windows ---


def test_every_token_is_predicted_once_from_enough_context():
    for n in [0, 1, 2, 3, 7, 8, 9, 10, 31, 100]:
        for context in [1, 2, 3, 8, 9, 40]:
            for stride in {1, 2, 3, context // 2, context - 1, context} & set(range(1, context + 1)):
                cut = list(scoring.windows(n, context, stride))
                predicted = [t for w in cut for t in range(w.first, w.stop)]
                assert predicted == list(range(1, n))
                for i, window in enumerate(cut):
                    assert 0 <= window.start < window.first < window.stop <= n
                    assert window.stop - window.start <= context + 1
                    assert i == 0 or window.first - window.start >= context - stride + 1
                    assert n <= context or window.stop - window.start == context + 1


def test_the_windows_of_the_drawing():
    assert list(scoring.windows(9, 4, 2)) == [(0, 5, 1), (2, 7, 5), (4, 9, 7)]


@pytest.mark.parametrize("context, stride", [(4, 0), (4, 5), (0, 1)])
def test_a_stride_that_leaves_tokens_out_is_refused(context, stride):
    with pytest.raises(ValueError, match="stride must be from 1 to the context"):
        scoring.windows(10, context, stride)


# --- a corpus ---


DOCUMENTS = [text(random_ids(n, seed=n).tolist()) for n in (50, 3, 1, 20, 33, 8, 8, 2)] + [""]


@every_chain
def test_a_corpus_is_the_sum_of_its_windows(model, chain):
    report = score_corpus(model, tiny_tokenizer(), chain, iter(DOCUMENTS), context=16, stride=6, batch_size=3)
    nll, base = [], []
    for document in DOCUMENTS:
        ids = torch.tensor([1, *(int(word[1:]) for word in document.split())])
        for start, stop, first in scoring.windows(len(ids), 16, 6):
            # Tokens before the window were generated too, so a longer history counts as generated.
            found = score_tokens(model, chain, ids[None, start:stop], prompt_lengths=torch.tensor([-start]))
            nll += found["nll"][0, first - start :].tolist()
            base += found["base_nll"][0, first - start :].tolist()
    assert report.tokens == report.words == len(nll) == sum(len(d.split()) for d in DOCUMENTS)
    assert (report.documents, report.unscored) == (9, 0)
    assert report.bytes == sum(len(document) for document in DOCUMENTS)
    assert report.mean["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-6)
    assert report.mean["base_nll"] == pytest.approx(sum(base) / len(base), rel=1e-6)
    assert report.perplexity() == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    assert report.word_perplexity("base_nll") == pytest.approx(report.perplexity("base_nll"))
    assert report.bits_per_byte() == pytest.approx(sum(nll) / math.log(2) / report.bytes, rel=1e-6)
    difference = torch.tensor(nll, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    assert report.mean["delta_nll"] == pytest.approx(difference.mean().item(), abs=1e-6)
    if math.isfinite(report.mean["nll"]):
        by_hand = (difference.std() / len(nll) ** 0.5).item()
        assert report.error["delta_nll"] == pytest.approx(by_hand, rel=1e-4)


def test_without_bos_the_first_token_of_a_document_is_counted_as_not_scored(model):
    report = score_corpus(model, tiny_tokenizer(bos_token=None), lp.Chain(), DOCUMENTS, context=32, stride=16)
    assert report.unscored == 8 and report.tokens == report.words - 8


def test_the_batch_size_changes_no_figure(model):
    score = lambda size: score_corpus(
        model, tiny_tokenizer(), CHAINS["context all"], DOCUMENTS, context=8, stride=8, batch_size=size
    )
    assert score(1).mean == pytest.approx(score(64).mean, rel=1e-5)


def test_a_forbidden_token_of_the_text_is_counted(model):
    report = score_corpus(model, tiny_tokenizer(), lp.Chain([Forbid()]), ["w4 w5 w6 w5"], context=8, stride=8)
    assert report.forbidden == 2 and report.perplexity() == math.inf
    assert math.isfinite(report.perplexity("base_nll")) and math.isnan(report.error["nll"])


class Document(str):  # a plain str cannot be watched
    pass


def test_documents_are_read_one_by_one_and_let_go(model):
    alive: weakref.WeakSet[Document] = weakref.WeakSet()
    read = 0

    def documents():
        nonlocal read
        while True:  # without end, so that reading ahead of the limit would never return
            document = Document(text(random_ids(5, seed=read).tolist()))
            alive.add(document)
            read += 1
            yield document
            del document
            assert len(alive) <= 1

    report = score_corpus(
        model, tiny_tokenizer(), lp.Chain(), documents(), context=8, stride=8, limit=700, divergence=False
    )
    assert report.documents == read == 700 and report.tokens == 3500


def test_a_long_document_is_tokenized_in_pieces_that_end_at_whitespace(model, monkeypatch):
    monkeypatch.setattr(scoring, "_PIECE", 16)
    for cut in ("w4 w5 w6 w7 w8 w9 w10 w11", "w4\nw5 w6\nw7 w8 w9\n\nw10 w11 ", "x" * 40, ""):
        pieces = list(scoring._pieces(cut))
        assert "".join(pieces) == cut and max(map(len, pieces)) <= 16
        assert "x" in cut or [word for piece in pieces for word in piece.split()] == cut.split()
    score = lambda: score_corpus(model, tiny_tokenizer(), lp.Chain(), DOCUMENTS, context=16, stride=8)
    in_pieces = score()
    monkeypatch.undo()
    assert in_pieces == score()


@pytest.mark.parametrize(
    "documents, settings, message",
    [
        (["", ""], {}, "no token to score: 2 documents"),
        (["w4"], {"context": 129}, "at most what the model reads, 128; got 129"),
        (["w4"], {"stride": 9}, "stride must be from 1 to the context, got stride 9 and context 8"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, documents, settings, message):
    with pytest.raises(ValueError, match=message):
        score_corpus(
            model, tiny_tokenizer(), lp.Chain(), documents, **{"context": 8, "stride": 8, **settings}
        )


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(model):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    with pytest.raises(ValueError, match="gives the id 97, the model has 97 tokens"):
        score_corpus(model, tokenizer, lp.Chain(), ["w4 extra"], context=8, stride=8)


# --- continuations ---


def test_continuations_are_scored_alone_and_in_the_order_given(model):
    prompts = [[1, 8, 9], [1], [1, 4, 5, 6, 7]]
    texts = [[10, 11], random_ids(9).tolist(), [12]]
    found = score_continuations(model, CHAINS["context all"], prompts, texts, batch_size=2)
    for prompt, ids, means in zip(prompts, texts, found, strict=True):
        alone = score_tokens(
            model,
            CHAINS["context all"],
            torch.tensor([prompt + ids]),
            prompt_lengths=torch.tensor([len(prompt)]),
        )
        assert means.pop("tokens") == len(ids)
        expected = {name: alone[name][0, len(prompt) :].double().mean().item() for name in means}
        assert means == pytest.approx(expected, abs=1e-5)
        assert {"base_nll", "nll", "js", "kl", "reverse_kl", "tv", "agree"} <= set(means)


def test_a_continuation_without_tokens_and_lists_of_unequal_length(model):
    (found,) = score_continuations(model, lp.Chain(), [[1, 8]], [[]])
    assert found["tokens"] == 0 and math.isnan(found["nll"])
    with pytest.raises(ValueError, match="1 prompts were given for 2 continuations"):
        score_continuations(model, lp.Chain(), [[1]], [[4], [5]])
