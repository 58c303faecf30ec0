"""Suppression: lower the scores of what was generated too often, so that a data set becomes diverse.

Chung, Kamar, Amershi, "Increasing Diversity While Maintaining Accuracy: Text Data Generation with Large Language
Models and Human Interventions", ACL 2023, arXiv:2306.04140, sections 3.2.2 and 4.1.2; that is `rule="paper"`. It
drives every frequent token, "the" and "." included, to a share of .2 to .5 % of the text. The others ask what is
normal.

    z' = z - penalty        c_t of N generated tokens, penalty of token t in nats:
    paper   min(cap, strength 100 c_t / N)            the `top` commonest tokens, 0 for all others
    ratio   min(cap, strength max(0, ln over_t))      over_t = (c_t / ref_t + A) / (N + A), ref: shares of real text
    dry     min(cap, strength base^(L - length))      L: longest suffix of this text that earlier items continue with
                                                      t; 0 where L < length (text-generation-webui, pull request 5677,
                                                      there within one text)

Differs from the paper: everything but `paper` with its defaults. The paper's N is unspecified; here it is all
generated tokens, and of equally common tokens the lower id is suppressed first.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from ..checks import in_range, one_of
from ..ledger import TokenLedger
from ..ops.dispatch import op
from ..prior import NGramPrior
from ..processor import Processor
from ..registry import register

Rule = Literal["paper", "ratio", "dry"]
Scope = Literal["global", "label", "common"]
# What a parameter left out (None) becomes. `ratio`: chosen by `eval/suppression_study.py`, see eval/RESULTS.md.
DEFAULTS: dict[str, dict[str, Any]] = {
    "paper": {"strength": 7.5, "cap": 7.5, "scope": "global"},
    "ratio": {"strength": 4.0, "cap": 7.5, "scope": "common"},
    "dry": {"strength": 0.8, "cap": 10.0, "scope": "global"},
}
BY_RULE: Any = None


# --- math ---


def share_penalty(counts: np.ndarray, strength: float, top: int | None) -> np.ndarray:
    """strength * 100 c_t / N for the `top` largest counts [V], 0 for all others; section 4.1.2.

    Ties at the last rank go to the lower id; None penalises every token that was generated.
    """
    penalty = strength * 100 * counts / counts.sum()
    if top is not None:
        penalty[np.argsort(-counts, kind="stable")[top:]] = 0.0
    return penalty


def overuse_penalty(
    counts: np.ndarray, reference: np.ndarray, strength: float, shrinkage: float
) -> np.ndarray:
    """strength * max(0, ln((c_t / ref_t + A) / (N + A))): counts [V], reference [V] > 0 summing to 1.

    A = `shrinkage` stands for so many tokens generated as the reference has them: without evidence the
    penalty is 0. A token at or below its share of the reference is left alone.
    """
    over = (counts / reference + shrinkage) / (counts.sum() + shrinkage)
    return strength * np.log(np.maximum(over, 1.0))


def reference_shares(prior: NGramPrior) -> np.ndarray:
    """Share of each token in the text that `prior` counted, add-one over all but special tokens: [V].

    Special tokens, which no ledger counts as text, get the share of a token never seen.
    """
    if prior.counts is None:
        raise ValueError("The reference was imported from ARPA and holds no counts; fit the text itself.")
    counts = np.zeros(prior.vocab_size)
    counts[prior.orders[0].ids] = prior.counts[0]
    counts[prior.tokenizer["special"]] = 0
    return (counts + 1) / (counts.sum() + len(counts))


FUNCTION_WORDS = frozenset(
    "a about after all also an and any are as at be because been but by can could did do does for from had has have "
    "he her his how i if in into is it its just like me more most my no not of on one only or other our out over "
    "own she so some such than that the their them then there these they this those to too under up very was we "
    "were what when which while who will with would you your".split()
)


def exempt_ids(
    tokenizer: Any, *, punctuation: bool = False, digits: bool = False, function_words: bool = False,
    words: Sequence[str] = (),
) -> tuple[int, ...]:  # fmt: skip
    """Ids to exempt: punctuation, digits, English function words, and the first token of each of `words`.

    A token is a function word when it is all of one, in any case, and carries the mark of a beginning word.
    """
    chosen = {ids[0] for word in words for text in (word, f" {word}")
              if (ids := tokenizer(text, add_special_tokens=False)["input_ids"])}  # fmt: skip
    special = set(tokenizer.all_special_ids)
    for token, token_id in tokenizer.get_vocab().items():
        text = tokenizer.convert_tokens_to_string([token]).strip()
        begins = token[0] in "\u2581\u0120"
        if token_id not in special and text and (
            (punctuation and not any(c.isalnum() for c in text))
            or (digits and text.isdigit())
            or (function_words and begins and text.lower() in FUNCTION_WORDS)
        ):  # fmt: skip
            chosen.add(token_id)
    return tuple(sorted(chosen))


class PhraseIndex:
    """What followed the last `length` to `longest` tokens in at least `min_items` different texts.

    Symbols are the ids 0..V-1, V for the start of a text and V + 1 for "no token". A context is found by a
    64-bit hash, a polynomial in random values of its symbols: about one look-up in 2^64 / contexts is wrong.
    With `anchor` the start of a text is a symbol of a context like any other. No context holds a breaker, and
    no token of `silent` follows one.
    """

    FACTOR = 0x9E3779B97F4A7C15

    def __init__(
        self, texts: Sequence[np.ndarray], vocab_size: int, length: int, longest: int, min_items: int,
        anchor: bool, breakers: Sequence[int], silent: Sequence[int],
    ):  # fmt: skip
        self.start, self.length, self.longest, self.anchor = vocab_size, length, longest, anchor
        random = np.random.default_rng(0).integers(0, 2**64, vocab_size + 2, dtype=np.uint64)
        powers = np.array([pow(self.FACTOR, n, 2**64) for n in range(longest + 1)], np.uint64)
        breaks = np.isin(np.arange(vocab_size + 2), breakers)
        self.random, self.powers, self.breaks = map(
            torch.from_numpy, (random.view(np.int64), powers.view(np.int64), breaks)
        )
        if any(len(text) and not 0 <= text.min() <= text.max() < vocab_size for text in texts):
            raise ValueError(f"The texts hold ids outside their vocabulary of {vocab_size} tokens.")
        symbols, item, reach = _line_up(texts, vocab_size if anchor else None, breaks)
        at = np.flatnonzero(~np.isin(symbols, [vocab_size, *breakers, *silent]))
        context = np.zeros(len(symbols), np.uint64)  # hash of the last n symbols before each
        keys, ids = [], []
        for n in range(1, longest + 1):
            at = at[reach[at] >= n]
            context[at] += random[symbols[at - n]] * powers[n - 1]
            if n >= length:
                recurs, first = _recurring(context[at] * powers[1] + random[symbols[at]], item[at], min_items)
                keys.append(context[at[first]])
                ids.append(symbols[at[first]])
                at = at[recurs]  # what does not recur after n symbols does not after more
        self._tabulate(np.concatenate(keys).view(np.int64), np.concatenate(ids))

    def _tabulate(self, keys: np.ndarray, ids: np.ndarray) -> None:
        """Contexts of all lengths in one table of C rows, E entries; then a row for "not found", and no entry."""
        order = np.argsort(keys, kind="stable")
        keys, start, count = np.unique(keys[order], return_index=True, return_counts=True)
        self.keys = torch.from_numpy(np.append(keys, np.iinfo(np.int64).max))  # [C + 1], ascending
        self.span = torch.from_numpy(np.append(np.stack([start, count], 1), [[0, 0]], axis=0))  # [C + 1, 2]
        self.ids = torch.from_numpy(np.append(ids[order], 0))  # [E + 1], tokens that followed
        self.reach = torch.arange(count.max(initial=0))  # [longest row]

    def to(self, device: torch.device) -> Self:
        """Move once; later calls with the same device cost nothing."""
        if self.random.device != device:
            for name in ("random", "powers", "breaks", "keys", "span", "ids", "reach"):
                setattr(self, name, getattr(self, name).to(device))
        return self

    def hashes(self, tokens: Tensor, generated: Tensor) -> Tensor:
        """Of the last `length` to `longest` symbols of each row: int64 [rows, lengths]."""
        nothing = self.start + 1
        age = torch.arange(tokens.shape[1], 0, -1, device=tokens.device)
        symbols = torch.where((tokens >= 0) & (tokens < self.start), tokens, nothing)
        symbols = symbols.masked_fill(age > generated[:, None], nothing)
        if self.anchor:
            symbols = symbols.masked_fill(age == generated[:, None] + 1, self.start)
        newest_first = symbols.flip(1)
        broken = self.breaks[newest_first].cumsum(1) > 0
        values = self.random[newest_first.masked_fill(broken, nothing)]
        return (values * self.powers[:-1]).cumsum(1)[:, self.length - 1 :].contiguous()


@op
def lower_phrases(scores: Tensor, tokens: Tensor, generated: Tensor, index: PhraseIndex, nats: Tensor) -> Tensor:
    """scores [rows, width] less, for each token, nats[L - length] of its longest match L, in a new tensor.

    tokens int64 [rows, longest], oldest first; generated int64 [rows]; nats [longest - length + 1], ascending.
    """
    key = index.hashes(tokens, generated)
    found = torch.searchsorted(index.keys, key)
    found = torch.where(index.keys[found] == key, found, len(index.keys) - 1)
    start, count = index.span[found].split(1, dim=2)
    reach = index.reach
    if reach.device.type == "cpu":  # on a GPU, asking for the longest row would wait for it
        reach = reach[: int(count.max())]
    inside = reach < count
    ids = index.ids[torch.where(inside, start + reach, len(index.ids) - 1)]
    lower = torch.where(inside, nats.to(scores.dtype)[:, None], 0.0).flatten(1)
    ids = ids.flatten(1)
    return scores.scatter_reduce(1, ids, scores.gather(1, ids) - lower, "amin")


def _line_up(
    texts: Sequence[np.ndarray], start: int | None, breaks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts one after the other: symbols, number of the text, and how many unbroken symbols precede, each [n]."""
    before = [] if start is None else [start]
    parts = [np.concatenate([before, text]) for text in texts]
    symbols = np.concatenate([[], *parts]).astype(np.int64)
    lengths = np.array([len(part) for part in parts], np.int64)
    begin = np.zeros(len(symbols) + 1, np.int64)  # where the unbroken run began, at its first symbol
    starts = np.cumsum(lengths) - lengths
    begin[starts] = starts
    after = np.flatnonzero(breaks[symbols]) + 1
    begin[after] = after
    reach = np.arange(len(symbols)) - np.maximum.accumulate(begin)[:-1]
    return symbols, np.repeat(np.arange(len(parts)), lengths), reach


def _recurring(grams: np.ndarray, item: np.ndarray, min_items: int) -> tuple[np.ndarray, np.ndarray]:
    """bool [n]: grams of at least `min_items` items, which ascend; and the index of the first of each."""
    order = np.argsort(grams, kind="stable")
    new = np.diff(grams[order], prepend=grams[order[:1]] + np.uint64(1)) != 0
    new_item = new | (np.diff(item[order], prepend=-1) != 0)
    group = np.cumsum(new) - 1
    kept = (np.bincount(group, new_item) >= min_items)[group]
    recurs = np.zeros(len(grams), bool)
    recurs[order] = kept
    return recurs, order[new & kept]


# --- processor ---


@register("suppression", paper="arXiv:2306.04140")
@dataclass(eq=False)  # generate() drops a processor that equals an earlier one
class SuppressionLogitsProcessor(Processor):
    """Lower the scores of tokens or phrases that were generated too often before.

    scores [rows, width] -> scores - temperature * penalty [rows, width], nats; penalty as in the module's
    docstring, in [0, cap]. It is a function of the ledger as it is when the processor is made: a generation
    never sees its own counts, and the next one takes a new processor. An empty ledger, or strength 0,
    returns the scores bit for bit. Special tokens, `exempt` ones and columns beyond the vocabulary keep
    their scores.

    strength, cap and scope that are left out are the rule's own (`DEFAULTS`).

    Parameters:
        ledger: what was generated, or its folder. The rule "dry" needs one that keeps texts.
        rule: "paper", "ratio" or "dry".
        label: of the rows that are generated now, one for all.
        scope: "global": what was generated for any label; "label": for `label`; "common": the least penalty
            that any label's counts ask for, which spares what marks a label and, without labels, is the same as
            "global" (not for "dry").
        strength: nats per percent of the text ("paper"), per e-fold of over-use ("ratio"), or for a match of
            `length` tokens ("dry").
        cap: bound on the penalty, nats.
        reference: shares of real text for "ratio": a prior of any order, of which order 1 is read.
        shrinkage: A of "ratio", in tokens.
        top: how many tokens "paper" penalises; None for all.
        length, longest: tokens of a match of "dry", least and most; longer ones count as the longest.
        base: growth of the penalty of "dry" with each further token.
        min_items: so many different items must hold what matches.
        anchor: the start of a text is a token of a match, so that openings match.
        breakers: ids that no match of "dry" runs over and that it never penalises: newlines, quotes.
        exempt: further ids that keep their scores, see `exempt_ids`.
        temperature: of the sampling. Processors run before scores are divided by it, so a penalty acts as
            penalty / T; given T here, it acts as it is.

    Raises ValueError for a parameter outside its range, and for a ledger or reference that does not fit the
    rule or each other. Source: arXiv:2306.04140, section 4.1.2 ("paper"); text-generation-webui, pull request
    5677 ("dry", there within one text).

    Cost per token: one addition of a [width] vector; for "dry" (longest - length + 1) binary searches a row.
    Beams, assisted decoding and batches of any kind are safe: nothing is remembered.

    Example:
        >>> ledger = lp.TokenLedger(tokenizer)
        >>> for round in range(100):
        ...     chain = lp.Chain([lp.SuppressionLogitsProcessor(ledger, rule="paper")])
        ...     out = lp.generate(model, chain, **prompt, do_sample=True)
        ...     ledger.update(out[:, prompt["input_ids"].shape[1] :], round=round)
    """

    ledger: TokenLedger
    rule: Rule = "ratio"
    label: str | None = None
    scope: Scope = BY_RULE
    strength: float = BY_RULE
    cap: float = BY_RULE
    reference: NGramPrior | None = None
    shrinkage: float = 1000.0
    top: int | None = 100
    length: int = 4
    longest: int = 12
    base: float = 1.75
    min_items: int = 2
    anchor: bool = True
    breakers: tuple[int, ...] = ()
    exempt: tuple[int, ...] = ()
    temperature: float = 1.0

    artifacts: ClassVar = {"ledger": TokenLedger, "reference": NGramPrior}

    def __post_init__(self) -> None:
        one_of("rule", self.rule, get_args(Rule))
        for key, value in DEFAULTS[self.rule].items():
            if getattr(self, key) is None:
                setattr(self, key, value)
        one_of("scope", self.scope, get_args(Scope))
        for key, low in (("strength", 0), ("cap", 0), ("shrinkage", 0), ("length", 1), ("min_items", 1),
                         ("base", 1), ("temperature", 1e-3), ("longest", self.length)):  # fmt: skip
            in_range(key, getattr(self, key), low, math.inf)
        if self.top is not None:
            in_range("top", self.top, 1, math.inf)
        if not isinstance(self.ledger, TokenLedger):
            raise ValueError(f"ledger must be a TokenLedger, got {type(self.ledger).__name__}.")
        self._check_fit()
        self.ledger = self.ledger.view()
        self.breakers, self.exempt = tuple(self.breakers), tuple(self.exempt)
        for token in (*self.breakers, *self.exempt):
            in_range("exempt", token, 0, self.ledger.vocab_size - 1)
        self.context = self.longest if self.rule == "dry" else 0
        self.reads_generated = self.rule == "dry"

    def _check_fit(self) -> None:
        if (self.rule == "ratio") != (self.reference is not None):
            raise ValueError(
                "rule='ratio' needs a reference, counts of real text of the kind that is generated (logitproc fit "
                "ngram --order 1), and no other rule takes one."
            )
        if self.reference and self.reference.tokenizer["fingerprint"] != self.ledger.tokenizer["fingerprint"]:
            raise ValueError(
                f"The reference counts tokens of {self.reference.tokenizer['name']}, the ledger those of "
                f"{self.ledger.tokenizer['name']}; fit the reference with the model's tokenizer."
            )
        if self.scope == "label" and self.label is None:
            raise ValueError("scope='label' needs the label of the rows that are generated: label=...")
        if self.rule == "dry" and self.scope == "common":
            raise ValueError("rule='dry' compares phrases; its scope is 'global' or 'label'.")
        if self.rule == "dry" and not self.ledger.keeps_texts:
            raise ValueError("rule='dry' searches earlier items; make the ledger with texts=True.")

    @classmethod
    def example(cls, width: int) -> Self:
        return cls(_example_ledger(width), reference=_example_reference(width))

    @classmethod
    def neutral(cls, width: int) -> Self:
        return cls(_example_ledger(width), reference=_example_reference(width), strength=0.0)

    @classmethod
    def variants(cls, width: int) -> dict[str, Processor]:
        ledger, reference = _example_ledger(width), _example_reference(width)
        return {
            "default": cls.example(width),
            "paper": cls(ledger, rule="paper", top=4, temperature=0.7, exempt=(5,)),
            "paper-common": cls(ledger, rule="paper", scope="common", top=None),
            "ratio-label": cls(ledger, reference=reference, label="a", scope="label", shrinkage=5.0),
            "dry": cls(ledger, rule="dry", length=1, longest=3, min_items=1, breakers=(4,)),
            "dry-label": cls(ledger, rule="dry", length=1, longest=5, label="a", scope="label", anchor=False),
        }

    def step(self, tokens: Tensor, scores: Tensor, *, generated: Tensor | None = None) -> Tensor:
        width = scores.shape[1]
        if width < self.ledger.vocab_size:
            self.check_width(width)
        if not self._active:
            return scores
        if self.rule != "dry":
            return scores - self._penalty_on(scores.device, width)
        assert generated is not None  # `reads_generated`
        if self._nats.device != scores.device:
            self._nats = self._nats.to(scores.device)
        return lower_phrases(scores, tokens, generated, self._index.to(scores.device), self._nats)

    @property
    def _counted_label(self) -> str | None:
        return self.label if self.scope == "label" else None

    @functools.cached_property
    def _active(self) -> bool:
        return self.strength > 0 and bool(self.ledger.counts().any())

    def _penalty_on(self, device: torch.device, width: int) -> Tensor:
        """temperature * penalty, [width], moved and filled up once."""
        penalty = self._penalty
        if penalty.device != device or len(penalty) != width:
            penalty = penalty.to(device)[: self.ledger.vocab_size]
            self._penalty = torch.nn.functional.pad(penalty, (0, width - len(penalty)))
        return self._penalty

    @functools.cached_property
    def _penalty(self) -> Tensor:
        labels = self.ledger.labels if self.scope == "common" else [self._counted_label]
        penalty = np.min([self._label_penalty(self.ledger.counts(label)) for label in labels], axis=0)
        penalty[[*self.ledger.tokenizer["special"], *self.exempt]] = 0.0
        return torch.from_numpy(np.minimum(penalty, self.cap) * self.temperature).float()

    def _label_penalty(self, counts: np.ndarray) -> np.ndarray:
        if not counts.any():
            return np.zeros(len(counts))
        if self.reference is None:
            return share_penalty(counts, self.strength, self.top)
        return overuse_penalty(counts, reference_shares(self.reference), self.strength, self.shrinkage)

    @functools.cached_property
    def _index(self) -> PhraseIndex:
        texts = self.ledger.texts(self._counted_label)
        silent = [*self.ledger.tokenizer["special"], *self.exempt]
        return PhraseIndex(texts, self.ledger.vocab_size, self.length, self.longest, self.min_items,
                           self.anchor, self.breakers, silent)  # fmt: skip

    @functools.cached_property
    def _nats(self) -> Tensor:
        growth = self.base ** np.arange(self.longest - self.length + 1)
        return torch.from_numpy(np.minimum(self.strength * growth, self.cap) * self.temperature).float()


@functools.cache
def _example_ledger(width: int) -> TokenLedger:
    rng = np.random.default_rng(0)
    about = {"fingerprint": "", "name": "ids", "vocab_size": width, "bos": None, "eos": 0, "special": [0]}
    ledger = TokenLedger(about, texts=True)
    for label in ("a", "b"):
        ledger.update((3 + np.minimum(rng.zipf(1.5, (40, 30)), 9)) % width, label)
    return ledger


@functools.cache
def _example_reference(width: int) -> NGramPrior:
    return NGramPrior.from_ids([list(range(1, width))], order=1, vocab_size=width)
