"""The bundled models: they load offline, fit together, and read as English."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import logitproc as lp
from logitproc.bundled import bundled
from logitproc.scoring import score_corpus

# Written for this test, so in nobody's training text.
PLAIN = "The children ran down to the river, and their mother called after them from the door of the house."
MODELS = ("base", "mini", "mini-dpo", "mini-reverse-dpo")  # and mini-expert, which writes headlines only


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    folder = lp.pocket(request.param)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(
        folder
    )


def test_a_model_finds_english_likelier_than_its_words_in_disorder(pair):
    model, tokenizer = pair
    score = lambda text: score_corpus(model, tokenizer, lp.Chain(), [text], context=128, stride=64)
    shuffled = " ".join(sorted(PLAIN.split()))
    assert score(PLAIN).mean["base_nll"] < score(shuffled).mean["base_nll"] - 0.5
    assert score(PLAIN).perplexity() < 400  # 8192 would be a guess


def test_the_tokenizer_restores_any_text(pair):
    _, tokenizer = pair
    for text in (PLAIN, "naïve café — “quoted”\nnext line", "1234 + 5 = 1239", "日本語 and emoji 🙂"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_the_priors_belong_to_the_models(pair):
    model, tokenizer = pair
    for name in ("quixote", "quixote-held-out"):
        prior = lp.NGramPrior.load(name)
        prior.check_tokenizer(tokenizer)
        assert prior.vocab_size == model.config.vocab_size


def test_the_quixote_prior_knows_its_hero():
    tokenizer = AutoTokenizer.from_pretrained(lp.pocket("base"))
    don, quixote = (tokenizer(w, add_special_tokens=False)["input_ids"] for w in ("Don", "Don Quixote"))
    for name in ("quixote", "quixote-held-out"):
        prior = lp.NGramPrior.load(name)
        assert prior.log_prob(quixote[len(don) :], don).mean() > -1.0


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(LookupError, match="Did you mean 'base'"):
        lp.pocket("bas")


def test_the_expert_finds_a_headline_likelier():
    tokenizer = AutoTokenizer.from_pretrained(lp.pocket("mini-expert"))
    headline = "football star wife arrested police new york home photos"  # as the addresses have them

    def nll(name: str) -> float:
        model = AutoModelForCausalLM.from_pretrained(lp.pocket(name), dtype=torch.float32)
        report = score_corpus(model, tokenizer, lp.Chain(), [headline], context=128, stride=64, divergence=False)
        return report.mean["nll"]

    assert nll("mini-expert") < nll("mini") - 0.5


def test_the_preference_pair_disagrees_about_short_words():
    tokenizer = AutoTokenizer.from_pretrained(lp.pocket("mini"))
    prompt, long, short = "The men went to the", " extraordinary accommodation.", " end of the road and sat by the sea."

    def log_ratio(name: str) -> float:
        """ln p(short) - ln p(long) after the prompt, against `mini`."""
        values = []
        for model in (name, "mini"):
            loaded = AutoModelForCausalLM.from_pretrained(lp.pocket(model), dtype=torch.float32)
            for text in (short, long):
                ids = tokenizer(prompt + text, return_tensors="pt")["input_ids"]
                start = len(tokenizer(prompt)["input_ids"])
                log_p = loaded(ids).logits.detach()[0].log_softmax(-1)[start - 1 : -1]
                values.append(log_p.gather(1, ids[0, start:, None]).sum().item())
        return values[0] - values[1] - (values[2] - values[3])

    assert log_ratio("mini-dpo") > 1 and log_ratio("mini-reverse-dpo") < -1


def test_the_family_is_small():
    size = sum(f.stat().st_size for f in Path(bundled()["base"]).parent.rglob("*") if f.is_file())
    assert size <= 32 * 2**20
