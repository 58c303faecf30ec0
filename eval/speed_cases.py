"""What `eval/speed.py` times: the inputs, the cases with their baselines, and the bounds they are held to.

A step is timed on `Inputs`: histories that a real prior and a ledger know, scores that fall off as those of language
models do, several buffers of them in rotation. To time another chain, add a line to `STEPS`; to time anything else
beside anything else, a `Pair` to `PAIRS`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from stopwatch import Call
from torch import Tensor
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

import logitproc as lp
from logitproc import Processor
from logitproc.companion import tiny_companion
from logitproc.methods.vq import example_head
from logitproc.prior import Order

VOCABULARIES, BATCHES = (32_000, 151_936), (1, 8, 64)
POCKET = 8192  # the vocabulary of the bundled models
LENGTH = 256  # tokens of history
GENERATED, SCORED = 64, 512  # tokens a row of a job
_BUFFERED = {"cpu": 1 << 26, "cuda": 1 << 28}  # bytes of scores in rotation: beyond the nearer caches


class Inputs:
    """What a step reads at one size of vocabulary and batch; the i-th call reads the i-th buffer, in rotation.

    The vocabulary is that of the bundled prior `quixote`, its ids spread out; the ledger has counted texts that are
    put together of phrases of that prior, and histories are pieces of those texts, so that look-ups find something.
    """

    def __init__(self, vocabulary: int, batch: int, device: str = "cpu"):
        self.vocabulary, self.batch, self.device = vocabulary, batch, torch.device(device)
        random = torch.Generator().manual_seed(0)
        count = min(64, max(2, _BUFFERED[self.device.type] // (12 * vocabulary * batch)))
        self.buffers = [self._three(random) for _ in range(count)]
        texts = torch.from_numpy(self.texts)
        self.histories = [
            texts[torch.randint(len(texts), (batch,), generator=random), :LENGTH].to(device) for _ in range(count)
        ]

    def _three(self, random: torch.Generator) -> list[Tensor]:
        """Scores of a host, of a small base model and of its expert, [batch, vocabulary] each."""
        noise = lambda: torch.randn(self.batch, self.vocabulary, generator=random)
        ranks = [1 + torch.randperm(self.vocabulary, generator=random) for _ in range(self.batch)]
        host = noise() - 1.1 * torch.stack(ranks).log()
        base = host + noise()
        return [scores.to(self.device) for scores in (host, base, base + 0.5 * noise())]

    def scores(self, i: int, which: int = 0) -> Tensor:
        return self.buffers[i % len(self.buffers)][which]

    def history(self, i: int) -> Tensor:
        return self.histories[i % len(self.histories)]

    @property
    def prior(self) -> lp.NGramPrior:
        return spread_prior(self.vocabulary)

    @property
    def texts(self) -> np.ndarray:
        return phrased_texts(self.vocabulary)

    @property
    def ledger(self) -> lp.TokenLedger:
        return ledger_of_texts(self.vocabulary)

    @functools.cached_property
    def companions(self) -> list[Any]:
        """They stand for models in a processor; what they would say is given."""
        return [tiny_companion(self.vocabulary, seed) for seed in (0, 1)]

    def step(self, processors: Sequence[Processor]) -> Call:
        """One call of a chain, through the interface that decoding uses, companions having spoken."""
        chain = lp.Chain(processors)
        gathered = {
            index: torch.zeros(self.batch, processor.evidence_size, device=self.device)
            for index, processor in enumerate(processors)
            if processor.evidence_size
        }

        heard = {id(processor): len(processor.auxiliaries()) for processor in processors}

        def call(i: int) -> Tensor:
            host, *others = self.buffers[i % len(self.buffers)]
            said = lambda processor, *_: others[: heard[id(processor)]]
            return chain.apply(self.history(i), host, ask=said, evidence=gathered)

        return call


@functools.cache
def spread_prior(vocabulary: int) -> lp.NGramPrior:
    """The bundled prior with its ids spread over a larger vocabulary, order kept."""
    prior = lp.NGramPrior.load("quixote")
    rng = np.random.default_rng(0)
    new = np.sort(rng.choice(vocabulary, prior.vocab_size, replace=False))
    new = np.append(new, vocabulary)  # the start of a document
    orders: list[Order] = []
    for o in prior.orders:
        oldest = new[o.oldest] if orders else o.oldest
        keys = o.parent * (vocabulary + 2) + oldest if orders else o.keys
        orders.append(Order(keys, o.parent, oldest, o.indptr, new[o.ids]))
    about = prior.tokenizer | {"vocab_size": vocabulary, "special": new[prior.tokenizer["special"]].tolist(),
                               "bos": None, "eos": int(new[prior.tokenizer["eos"]])}  # fmt: skip
    return lp.NGramPrior(about, orders, prior.counts, documents=prior.documents, tokens=prior.tokens)


@functools.cache
def phrased_texts(vocabulary: int, texts: int = 500, phrases: int = 5000) -> np.ndarray:
    """Ids [texts, at least LENGTH + 8]: phrases of three two-token contexts of the prior, a few of them common."""
    rng, prior = np.random.default_rng(0), spread_prior(vocabulary)
    oldest, newest = prior.orders[2].oldest, prior.orders[1].oldest[prior.orders[2].parent]
    pick = rng.integers(len(oldest), size=(phrases, 3))
    pool = np.stack([oldest[pick], newest[pick]], -1).reshape(phrases, 6)
    drawn = np.minimum(rng.zipf(1.3, (texts, LENGTH // 6 + 2)), phrases - 1)
    return np.minimum(pool[drawn].reshape(texts, -1), vocabulary - 1)


@functools.cache
def ledger_of_texts(vocabulary: int) -> lp.TokenLedger:
    ledger = lp.TokenLedger(spread_prior(vocabulary).tokenizer, texts=True)
    ledger.update(phrased_texts(vocabulary))
    return ledger


# --- steps ---

Made = Callable[[Inputs], list[Processor]]


def ngram(**options: Any) -> Made:
    return lambda x: [lp.NGramStyleLogitsProcessor(x.prior, **options)]


def suppression(**options: Any) -> Made:
    reference = lambda x: {"reference": x.prior} if options.get("rule", "ratio") == "ratio" else {}
    return lambda x: [lp.SuppressionLogitsProcessor(x.ledger, **options, **reference(x))]


def aligndistil(**options: Any) -> Made:
    return lambda x: [lp.AlignDistilLogitsProcessor(x.companions[0], **options)]


def fusion(**options: Any) -> Made:
    return lambda x: [lp.DynamicFusionLogitsProcessor(x.companions[1], x.companions[0], **options)]


def vq(x: Inputs) -> list[Processor]:
    return [lp.VQLogitsProcessor(example_head(x.vocabulary, "weighted", codes=1024))]


STEPS: dict[str, Made] = {
    "ngram paper": ngram(rule="paper"),
    "ngram lift": ngram(rule="lift"),
    "ngram backoff": ngram(confidence="none", plausibility=0.0, guard=0.0, schedule="constant"),
    "ngram default": ngram(),
    "suppression paper": suppression(rule="paper"),
    "suppression ratio": suppression(),
    "suppression dry": suppression(rule="dry"),
    "aligndistil adaptive": aligndistil(),
    "aligndistil constant": aligndistil(coefficient=1.0),
    "aligndistil masked": aligndistil(plausibility=0.1),
    "aligndistil kl_cap": aligndistil(kl_cap=0.2),
    "fusion newton": fusion(mode="newton"),
    "fusion grid": fusion(mode="grid"),
    "fusion match": fusion(mode="match"),
    "fusion mixture": fusion(),
    "vq": vq,
    "chain of all": lambda x: [p for made in (ngram(), suppression(), aligndistil(), fusion(), vq) for p in made(x)],
}


def tensors_read(processors: Sequence[Processor]) -> int:
    """How many tensors of scores a step reads: the host's for each processor, and those of its companions."""
    return sum(1 + len(processor.auxiliaries()) for processor in processors)


# What every step is held against, beside `log_softmax` of all the scores that it reads.
BASELINES: dict[str, Callable[[Inputs], Call]] = {
    "copy": lambda x: lambda i: x.scores(i).clone(),
    "RepetitionPenalty": lambda x: _processor(x, RepetitionPenaltyLogitsProcessor(1.1)),
    "NoRepeatNGram": lambda x: _processor(x, NoRepeatNGramLogitsProcessor(3)),
}


def log_softmax(x: Inputs, tensors: int) -> Call:
    return lambda i: [x.scores(i + k // 3, k % 3).log_softmax(-1) for k in range(tensors)]


def _processor(x: Inputs, processor: Any) -> Call:
    return lambda i: processor(x.history(i), x.scores(i))


# --- pairs ---


class Pair(NamedTuple):
    """Two calls that do the same, or the one with something added; `tokens` are those of one call."""

    part: str
    what: str
    against: str
    vocabulary: int
    batch: int
    tokens: int
    make: Callable[[str], tuple[Call, Call]]  # for a device: ours, and the other


class NoOp(Processor):
    def step(self, tokens: Tensor, scores: Tensor) -> Tensor:
        return scores


def no_ops(entries: int) -> Callable[[str], tuple[Call, Call]]:
    def make(device: str) -> tuple[Call, Call]:
        x = Inputs(32_000, 1, device)
        chain, entry = lp.Chain([NoOp() for _ in range(5)]), LogitsProcessorList([NoOp() for _ in range(entries)])
        return (lambda i: chain(x.history(i), x.scores(i))), (lambda i: entry(x.history(i), x.scores(i)))

    return make


def rows_at_once(device: str) -> tuple[Call, Call]:
    x = Inputs(151_936, 32, device)
    (processor,) = fusion(mode="newton")(x)

    def part(i: int, rows: slice) -> Tensor:
        host, *others = (scores[rows] for scores in x.buffers[i % len(x.buffers)])
        return processor.apply(x.history(i)[rows], host, companion_scores=others)

    return (
        lambda i: part(i, slice(None)),
        lambda i: [part(i, slice(row, row + 1)) for row in range(x.batch)],
    )


def ledger_update(device: str) -> tuple[Call, Call]:
    new = phrased_texts(151_936)[:, :100].tolist()
    ledger = lp.TokenLedger(spread_prior(151_936).tokenizer)
    items = lambda i: [new[(i * 100 + k) % len(new)] for k in range(100)]
    return (lambda i: ledger.update(items(i), "a", i)), (lambda i: np.concatenate(items(i)))


@functools.cache
def bundled(name: str, device: str) -> tuple[Any, Any]:
    """A bundled model in float32 and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = lp.pocket(name)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval(), (
        AutoTokenizer.from_pretrained(folder)
    )


def generated(model: Any, spec: list[dict[str, Any]], start: Any, tokens: int) -> Callable[[int], Tensor]:
    """Sampling as many tokens a row from the model through a chain; another seed for each call."""
    chain = lp.Chain.from_spec(spec)

    def call(i: int) -> Tensor:
        torch.manual_seed(i)
        return lp.generate(
            model, chain, **start, do_sample=True, top_k=0, min_new_tokens=tokens, max_new_tokens=tokens
        )

    return call


def generation(host: str, spec: list[dict[str, Any]]) -> Callable[[str], tuple[Call, Call]]:
    def make(device: str) -> tuple[Call, Call]:
        model, tokenizer = bundled(host, device)
        start = tokenizer(["The road was long"] * 8, return_tensors="pt").to(device)
        return generated(model, spec, start, GENERATED), generated(model, [], start, GENERATED)

    return make


@functools.cache
def model_texts(device: str) -> Tensor:
    """Ids [4, 8, SCORED + 1] of text that the bundled model wrote: real n-grams, as scored text has them."""
    model, tokenizer = bundled("base", device)
    ids = torch.full((32, 1), tokenizer.bos_token_id, device=device)
    start = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return generated(model, [], start, SCORED)(0).view(4, 8, -1)


def scoring(spec: list[dict[str, Any]]) -> Callable[[str], tuple[Call, Call]]:
    def make(device: str) -> tuple[Call, Call]:
        from logitproc.scoring import score_tokens

        model, ids, chain = bundled("base", device)[0], model_texts(device), lp.Chain.from_spec(spec)
        return (
            lambda i: score_tokens(model, chain, ids[i % 4], divergence=False),
            lambda i: model(input_ids=ids[i % 4, :, :-1], use_cache=False),
        )

    return make


def fitting(device: str) -> tuple[Call, Call]:
    """Counting text of the model, order 3; and tokenizing it."""
    tokenizer = bundled("base", device)[1]
    texts = tokenizer.batch_decode(model_texts(device)[..., 1:].reshape(128, -1))
    return (lambda i: lp.NGramPrior.fit(texts, tokenizer, order=3)), (lambda i: tokenizer(texts))


DEFAULT, LIFT = [{"name": "ngram", "prior": "quixote"}], [{"name": "ngram", "prior": "quixote", "rule": "lift"}]
REVERSE = [{"name": "aligndistil", "reverse": {"model": "mini-reverse-dpo", "dtype": "float32"}}]

PAIRS = (
    Pair("calls", "Chain of 5 no-ops", "list of 1 no-op", 32_000, 1, 1, no_ops(1)),
    Pair("calls", "Chain of 5 no-ops", "list of 5 no-ops", 32_000, 1, 1, no_ops(5)),
    Pair("calls", "fusion newton", "its rows one by one", 151_936, 32, 32, rows_at_once),
    Pair("calls", "ledger update", "np.concatenate", 151_936, 100, 10_000, ledger_update),
    Pair("jobs", "generate with ngram lift", "generate", POCKET, 8, 8 * GENERATED, generation("base", LIFT)),
    Pair("jobs", "generate with ngram default", "generate", POCKET, 8, 8 * GENERATED, generation("base", DEFAULT)),
    Pair("jobs", "generate with aligndistil", "generate", POCKET, 8, 8 * GENERATED, generation("mini-dpo", REVERSE)),
    Pair("jobs", "perplexity through ngram lift", "bare forward", POCKET, 8, 8 * SCORED, scoring(LIFT)),
    Pair("jobs", "perplexity through ngram default", "bare forward", POCKET, 8, 8 * SCORED, scoring(DEFAULT)),
    Pair("jobs", "fit ngram", "tokenizing", POCKET, 128, 32 * SCORED, fitting),
)


# --- bounds ---


class Bound(NamedTuple):
    """The largest ratio that the project allows itself; None stands for all."""

    what: str
    against: str
    ratio: float
    vocabulary: int | None = None
    batch: int | None = None
    device: str | None = None


NO_KERNEL = ("suppression paper", "suppression ratio")  # one subtraction

BOUNDS = (
    *(Bound(name, "log_softmax", 3.0, device="cpu") for name in STEPS),
    # A kernel that is not so much faster than what torch makes of the plain definition is not worth its lines.
    *(Bound(name, "torch.compile", 1 / 1.3) for name in STEPS if name not in NO_KERNEL),
    Bound("ngram paper", "RepetitionPenalty", 3.0, 32_000, 1),
    Bound("ngram lift", "RepetitionPenalty", 3.0, 32_000, 1),
    Bound("ngram paper", "copy", 1.5, 151_936, 8),
    Bound("ngram lift", "copy", 1.5, 151_936, 8),
    Bound("suppression paper", "copy", 1.5, 151_936, 8),
    Bound("suppression ratio", "copy", 1.5, 151_936, 8),
    Bound("suppression dry", "copy", 1.5, 151_936, 8),
    Bound("fusion newton", "log_softmax", 2.0, 151_936, 8),
    Bound("fusion newton", "its rows one by one", 1.0, 151_936, 32),
    Bound("Chain of 5 no-ops", "list of 1 no-op", 1.0, 32_000, 1),
    Bound("generate with aligndistil", "generate", 2.0),
    Bound("perplexity through ngram lift", "bare forward", 1.25),
    Bound("perplexity through ngram default", "bare forward", 1.25),
    *(Bound(name, "1B forward", 0.01, 151_936, 1, "cuda")
      for name in ("ngram default", "suppression ratio", "aligndistil adaptive")),
    *(Bound(name, "1B forward", 0.03, 151_936, 64, "cuda")
      for name in ("ngram default", "suppression ratio", "aligndistil adaptive")),
    *(Bound(name, "1B forward", 0.03, 151_936, device="cuda") for name in ("fusion newton", "fusion mixture")),
    Bound("head weighted K=1024", "dense head", 1 / 20, 128_256, 1, "cuda"),
    Bound("head exact_nested", "dense head", 1 / 3, 128_256, 1, "cuda"),
)  # fmt: skip
