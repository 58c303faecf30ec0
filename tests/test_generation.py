"""`generate` is `model.generate` with a chain that knows its prompt, and refuses what it cannot do."""

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from conftest import WIDTH, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

import logitproc as lp
from logitproc import generation
from logitproc.artifact import describe_tokenizer
from logitproc.generation import seed_everything

PADDED = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 3]])
MASK = (PADDED != 0).long()
NEW = 4


@dataclass(eq=False)
class RecordLogitsProcessor(lp.Processor):
    """Favours the neighbour of the last token, and keeps what it was given."""

    strength: float = 4.0
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    context: ClassVar = None

    def step(self, tokens, scores, *, generated):
        self.seen.append((tokens, generated))
        if tokens.shape[1] == 0:
            return scores
        favoured = (tokens[:, -1:] + 1) % scores.shape[1]
        return scores.scatter_add(1, favoured, torch.full_like(favoured, self.strength, dtype=scores.dtype))


@pytest.fixture
def toy() -> RecordLogitsProcessor:
    return RecordLogitsProcessor()


def run(model, processor, **options):
    given = {"input_ids": PADDED, "attention_mask": MASK, "max_new_tokens": NEW, "do_sample": False}
    return lp.generate(model, lp.Chain([processor]), **given | options)


# --- what a processor is told ---


def test_padding_is_hidden_and_the_prompt_is_told_from_what_was_generated(model, toy):
    out = run(model, toy)
    assert len(toy.seen) == NEW
    for step, (tokens, generated) in enumerate(toy.seen):
        expected = out[:, : PADDED.shape[1] + step].clone()
        expected[0, :2] = -1
        assert torch.equal(tokens, expected)
        assert generated.tolist() == [step, step]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_rows_of_one_prompt_lie_side_by_side_and_keep_their_padding(model, toy, options):
    run(model, toy, **options)
    for step, (tokens, generated) in enumerate(toy.seen):
        assert (tokens == -1).sum(1).tolist() == [2, 2, 2, 0, 0, 0]
        assert (tokens[:3, 2:4] == PADDED[0, 2:]).all() and (tokens[3:, :4] == PADDED[1]).all()
        assert generated.tolist() == [step] * 6


def test_without_a_mask_the_pad_token_is_padding_unless_it_also_ends_texts(model, toy):
    run(model, toy, attention_mask=None)
    assert (toy.seen[0][0] == -1).sum(1).tolist() == [2, 0]
    for eos in (0, [50, 0]):
        toy.seen.clear()
        run(model, toy, attention_mask=None, eos_token_id=eos)
        assert (toy.seen[0][0] == -1).sum() == 0


def test_an_unbound_chain_counts_all_tokens_as_generated(model, toy):
    options = {"attention_mask": MASK, "max_new_tokens": 2, "do_sample": False}
    model.generate(PADDED, logits_processor=[lp.Chain([toy])], **options)
    assert [generated.tolist() for _, generated in toy.seen] == [[4, 4], [5, 5]]
    assert (toy.seen[0][0] == PADDED).all(), "and sees the padding, which transformers does not tell it"


def test_embeddings_leave_only_generated_tokens_in_the_history(model, toy):
    embeds = model.get_input_embeddings()(PADDED).detach()
    run(model, toy, input_ids=None, inputs_embeds=embeds)
    assert [tokens.shape[1] for tokens, _ in toy.seen] == list(range(NEW))
    assert [generated.tolist() for _, generated in toy.seen] == [[step] * 2 for step in range(NEW)]


def test_assisted_decoding_reports_the_length_of_every_candidate(model, draft, toy):
    ids = PADDED[1:]
    run(model, toy, input_ids=ids, attention_mask=torch.ones_like(ids), assistant_model=draft)
    for tokens, generated in toy.seen:
        assert generated.tolist() == [tokens.shape[1] - ids.shape[1]]


# --- what transformers is told ---


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5}, {"num_beams": 3}])
def test_it_equals_plain_generate_with_the_chain_in_the_list(model, toy, options):
    # One prompt without padding, so that binding the chain makes no difference to this processor.
    plain = {"attention_mask": torch.ones(1, 4, dtype=torch.int64), "max_new_tokens": NEW} | options
    if "num_beams" in options:
        plain["renormalize_logits"] = True
    seed_everything(5)
    expected = model.generate(PADDED[1:], logits_processor=[lp.Chain([toy])], **plain)
    seed_everything(5)
    found = lp.generate(model, lp.Chain([toy]), input_ids=PADDED[1:], **plain)
    assert torch.equal(found, expected)
    seed_everything(5)
    assert torch.equal(lp.generate(model, lp.Chain([toy]), inputs=PADDED[1:], **plain), expected)


def test_beam_scores_are_normalised_after_the_chain(model, toy):
    options = {"num_beams": 3, "output_scores": True, "return_dict_in_generate": True}
    config = GenerationConfig(num_beams=3, max_new_tokens=NEW, do_sample=False, output_scores=True,
                              return_dict_in_generate=True)  # fmt: skip
    by_keywords = run(model, toy, **options)
    by_config = lp.generate(
        model, lp.Chain([toy]), input_ids=PADDED, attention_mask=MASK, generation_config=config
    )
    assert torch.equal(by_keywords.sequences, by_config.sequences)
    for scores in (*by_keywords.scores, *by_config.scores):
        torch.testing.assert_close(scores.exp().sum(-1), torch.ones(len(scores)))
    assert not config.renormalize_logits, "the caller's object is left alone"


def test_other_processors_run_after_the_chain(model, toy):
    class Only50(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([50]), 0.0)

    assert (run(model, toy, logits_processor=[Only50()])[:, 4:] == 50).all()


# --- companions beside the host ---


def passes(monkeypatch, log: list[str], **models) -> None:
    """Have models, by name, note each of their passes in the log."""
    for name, each in models.items():
        forward = each.forward
        noted = functools.wraps(forward)(lambda *a, name=name, f=forward, **k: log.append(name) or f(*a, **k))
        monkeypatch.setattr(each, "forward", noted)


@pytest.mark.filterwarnings("ignore:An expert and the small base:UserWarning")
@pytest.mark.parametrize("options", [
    {"do_sample": False}, {"do_sample": True, "num_return_sequences": 2}, {"eos_token_id": [*range(3, 60)]},
])  # fmt: skip
def test_companions_that_start_before_the_host_change_nothing(options, monkeypatch):
    host, expert, base = (tiny_model(seed) for seed in range(3))
    log: list[str] = []
    passes(monkeypatch, log, host=host, base=base, expert=expert)
    monkeypatch.setattr(generation, "_runs_behind", lambda model: True)
    given = {"input_ids": PADDED, "attention_mask": MASK, "max_new_tokens": 6, **options}

    def run() -> Any:
        seed_everything(3)
        fusion = lp.get("fusion")(lp.Companion(expert), lp.Companion(base, prompt=[7, 8]))
        log.clear()
        return lp.generate(host, lp.Chain([fusion]), output_scores=True, return_dict_in_generate=True, **given)

    found = run()
    steps = len(found.scores)
    assert log == ["host", "base", "expert"] + ["base", "expert", "host"] * (steps - 1)
    monkeypatch.setattr(lp.Companion, "start", lambda companion, newest: None)
    expected = run()
    assert log == ["host", "base", "expert"] * steps
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(*scores) for scores in zip(found.scores, expected.scores, strict=True))


class HookedLogitsProcessor(LogitsProcessor):
    """Notes whether something waits for the passes of a model."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, input_ids, scores):
        self.seen.append(bool(self.model._forward_pre_hooks))
        if len(self.seen) == 3:
            raise InterruptedError
        return scores


@pytest.mark.parametrize(("options", "hooked"), [
    ({}, True), ({"do_sample": True}, True), ({"num_beams": 2}, False), ({"prompt_lookup_num_tokens": 2}, False),
    ({"speculative": True}, False),
])  # fmt: skip
def test_companions_start_early_where_a_step_continues_the_one_before(options, hooked, monkeypatch):
    host = tiny_model()
    monkeypatch.setattr(generation, "_runs_behind", lambda model: True)
    given = {"input_ids": PADDED[1:], "attention_mask": MASK[1:], "max_new_tokens": 6, **options}
    watch = HookedLogitsProcessor(host)
    chain = lp.Chain([lp.get("fusion").example(WIDTH)])
    with pytest.raises(InterruptedError):
        lp.generate(host, chain, logits_processor=[watch], **given)
    assert watch.seen == [hooked] * 3
    assert not host._forward_pre_hooks, "nor after an error"
    lp.generate(host, chain, **given)
    assert not host._forward_pre_hooks


def test_a_host_that_is_its_own_companion_starts_nothing(monkeypatch):
    host, draft = tiny_model(), lp.Companion(tiny_model(1))
    started: list[Tensor] = []
    monkeypatch.setattr(lp.Companion, "start", lambda companion, newest: started.append(newest))
    monkeypatch.setattr(generation, "_runs_behind", lambda model: True)
    chain = lp.Chain([lp.get("fusion")(draft, lp.Companion(host), mode="newton")])
    out = lp.generate(host, chain, input_ids=PADDED, attention_mask=MASK, max_new_tokens=6, do_sample=False)
    assert not started
    monkeypatch.undo()
    assert torch.equal(out, lp.generate(host, chain, input_ids=PADDED, attention_mask=MASK, max_new_tokens=6,
                                        do_sample=False))  # fmt: skip


@pytest.mark.gpu
def test_companions_beside_the_host_on_cuda_change_nothing(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    host, expert, base = (tiny_model(seed).cuda() for seed in range(3))
    given = {"input_ids": PADDED.cuda(), "attention_mask": MASK.cuda(), "max_new_tokens": 40, "do_sample": False,
             "output_scores": True, "return_dict_in_generate": True}  # fmt: skip
    run = lambda: lp.generate(host, lp.Chain([lp.get("fusion")(lp.Companion(expert), lp.Companion(base))]), **given)
    found = [run() for _ in range(5)]
    monkeypatch.setattr(lp.Companion, "start", lambda companion, newest: None)
    expected = run()
    for one in found:
        assert torch.equal(one.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(one.scores), torch.stack(expected.scores))


# --- refused before the first token ---


def test_beams_are_refused_wherever_they_are_asked_for(toy):
    toy.supports_beam = False
    model = tiny_model()
    with pytest.raises(ValueError, match="'RecordLogitsProcessor' does not support beam search"):
        run(model, toy, num_beams=2)
    with pytest.raises(ValueError, match="does not support beam search"):
        run(model, toy, generation_config=GenerationConfig(num_beams=2))
    model.generation_config.num_beams = 2
    for config in (None, GenerationConfig(max_new_tokens=2)):  # which the model's own one completes
        with pytest.raises(ValueError, match="does not support beam search"):
            run(model, toy, generation_config=config)
    run(model, toy, num_beams=1)
    assert len(toy.seen) == NEW


def test_every_kind_of_assisted_decoding_is_refused(model, draft, toy):
    toy.supports_assisted = False
    kinds = ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 2}, {"assistant_early_exit": 1},
             {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)})  # fmt: skip
    for kind in kinds:
        with pytest.raises(ValueError, match="does not support assisted decoding"):
            run(model, toy, **kind)


def test_continuous_batching_is_refused_because_it_would_skip_the_chain(model, toy):
    with pytest.raises(ValueError, match="Continuous batching runs no logits processors"):
        run(model, toy, cache_implementation="paged")


def test_a_fitted_part_of_another_width_or_tokenizer_is_refused(model, tokenizer):
    fitted = lp.NGramStyleLogitsProcessor(lp.NGramPrior.from_ids([[5, 6, 7]], 2, vocab_size=WIDTH))
    run(model, fitted)
    with pytest.raises(ValueError, match=f"a vocabulary of {WIDTH} tokens; this model scores 50"):
        run(tiny_model(width=50), fitted)
    fitted.prior.tokenizer |= {"fingerprint": describe_tokenizer(tokenizer)["fingerprint"]}
    run(model, fitted, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="was fitted for the tokenizer"):
        run(model, fitted, tokenizer=tiny_tokenizer(bos_token="w5"))
