"""Speculative decoding is lossless: the same text if greedy, the same distribution if sampled."""

import importlib.util
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import WIDTH, tiny_model, tiny_tokenizer
from test_companion import FollowLogitsProcessor, make_model, texts
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TextStreamer,
)

import logitproc as lp
from logitproc.companion import Companion, tiny_companion
from logitproc.processor import Processor
from logitproc.speculative import _GREEDY, _SAMPLED, LONGEST, Decoder, Speculation, accept, sureness


@dataclass(eq=False)
class BlendLogitsProcessor(Processor):
    """A mixture of host and companion, weighed by how well each predicted the text so far."""

    other: Companion
    context: ClassVar = None
    companions: ClassVar = ("other",)
    evidence_size: ClassVar = 2
    supports_assisted: ClassVar = False

    def evidence(self, tokens, scores, *advice):
        both = torch.stack([advice[0] if scores is None else scores, *advice], -1).log_softmax(1)
        return both[torch.arange(len(tokens)), tokens]

    def step(self, tokens, scores, *advice, evidence):
        both = torch.stack([scores, *advice], -1).log_softmax(1) + evidence.log_softmax(-1)[:, None]
        return both.logsumexp(-1)


def fused(*more: Processor, seed: int = 0) -> lp.Chain:
    """As proxy tuning: host + expert - base, and whatever else; the expert drafts."""
    expert, base = tiny_companion(WIDTH, seed), tiny_companion(WIDTH, seed + 10)
    return lp.Chain([FollowLogitsProcessor(base, weight=-0.3), FollowLogitsProcessor(expert), *more])


PROMPT = texts(1, 6)


def run(model, chain, ids=PROMPT, **options) -> Tensor:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False} | options
    return lp.generate(model, chain, input_ids=ids, **options)


# --- greedy ---


@pytest.mark.parametrize("tokens", [None, 1, 4, LONGEST])
@pytest.mark.parametrize("kind", ["rope", "gpt2"])
def test_greedy_text_is_that_of_plain_decoding_token_by_token(kind, tokens):
    model = make_model(kind, seed=5).double()
    speculation = Speculation(tokens=tokens)
    for seed in range(3):
        chain = fused(seed=seed)
        assert torch.equal(run(model, chain, speculative=speculation), run(model, chain))
        assert speculation.rounds + speculation.accepted >= 30
        assert speculation.judged <= speculation.drafted


def test_evidence_is_gathered_as_in_plain_decoding(model):
    for seed in range(3):
        chain = lp.Chain([BlendLogitsProcessor(tiny_companion(WIDTH, seed))])
        assert torch.equal(run(model, chain, speculative=True), run(model, chain))


def test_methods_with_a_history_and_processors_of_transformers_keep_their_places(model):
    prior = lp.NGramPrior.from_ids([[5, 6, 7, 5, 6, 8]], 3, vocab_size=WIDTH)
    chain = fused(lp.NGramStyleLogitsProcessor(prior, guard=1.0))

    class Odd(LogitsProcessor):  # depends on the length of the text, after the chain
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, torch.arange(input_ids.shape[1] % 2, WIDTH, 3), -math.inf)

    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "logits_processor": [Odd()]}
    assert torch.equal(run(model, chain, speculative=True, **options), run(model, chain, **options))


def test_a_padded_prompt_and_one_of_a_single_token(model):
    chain = fused()
    padded = torch.nn.functional.pad(PROMPT, (3, 0))
    options = {"attention_mask": (padded != 0).long()}
    found = run(model, chain, padded, speculative=True, **options)[:, 9:]
    assert torch.equal(found, run(model, chain)[:, 6:])
    assert torch.equal(run(model, chain, PROMPT[:, :1], speculative=True), run(model, chain, PROMPT[:, :1]))


def test_it_ends_where_plain_decoding_ends(model):
    chain = fused()
    plain = run(model, chain)
    ending = int(plain[0, 20])
    for options in ({"eos_token_id": ending, "pad_token_id": 0}, {"max_new_tokens": 1}, {"max_new_tokens": 2},
                    {"max_new_tokens": None, "max_length": 11}):  # fmt: skip
        assert torch.equal(run(model, chain, speculative=True, **options), run(model, chain, **options))

    class AtThirteen(StoppingCriteria):
        def __call__(self, input_ids, scores):
            return torch.full((len(input_ids),), input_ids.shape[1] == 13)

    assert run(model, chain, speculative=True, stopping_criteria=[AtThirteen()]).shape == (1, 13)


def test_it_ends_at_a_stop_string_as_plain_decoding_does():
    base, mini = (AutoModelForCausalLM.from_pretrained(lp.pocket(name)) for name in ("base", "mini"))
    tokenizer = AutoTokenizer.from_pretrained(lp.pocket("base"))
    chain = lp.Chain([FollowLogitsProcessor(Companion(mini))])
    ids = torch.tensor([tokenizer("The road was long and")["input_ids"]])
    ending = tokenizer.decode(run(base, chain, ids)[0])[-40:-35]
    stopped = run(base, chain, ids, stop_strings=[ending], tokenizer=tokenizer)
    assert stopped.shape[1] < ids.shape[1] + 30
    criteria = [StopStringCriteria(tokenizer, [ending])]
    assert torch.equal(run(base, chain, ids, speculative=True, stopping_criteria=criteria), stopped)


def test_a_host_goes_on_beyond_its_context_as_in_plain_decoding():
    host, chain = make_model(context=16), fused()
    assert torch.equal(run(host, chain, speculative=True), run(host, chain))


def test_a_streamer_sees_every_token(model, capsys):
    tokenizer = tiny_tokenizer()
    out = run(model, fused(), speculative=True, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.split() == tokenizer.decode(out[0]).split()


def test_a_draft_that_stands_outside_of_the_chain(model):
    speculation = Speculation(draft=tiny_companion(WIDTH, 3))
    chain = fused()
    assert torch.equal(run(model, chain, speculative=speculation), run(model, chain))
    nothing = lp.Chain()
    assert torch.equal(run(model, nothing, speculative=speculation), run(model, nothing))
    with pytest.raises(ValueError, match="give it a draft model"):
        run(model, nothing, speculative=True)
    other = Speculation(draft=Companion(make_model(), tiny_tokenizer(eos_token="w5")))
    with pytest.raises(ValueError, match="another tokenizer: eos_token_id"):
        run(model, nothing, speculative=other, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="reads 16 tokens"):
        run(model, nothing, speculative=Speculation(draft=Companion(make_model(context=16))))


# --- how much is drafted ---


def test_a_perfect_draft_is_accepted_whole_and_grows(model):
    host = tiny_model()
    speculation = Speculation(draft=Companion(tiny_model()))
    run(host, lp.Chain(), speculative=speculation, max_new_tokens=120)
    assert speculation.acceptance == 1
    assert speculation.rounds < 40, "from 1 token to many"


def test_a_useless_draft_ends(model):
    speculation = Speculation(draft=Companion(make_model(seed=9)))
    chain = lp.Chain([FollowLogitsProcessor(tiny_companion(WIDTH), weight=5.0)])
    run(model, chain, speculative=speculation, max_new_tokens=100)
    assert speculation.acceptance < 0.2
    assert speculation.drafted < 0.5 * speculation.rounds


@pytest.mark.parametrize("sampled", [False, True])
def test_a_drafter_is_trusted_by_how_sure_it_is(sampled):
    first = _SAMPLED if sampled else _GREEDY
    assert sureness(torch.tensor([[0.2, 0.2], [0.25, 0.1], [0.6, 0.4], [0.75, 0.25], [1.0, 0.0]])) == [
        0,
        1,
        2,
        3,
        3,
    ]
    decoder = Decoder(lp.Chain().bind(PROMPT), Speculation(draft=tiny_companion(WIDTH)))
    decoder._expect(sampled)
    unsure, sure = torch.tensor([[0.1, 0.1]]), torch.tensor([[0.9, 0.1]])
    for _ in range(60):  # this one is right when it is unsure, and wrong when it is sure
        decoder._learn(torch.cat([unsure, sure]), kept=1)
    chances = [accepted / judged for accepted, judged in decoder.tallies]
    assert chances[0] > 0.8 and chances[3] < 0.25
    assert chances[1:3] == pytest.approx(first[1:3]), "nothing was learned of these"
    for _ in range(100):
        decoder._learn(torch.empty(0, 2), kept=0)
    chances = [accepted / judged for accepted, judged in decoder.tallies]
    assert chances == pytest.approx(first, abs=0.03), "and what was learned fades"


def test_a_round_costs_one_pass_of_those_that_verify_and_one_more_than_the_draft_of_the_drafter(model):
    chain = fused()
    base, expert = chain.companions
    speculation = Speculation(tokens=4)
    run(model, chain, speculative=speculation)
    assert base.forwards == speculation.rounds
    assert expert.forwards == speculation.drafted + speculation.rounds


# --- sampled ---


def test_a_step_by_hand():
    # p = (.5, .5, 0), q = (1, 0, 0): token 0 stands half of the time, else token 1 follows.
    scores = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]).log()
    q = torch.tensor([[1.0, 0.0, 0.0]])
    torch.manual_seed(0)
    outcomes = [accept(torch.tensor([0]), q, scores, True) for _ in range(2000)]
    assert {(kept, int(token)) for kept, token in outcomes} == {(1, 2), (0, 1)}
    assert 0.45 < sum(kept for kept, _ in outcomes) / 2000 < 0.55
    greedy = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    for drafted, expected in (([1, 0], (2, 1)), ([1, 1], (1, 0)), ([0, 0], (0, 1))):
        kept, token = accept(torch.tensor(drafted), torch.empty(2, 2), greedy, False)
        assert (kept, int(token)) == expected


SMALL = 4


@torch.no_grad()
def exact(host, chain, prompt: Tensor, length: int, temperature: float) -> Tensor:
    """The probability of every text of this length, by step by step decoding."""
    probabilities = []
    for text in itertools.product(range(SMALL), repeat=length):
        bound, p, ids = chain.bind(prompt), 1.0, prompt
        for token in text:
            scores = bound(ids, host(ids).logits[:, -1])
            p *= float((scores / temperature).softmax(-1)[0, token])
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        probabilities.append(p)
    return torch.tensor(probabilities)


@pytest.mark.parametrize("method", ["fused", "blend", "newton", "mixture"])
def test_sampled_text_has_the_distribution_of_plain_decoding(method):
    """Chi-square over all texts of 3 tokens; drafts of 2, so that all outcomes of a round occur."""
    options = {"width": SMALL, "context": 16, "pad_token_id": None, "bos_token_id": None, "layers": 1}
    host, expert, base = (make_model(seed=seed, **options) for seed in (1, 2, 3))
    for made in (host, expert, base):
        made.lm_head.weight.data *= 0.5  # flat enough for every text to be seen
    expert, base = Companion(expert), Companion(base)
    if method == "fused":
        chain = lp.Chain([FollowLogitsProcessor(base, weight=-1.0), FollowLogitsProcessor(expert)])
    elif method == "blend":
        chain = lp.Chain([BlendLogitsProcessor(expert)])
    else:
        chain = lp.Chain([lp.DynamicFusionLogitsProcessor(expert, base, mode=method)])
    prompt, n, length, temperature = torch.tensor([[1, 2]]), 700, 3, 0.8
    expected = n * exact(host, chain, prompt, length, temperature)
    torch.testing.assert_close(expected.sum(), torch.tensor(float(n)), rtol=1e-4, atol=0)

    torch.manual_seed(0)
    seen, kept, drafted = torch.zeros(SMALL**length), 0, 0
    config = GenerationConfig(do_sample=True, max_length=2 + length)
    ends = StoppingCriteriaList([MaxLengthCriteria(2 + length)])
    for _ in range(n):
        bound, speculation = chain.bind(prompt), Speculation(tokens=2)
        processors = LogitsProcessorList([bound, TemperatureLogitsWarper(temperature)])
        with torch.no_grad():
            out = Decoder(bound, speculation)(host, prompt, processors, ends, config)[0, 2:]
        seen[int((out * torch.tensor([SMALL**2, SMALL, 1])).sum())] += 1
        kept, drafted = kept + speculation.accepted, drafted + speculation.judged
    assert 0.2 < kept / drafted < 0.95, "neither all nor nothing is accepted"
    rare = expected < 5  # pooled, as the approximation asks
    cells = [(seen[~rare], expected[~rare]), (seen[rare].sum()[None], expected[rare].sum()[None])]
    statistic = sum(float(((s - e).square() / e.clamp(min=1e-9)).sum()) for s, e in cells)
    freedom = int((~rare).sum())
    assert statistic < freedom + 4 * math.sqrt(2 * freedom), f"chi-square {statistic:.1f} on {freedom}"


def test_sampling_repeats_for_a_seed(model):
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(run(model, fused(), speculative=True, do_sample=True, top_p=0.9, top_k=0))
    assert torch.equal(*runs)


# --- refused before the first token ---


def test_what_speculation_cannot_do_is_refused(model, draft):
    chain, two = fused(), texts(2, 5)
    for options, words in (
        ({"num_beams": 3}, "without beams, got 1 sequences of 3 beams"),
        ({"input_ids": two, "attention_mask": torch.ones_like(two)}, "one sequence without beams, got 2"),
        ({"do_sample": True, "num_return_sequences": 2}, "got 2 sequences"),
        ({"assistant_model": draft}, "exclude each other"),
        ({"return_dict_in_generate": True}, "does not support return_dict_in_generate"),
        ({"stop_strings": ["w5"]}, "does not support stop_strings; pass transformers' stopping_criteria="),
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor would remember"),
    ):
        given = {
            "input_ids": PROMPT,
            "attention_mask": torch.ones_like(PROMPT),
            "max_new_tokens": 4,
        } | options
        with pytest.raises(ValueError, match=words):
            lp.generate(model, chain, speculative=True, **given)
    with pytest.raises(ValueError, match="nothing but tokens and does not support token_type_ids"):
        run(make_model("gpt2"), chain, speculative=True, token_type_ids=PROMPT)
    with pytest.raises(ValueError, match="from 1 to 16 tokens, got 0"):
        Speculation(tokens=0)
    own = lp.Chain([FollowLogitsProcessor(Companion(make_model(), prompt=[1]))])
    with pytest.raises(ValueError, match="must read the host's prompt"):
        run(model, own, speculative=True)
    short = lp.Chain([FollowLogitsProcessor(Companion(make_model(context=16), overflow="off"))])
    with pytest.raises(ValueError, match="reads 16 tokens"):
        run(model, short, speculative=True)
    assert run(model, short, speculative=True, max_new_tokens=10).shape == (1, 16)


def test_a_companion_that_verifies_may_have_a_prompt_of_its_own(model):
    expert = tiny_companion(WIDTH)
    base = Companion(make_model(), prompt=[1, 5])
    chain = lp.Chain([FollowLogitsProcessor(base, weight=-0.3), FollowLogitsProcessor(expert)])
    assert torch.equal(
        run(model, chain, speculative=True, max_new_tokens=10), run(model, chain, max_new_tokens=10)
    )


def test_a_decoder_stands_in_for_the_loop_of_model_generate(model):
    chain = fused()
    bound = chain.bind(PROMPT)
    out = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), logits_processor=[bound], do_sample=False,
        max_new_tokens=9, custom_generate=Decoder(bound, Speculation()),
    )  # fmt: skip
    assert torch.equal(out, run(model, chain, max_new_tokens=9))


# --- the study ---


def study():
    path = Path(lp.__file__).parent.parent / "eval" / "speculative.py"
    spec = importlib.util.spec_from_file_location("speculation_study", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_costlier_host_has_the_very_distribution_of_the_model():
    made = make_model()
    deeper = study().costlier(made, 9)
    assert len(deeper.model.layers) == 9 and len(made.model.layers) == 3
    ids = texts(2, 7)
    assert torch.equal(deeper(ids).logits, made(ids).logits)
    assert torch.equal(deeper.generate(ids, max_new_tokens=5), made.generate(ids, max_new_tokens=5))


def test_the_verdict_asks_for_what_the_rules_say():
    row = {"host_ms": 8.0, "small_ms": 4.0, "mode": "newton"}  # each of the two costs a quarter of the host
    rows = [{**row, "draft": "plain", "speed": 1 / 1.5}, {**row, "draft": "adapts", "speed": 1.1}]
    assert study().verdicts(rows, "newton") == (
        "   newton: plain costs 1.50 of alone, allowed 1.58; speculative x1.10 at host/small 4.0 holds"
    )
    rows[0]["speed"], rows[1]["speed"] = 1 / 1.6, 0.9
    assert (
        study().verdicts(rows, "newton").count("MISSED")
        == study().verdicts(rows, "newton").count("FAILS")
        == 1
    )
