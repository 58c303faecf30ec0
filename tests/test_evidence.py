"""Evidence follows the text: through beams and new prompts, and never from a text that it did not see."""

import pytest
import torch
from conftest import WIDTH
from test_companion import generate, texts
from test_speculative import BlendLogitsProcessor
from torch import Tensor

import logitproc as lp
from logitproc import evidence, scoring
from logitproc.companion import Companion, tiny_companion
from logitproc.scoring import process_positions, score_tokens


class WatchedLogitsProcessor(BlendLogitsProcessor):
    """Keeps the texts and the evidence that came with them."""

    def __init__(self, other):
        super().__init__(other)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def step(self, tokens, scores, *advice, evidence):
        self.seen.append((tokens.clone(), evidence))
        return super().step(tokens, scores, *advice, evidence=evidence)


class OfThePrompt:
    """Counts the calls of a function, which must be about given tokens: the host's scores are not known there."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, tokens, scores, *companion_scores):
        assert scores is None
        self.calls += 1
        return self.function(tokens, scores, *companion_scores)


def blend() -> lp.Chain:
    return lp.Chain([WatchedLogitsProcessor(tiny_companion(WIDTH))])


@torch.no_grad()
def by_hand(host, chain: lp.Chain, text: Tensor, prompt: int) -> Tensor:
    """What each component gave the tokens of a text, [2]: for the prompt, the companion stands in for the host."""
    companion = chain.companions[0].model
    log_p = [model(text[None]).logits[0].log_softmax(-1) for model in (host, companion)]
    total = torch.zeros(2)
    for t in range(1, len(text)):
        of_host = log_p[1] if t < prompt else log_p[0]
        total += torch.stack([of_host[t - 1, text[t]], log_p[1][t - 1, text[t]]])
    return total


@pytest.mark.parametrize("options", [
    {}, {"do_sample": True, "num_return_sequences": 3}, {"num_beams": 4, "num_return_sequences": 2},
])  # fmt: skip
def test_every_row_has_the_evidence_of_its_text(model, options):
    chain, ids = blend(), texts(2, 5)
    generate(model, chain, ids, max_new_tokens=8, **options)
    seen = chain.processors[0].seen
    assert len(seen) == 8
    for tokens, found in seen:
        for row, total in zip(tokens, found, strict=True):
            torch.testing.assert_close(total, by_hand(model, chain, row, 5), rtol=1e-4, atol=1e-4)


def test_who_does_not_learn_from_what_it_drew_keeps_the_evidence_of_the_prompt(model):
    for options in ({}, {"num_beams": 4, "num_return_sequences": 2}):
        chain, ids = blend(), texts(2, 5)
        chain.processors[0].learns_from_drawn = False
        chain.processors[0].evidence = counted = OfThePrompt(chain.processors[0].evidence)
        generate(model, chain, ids, max_new_tokens=6, **options)
        assert counted.calls == 1, "for the prompt, and no work at any step"
        for tokens, found in chain.processors[0].seen:
            for row, total in zip(tokens, found, strict=True):
                torch.testing.assert_close(total, by_hand(model, chain, row[:5], 5), rtol=1e-4, atol=1e-4)


def test_padding_adds_nothing(model):
    chain, ids = blend(), texts(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    generate(model, chain, ids, attention_mask=mask, max_new_tokens=4)
    for tokens, found in chain.processors[0].seen:
        torch.testing.assert_close(found[0], by_hand(model, chain, tokens[0, 3:], 3), rtol=1e-4, atol=1e-4)


def test_a_companion_reads_the_prompt_once(model):
    chain, ids = blend(), texts(2, 6)
    generate(model, chain, ids, max_new_tokens=4)
    assert chain.companions[0].forwards == 4


def test_a_prompt_that_a_companion_does_not_read_adds_nothing(model):
    ids, own = texts(1, 5), torch.tensor([3, 4])
    chain = lp.Chain([WatchedLogitsProcessor(Companion(tiny_companion(WIDTH).model, prompt=own.tolist()))])
    out = generate(model, chain, ids, max_new_tokens=4)[0]
    new, totals = out[5:], torch.cat([found for _, found in chain.processors[0].seen])
    host = model(out[None]).logits[0].log_softmax(-1)[4:-1]
    said = chain.companions[0].model(torch.cat([own, new])[None]).logits[0].log_softmax(-1)[1:-1]
    each = torch.stack([part.gather(1, new[:, None])[:, 0] for part in (host, said)], 1)
    expected = torch.cat([torch.zeros(1, 2), each.cumsum(0)[:-1]])
    torch.testing.assert_close(totals, expected, rtol=1e-4, atol=1e-4)
    logits = model(out[None, :-1]).logits.detach()
    process_positions(chain, out[None, :-1], logits, prompt_lengths=torch.tensor([5]))
    in_scoring = chain.processors[0].seen[-1][1]
    torch.testing.assert_close(in_scoring[-4:], expected, rtol=1e-4, atol=1e-4)


def test_plain_generate_gathers_too_and_a_new_prompt_starts_anew(model):
    chain = blend()
    for ids in (texts(2, 5), texts(2, 5, 1), texts(2, 9, 2), texts(1, 3, 3), texts(2, 5)):
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
        plain = model.generate(ids, logits_processor=[chain], **options)
        assert torch.equal(plain, lp.generate(model, blend(), input_ids=ids, **options))
    longer = torch.cat([plain, texts(2, 3, 4)], 1)  # a conversation that goes on
    chain(longer, torch.zeros(2, WIDTH))
    assert torch.isfinite(chain.processors[0].seen[-1][1]).all()


def test_the_same_step_again_has_the_same_evidence(model):
    chain, ids = blend(), texts(2, 6)
    scores = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    bound = chain.bind(ids[:, :5])
    first = [bound(ids[:, :5], scores), bound(ids, scores)]
    assert torch.equal(bound(ids, scores), first[1])
    swapped = torch.tensor([1, 0])
    torch.testing.assert_close(bound(ids[swapped], scores[swapped]), first[1][swapped])


def test_what_does_not_follow_is_refused_and_never_guessed(model, draft):
    chain, ids = blend(), texts(1, 9)
    scores = torch.zeros(1, WIDTH)
    with pytest.raises(ValueError, match="does not support assisted decoding"):
        generate(model, chain, assistant_model=draft)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "do_sample": False}
    plain = model.generate(ids, logits_processor=[blend()], **options)
    for help_ in ({"assistant_model": draft}, {"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        try:  # transformers does not ask, so it may go well, and may be refused when a draft is rolled back
            assert torch.equal(model.generate(ids, logits_processor=[blend()], **options, **help_), plain)
        except RuntimeError as error:
            assert "does not follow from the step before" in str(error)
    bound = chain.bind(ids[:, :5])
    for length in (5, 6, 7):
        bound(ids[:, :length], scores)
    for length in (6, 9):  # rolled back, and a token left out
        with pytest.raises(RuntimeError, match="gathers evidence from token to token"):
            bound(ids[:, :length], scores)
    with pytest.raises(RuntimeError, match="of 7 tokens"):
        blend().bind(ids[:, :5])(ids[:, :7], scores)  # tokens that were generated before it was asked


def test_what_does_not_follow_is_noticed_a_step_later_while_lagging(model):
    scores, ids = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0)), texts(2, 8)
    steps = [chain.bind(ids[:, :5]) for chain in (blend(), blend())]
    with steps[1].lagging():
        for length in (5, 6, 7, 7, 8):
            torch.testing.assert_close(steps[1](ids[:, :length], scores), steps[0](ids[:, :length], scores))
    with pytest.raises(RuntimeError, match="gathers evidence|Call reset"), steps[1].lagging():
        steps[1](ids[:, :5], scores)
        steps[1](texts(2, 6, seed=1), scores)


def test_the_bound_of_a_bayes_mixture_holds_in_scoring(model):
    """On any text the loss is at most that of the better component + ln 2; and so in blocks of any size."""
    chain, ids = blend(), texts(3, 40)
    nll = score_tokens(model, chain, ids)["nll"].sum(1)
    hosts = score_tokens(model, lp.Chain(), ids)["nll"].sum(1)
    companions = score_tokens(chain.companions[0].model, lp.Chain(), ids)["nll"].sum(1)
    assert (nll <= torch.minimum(hosts, companions) + torch.tensor(2.0).log() + 1e-6).all()


def test_blocks_of_any_size_give_the_same(model, monkeypatch):
    chain, ids = blend(), texts(2, 23)
    logits = model(ids).logits.detach()
    prompts = torch.tensor([4, 9])
    whole = process_positions(chain, ids, logits, prompt_lengths=prompts)
    for rows in (1, 6, 13, 46):
        found = process_positions(chain, ids, logits, prompt_lengths=prompts, max_rows=rows)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(scoring, "_ASKED_AHEAD", 10 * WIDTH)
    monkeypatch.setattr(evidence, "_ELEMENTS", 10 * WIDTH)
    found = process_positions(chain, ids, logits, prompt_lengths=prompts)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    bound = chain.bind(ids[:1, :4])
    for t in range(3, 23):
        step = bound(ids[:1, : t + 1], logits[:1, t])
        torch.testing.assert_close(step[0], whole[0, t], rtol=1e-4, atol=1e-4)
