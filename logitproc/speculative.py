"""Speculative decoding of a chain: a small companion drafts, the host and the others verify in one pass each.

A chain turns the host's scores at a prefix into a distribution that depends on the prefix only, so speculative
sampling is exact for it: greedy text is that of step by step decoding token by token, sampled text has the same
distribution. Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding",
arXiv:2211.17192, algorithm 1; here the target is the processed distribution, at all positions of a draft at once.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from .chain import BoundChain, Chain, Positions, asks
from .companion import Companion
from .evidence import gather
from .processor import as_wide

LONGEST = 16  # tokens of a draft
_TOKENS_ONLY = {"attention_mask", "position_ids", "cache_position"}  # of a host, what follows from its tokens
_REMEMBER = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
# A token is drafted while it stands with at least this chance. Where a pass of the host costs four of the drafter's, a
# token costs about 0.4 of it to draft and to verify.
_WORTH = 0.4
# Chances at first, by how sure the drafter is: its most probable token has less than 1/4, 1/2, 3/4, or more. An expert
# for the mixture does a little better, for other fusions worse (dev part of `eval/speculative.py`). A token that is
# sampled stands by how much of the two distributions is shared, which hardly depends on how sure they are.
_GREEDY, _SAMPLED = (0.6, 0.75, 0.85, 0.95), (0.83, 0.84, 0.85, 0.88)
_TRIES, _MEMORY = 5.0, 0.95  # what these count for, and how much of what was learned counts a round later


@dataclass
class Speculation:
    """How to draft, and how it went.

    `draft` is the companion that drafts, by default the last one of the chain, which methods make the one that
    is nearest to what comes out. `tokens` fixes the length of drafts. By default it follows the acceptance: a
    token is drafted while it and all before it stand with a chance of 0.4, by what became of tokens of which
    the drafter was as sure. Each `generate` sets the counts to 0 first: `rounds` of draft and verification,
    tokens `drafted`, those that were `judged` (not after a rejected one) and `accepted`.
    """

    draft: Companion | None = None
    tokens: int | None = None

    rounds: int = field(default=0, init=False)
    drafted: int = field(default=0, init=False)
    judged: int = field(default=0, init=False)
    accepted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.tokens is not None and not 1 <= self.tokens <= LONGEST:
            raise ValueError(f"Drafts have from 1 to {LONGEST} tokens, got {self.tokens}.")

    @property
    def acceptance(self) -> float:
        """Accepted / judged tokens: the chance of a drafted token to stand when all before it do."""
        return self.accepted / self.judged if self.judged else math.nan

    def drafter(self, chain: Chain) -> Companion:
        """The companion that drafts for this chain. ValueError when there is none."""
        draft = self.draft or next(reversed(chain.companions), None)
        if draft is None:
            raise ValueError(
                "Speculation needs a companion to draft; this chain has none: give it a draft model."
            )
        if draft.prompt is not None:
            raise ValueError("The companion that drafts must read the host's prompt, not one of its own.")
        return draft


class Decoder:
    """A decoding loop for `model.generate(custom_generate=...)`; one text at a time.

    `bound` is the chain bound to the prompt, as it stands in `logits_processor`. Every other processor there,
    those of transformers included, is called once for each position, in its place in the list; the draft goes
    through these too. So they must remember nothing: ValueError for those of transformers that do, and for what the
    host is to read beside tokens.
    """

    def __init__(self, bound: BoundChain, speculation: Speculation, streamer: Any = None):
        self.bound, self.speculation, self.streamer = bound, speculation, streamer
        self.drafter = speculation.drafter(bound.chain)
        speculation.rounds = speculation.drafted = speculation.judged = speculation.accepted = 0

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        """The prompt [1, T] and what follows it, [1, T + n]."""
        _refuse(logits_processor, model_kwargs)
        host, sampled, done = Companion(model), bool(generation_config.do_sample), False
        host.max_length = None  # as in plain decoding
        evidence = self.bound.evidence(input_ids, host.width)
        self._expect(sampled)
        self._stream(input_ids)
        while not done:
            known = input_ids.shape[1]
            most = min(self.speculation.tokens or LONGEST, generation_config.max_length - known - 1)
            text, drawn_from, heard = self._draft(input_ids, host.width, logits_processor, most, sampled)
            raw = self._logits(host, text, len(drawn_from) + 1)
            scores, positions = self._process(text, raw, logits_processor, heard, evidence)
            kept, token = accept(text[0, known:], drawn_from, scores, sampled)
            evidence = self._gathered(positions, kept, token)
            self._learn(drawn_from, kept)
            for at, new in enumerate([*text[0, known : known + kept], token]):
                input_ids = torch.cat([input_ids, new.view(1, 1)], 1)
                self._stream(new.view(1))
                done = bool(stopping_criteria(input_ids, scores[at : at + 1]).all())
                if done:
                    break
        if self.streamer is not None:
            self.streamer.end()
        return input_ids

    def _draft(
        self, ids: Tensor, width: int, processors: LogitsProcessorList, most: int, sampled: bool
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """ids with up to `most` tokens more, what these were drawn from [count, V], and what companions said.

        The latter, by id, are logits [1, count + 1, V] after the ids that were and after each new one.
        """
        logits, drawn_from, chance = [], [torch.empty(0, width, device=ids.device)], 1.0
        while True:
            logits.append(self._logits(self.drafter, ids, 1))
            scores = as_wide(logits[-1][0], width)
            for processor in processors:
                if processor is not self.bound:
                    scores = processor(ids, scores)
            p = scores.softmax(-1)
            accepted, judged = self.tallies[sureness(p)[0]]
            chance *= accepted / judged
            # Nothing is lost by ending here: what was just computed is needed to verify.
            if len(logits) > most or (self.speculation.tokens is None and chance < _WORTH):
                break
            drawn_from.append(p)
            token = torch.multinomial(p, 1) if sampled else scores.argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], 1)
        heard = {}
        for companion in self.bound.chain.companions:
            if companion is self.drafter:
                heard[id(companion)] = torch.cat(logits, 1)
            elif companion.prompt is None:
                heard[id(companion)] = self._logits(companion, ids, len(logits))
        return ids, torch.cat(drawn_from), heard

    def _process(
        self, text: Tensor, raw: Tensor, processors: LogitsProcessorList, heard: dict[int, Tensor],
        evidence: dict[int, Tensor],
    ) -> tuple[Tensor, Positions]:  # fmt: skip
        """raw [1, K, V] at the last K positions of a text, through all processors [K, V]; and the chain's part."""
        count, width = raw.shape[1:]
        at = torch.arange(count, device=text.device)
        first, scores, positions = text.shape[1] - count + 1, raw[0], None
        for processor in processors:
            if processor is self.bound:
                ask = asks(heard, (0, slice(None)), width)
                generated = (first - self.bound.prompt + at)[None]
                positions = self.bound.chain.apply_positions(
                    self.bound.hide(text), scores[None], generated, ask, evidence, drawn=True
                )
                scores = positions.scores[0]
            else:
                rows = [processor(text[:, : first + k], scores[k : k + 1]) for k in range(count)]
                scores = torch.cat(rows)
        assert positions is not None
        return scores, positions

    def _gathered(self, positions: Positions, kept: int, token: Tensor) -> dict[int, Tensor]:
        """The evidence of the text once `kept` tokens of the draft and then `token` have come."""
        here, told = token.new_tensor([kept]), torch.ones(1, 1, dtype=torch.bool, device=token.device)
        return {
            index: gather(self.bound.chain.processors[index], total[:, kept], token.view(1, 1),
                          positions.seen[index].take(here), told, drawn=True)[:, -1]
            for index, total in positions.totals.items()
        }  # fmt: skip

    def _logits(self, companion: Companion, ids: Tensor, positions: int) -> Tensor:
        history = self.bound.hide(ids)
        logits = companion(history, history >= 0, positions)
        assert logits is not None, (
            "a companion that is off beyond its context is refused before the first token"
        )
        return logits

    def _expect(self, sampled: bool) -> None:
        """What is thought of drafts before any was judged."""
        self.chances = _SAMPLED if sampled else _GREEDY
        self.tallies = [(chance * _TRIES, _TRIES) for chance in self.chances]  # accepted, judged

    def _learn(self, drawn_from: Tensor, kept: int) -> None:
        """Count what became of a draft, and let what was learned fade."""
        judged = min(kept + 1, len(drawn_from))  # what comes after a rejection was not
        self.tallies = [
            (_MEMORY * accepted + (1 - _MEMORY) * chance * _TRIES, _MEMORY * tries + (1 - _MEMORY) * _TRIES)
            for (accepted, tries), chance in zip(self.tallies, self.chances, strict=True)
        ]
        for at, sure in enumerate(sureness(drawn_from[:judged])):
            accepted, tries = self.tallies[sure]
            self.tallies[sure] = accepted + (at < kept), tries + 1
        self.speculation.rounds += 1
        self.speculation.drafted += len(drawn_from)
        self.speculation.judged += judged
        self.speculation.accepted += kept

    def _stream(self, tokens: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())


def _refuse(processors: LogitsProcessorList, model_kwargs: dict[str, Any]) -> None:
    """Raise ValueError for what would make the text another one."""
    for processor in processors:
        if isinstance(processor, _REMEMBER):
            raise ValueError(
                f"Speculation drops tokens that a draft got wrong, and {type(processor).__name__} would remember them; "
                "leave one of the two out."
            )
    for key, value in model_kwargs.items():
        if isinstance(value, Tensor) and key not in _TOKENS_ONLY:
            raise ValueError(f"Speculation shows the host nothing but tokens and does not support {key}; leave it out.")


def sureness(p: Tensor) -> list[int]:
    """Which quarter the largest probability of each row [rows, V] is in, 0 to 3; 0 for NaN."""
    return [min(int(4 * most), len(_GREEDY) - 1) for most in p.amax(-1).nan_to_num().tolist()]


def accept(drafted: Tensor, drawn_from: Tensor, scores: Tensor, sampled: bool) -> tuple[int, Tensor]:
    """How many of g drafted tokens stand, and the token that follows those.

    Shapes: drafted [g]; drawn_from [g, V], probabilities; scores [g + 1, V] of the target. Sampled: token i
    stands with probability min(1, p_i / q_i), and at the first that does not, another is drawn from (p - q)+,
    so that what comes out is distributed as p (arXiv:2211.17192, section 2.3). Greedy: it stands if it is the
    target's most probable one.
    """
    count, choice = len(drafted), scores.argmax(-1)
    if not sampled:
        kept = int((choice[:count] == drafted).long().cumprod(0).sum())
        return kept, choice[kept]
    p, at = scores.softmax(-1), torch.arange(count, device=drafted.device)
    stands = torch.rand(count, device=p.device) * drawn_from[at, drafted] < p[at, drafted]
    kept = int(stands.long().cumprod(0).sum())
    rest = p[kept] if kept == count else (p[kept] - drawn_from[kept]).clamp(min=0)
    return kept, torch.multinomial(rest, 1)[0]
