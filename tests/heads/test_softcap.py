"""Gemma 2 makes c tanh(z / c) of its head's logits z: heads return z, and are fitted to and judged by what it makes."""

import math

import pytest
import torch
from conftest import tiny_tokenizer
from transformers import AutoModelForCausalLM, Gemma2Config

import logitproc as lp
from logitproc.heads import Calibration, Statistics, evaluate
from logitproc.heads.attachment import softcap_of

CAP = 5.0  # of logits with a standard deviation of about 4: it matters
TEXT = [" ".join(f"w{3 + (i * i + 7 * j * i) % 90}" for j in range(60)) for i in range(40)]
PROMPT = torch.tensor([[5, 6, 7, 5, 6, 7]])


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.4, bos_token_id=1,
        eos_token_id=None, pad_token_id=0, final_logit_softcapping=CAP,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=request.param).eval()


@pytest.fixture(scope="module")
def reading(model):
    return Calibration.collect(model, TEXT, tiny_tokenizer(), context=40)


def test_a_calibration_holds_what_the_model_says(model, reading):
    assert softcap_of(model) == reading.softcap == CAP
    ids = torch.tensor([token for text in TEXT for token in tiny_tokenizer()(text)["input_ids"]])
    said = model(ids[None, :40]).logits[0].float()
    seen = torch.cat([logits for _, _, logits in reading.logits()])
    assert float(seen.abs().max()) <= CAP
    torch.testing.assert_close(seen[:40], said, rtol=0.02, atol=0.02 if model.dtype is torch.bfloat16 else 1e-4)
    head = torch.nn.functional.linear(reading.states, reading.weight)
    assert float(head.float().abs().max()) > 1.5 * CAP


@pytest.mark.parametrize("kind", ["paper", "weighted", "tiebreak", "residual"])
def test_the_price_of_a_head_is_that_of_the_model_with_it(model, reading, kind):
    head = lp.VQHead.fit(model, reading, codes=40, kind=kind)
    _, held = reading.parts
    said = torch.nn.functional.linear(held.states, held.weight)
    loss = lambda logits: torch.nn.functional.cross_entropy(CAP * (logits / CAP).tanh().float(), held.labels)
    expected = math.exp(loss(head(held.states)) - loss(said))
    assert head.about["held_out"]["perplexity_ratio"] == pytest.approx(expected, rel=1e-2)
    assert head.about["held_out"]["kl"] < 0.8


def test_the_bias_gives_every_token_the_mass_that_the_model_gives_it(model, reading):
    head = lp.VQHead.fit(model, reading, codes=40)
    train, _ = reading.parts
    given = reading.seen(head(train.states)).float().softmax(-1).double().mean(0)
    torch.testing.assert_close(given, Statistics.of(train).probability, rtol=0.1, atol=1e-3)
    plain = lp.VQHead.fit(model, reading, codes=40, kind="paper")
    assert evaluate(head, train).kl < evaluate(plain, train).kl


def test_it_generates_converts_and_loads(model, reading, tmp_path):
    head = lp.VQHead.fit(model, reading, codes=40, refine=5)
    with lp.attach(model, head):
        assert float(model(PROMPT).logits.abs().max()) <= CAP
        expected = model.generate(PROMPT, max_new_tokens=8, do_sample=False)
    lp.convert(model, head).save_pretrained(tmp_path / "m")
    loaded = lp.load_converted(tmp_path / "m", dtype=model.dtype)
    assert torch.equal(loaded.generate(PROMPT, max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("kind", ["exact_nested", "exact_int8"])
def test_exact_heads_say_the_same_through_the_cap(model, kind):
    expected = model.generate(PROMPT, max_new_tokens=40, do_sample=False)
    head = lp.ExactHead.of(model, kind)
    assert head.softcap == CAP
    with lp.attach(model, head):
        assert torch.equal(model.generate(PROMPT, max_new_tokens=40, do_sample=False), expected)
    assert head.counters["rows"] >= 40 and not head.counters["uncovered"]


def test_distillation_is_refused_before_a_text_is_read(model, reading):
    texts = iter(TEXT)
    for calibration in (reading, texts):
        with pytest.raises(ValueError, match="soft-caps its logits, and kind 'distilled' is for plain ones"):
            lp.VQHead.fit(model, calibration, codes=40, kind="distilled", tokenizer=tiny_tokenizer())
    assert next(texts) == TEXT[0]
