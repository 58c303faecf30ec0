"""Evidence: what a processor gathers along a text (see `Processor`), while it is generated or scored."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .companion import find_parents, read_later

if TYPE_CHECKING:
    from .chain import Chain
    from .processor import Processor

_ELEMENTS = 1 << 26  # scores of a companion held at once, when it scores all tokens of a prompt


class Seen(NamedTuple):
    """What a processor that gathers evidence was given before a token, [rows, width] each."""

    scores: Tensor | None  # None: unknown, as for the tokens of a prompt
    companion_scores: list[Tensor]

    def take(self, rows: Tensor | slice) -> "Seen":
        scores = None if self.scores is None else self.scores[rows]
        return Seen(scores, [part[rows] for part in self.companion_scores])


def reads_prompt(processor: "Processor") -> bool:
    """Whether its companions read the host's prompt; what one with a prompt of its own says is not about that."""
    return all(companion.prompt is None for companion in processor.auxiliaries())


def gather(
    processor: "Processor", total: Tensor, tokens: Tensor, seen: Seen, told: Tensor | bool, drawn: bool
) -> Tensor:  # fmt: skip
    """What texts have gathered before and after each of K tokens: [B, K + 1, E].

    Shapes: total [B, E]; tokens [B, K]; `seen` [B K, width], text by text; told [B, K], or one for all: whether the
    scores seen are those of a generated token, as opposed to one of the prompt; drawn: whether the chain drew the
    generated tokens itself, see `Processor.learns_from_drawn`. Ids outside the vocabulary add nothing, nor does a
    prompt that a companion does not read.
    """
    totals, count = [total], tokens.shape[1]
    if count:
        width = seen.companion_scores[0].shape[-1]
        valid, ids = (tokens >= 0) & (tokens < width), tokens.flatten().clamp(0, width - 1)
        learns = processor.learns_from_drawn or not drawn
        if isinstance(told, bool):  # known without asking the device
            kinds = [(seen.scores if told else None, valid)] if learns or not told else []
        else:
            both = [(seen.scores, told)] if learns else []
            both += [(None, ~told)] if reads_prompt(processor) else []
            kinds = [(scores, kind & valid) for scores, kind in both if bool(kind.any())]
        found = []
        for scores, counts in kinds:
            evidence = processor.evidence(ids, scores, *seen.companion_scores)
            if evidence is not None:
                found.append((evidence.view(*tokens.shape, processor.evidence_size), counts))
        for k in range(count):
            for evidence, counts in found:
                total = torch.where(counts[:, k, None], processor.accumulate(total, evidence[:, k]), total)
            totals.append(total)
    return torch.stack(totals, 1)


def from_prompt(processor: "Processor", history: Tensor, width: int, generated: Tensor | None) -> Tensor:
    """What each text has gathered, [rows, E], when all its tokens are prompt.

    Companions are asked about the last token as well: the step that follows asks them that, and they need not read
    the prompt again.
    """
    rows, length = history.shape
    total = torch.zeros(rows, processor.evidence_size, device=history.device)
    if not reads_prompt(processor):
        return total
    block = max(1, _ELEMENTS // (rows * width))
    for start in range(0, length, block):
        stop = min(start + block, length)
        logits = processor.consult(history[:, :stop], width, generated, stop - start)
        if logits is None:
            break
        tokens = history[:, start + 1 : stop + 1]
        count = tokens.shape[1]  # one fewer at the end, which nothing follows yet
        tokens = tokens.masked_fill(history[:, start : start + count] < 0, -1)
        seen = Seen(None, [part[:, :count].flatten(0, 1) for part in logits])
        total = gather(processor, total, tokens, seen, told=False, drawn=False)[:, -1]
    return total


class Gathered:
    """The evidence of the texts that a chain is generating, keyed by their tokens and never by row.

    What a processor thought of a token counts once that token has come, so what it saw at the last step is
    kept. A text is recognised by its tokens: rows may be permuted or repeated between steps.
    """

    def __init__(self, chain: "Chain", prompt: int | None = None):
        self.chain, self.prompt = chain, prompt
        self.gathers = any(processor.evidence_size for processor in chain.processors)
        self.history: Tensor | None = None
        self.totals: dict[int, Tensor] = {}  # by the index of the processor, [rows, E]
        self.seen: dict[int, Seen] = {}
        self.started = 0  # the length of the prompt
        self.lags = False
        self.unread: list[Callable[[], bool]] = []  # whether the texts of the last step were others

    def apply(self, history: Tensor, scores: Tensor, generated: Tensor | None = None) -> Tensor:
        """`Chain.apply` for the next token of every row."""
        if not self.gathers:
            return self.chain.apply(history, scores, generated)
        totals, seen = self._totals(history, scores.shape[1], generated), dict[int, Seen]()
        out = self.chain.apply(history, scores, generated, evidence=totals, seen=seen)
        self.history, self.totals, self.seen = history.clone(), totals, seen
        return out

    def _totals(self, history: Tensor, width: int, generated: Tensor | None) -> dict[int, Tensor]:
        """What the texts have gathered so far. RuntimeError when that cannot be known."""
        length = history.shape[1]
        if self.history is not None:
            rows: Tensor | slice | None
            had = self.history.shape[1]
            if self.lags and history.shape == (len(self.history), had + 1):
                self._settle()
                self.unread = [read_later((history[:, :-1] != self.history).any())]
                return {index: self._advanced(index, slice(None), history[:, -1:]) for index in self.totals}
            if length == had and (rows := find_parents(self.history, history)) is not None:
                return {index: total[rows] for index, total in self.totals.items()}
            if length == had + 1 and (rows := _parents(self.history, history[:, :-1])) is not None:
                return {index: self._advanced(index, rows, history[:, -1:]) for index in self.totals}
            if self.started < length <= had + 1:
                prompts = find_parents(self.history[:, : self.started], history[:, : self.started])
                self._refuse(prompts is not None, length)
        self._refuse(self.prompt is not None and length > self.prompt, length)
        self.started = length
        return {
            index: from_prompt(processor, history, width, generated)
            for index, processor in enumerate(self.chain.processors)
            if processor.evidence_size
        }

    def _advanced(self, index: int, rows: Tensor | slice, tokens: Tensor) -> Tensor:
        total = self.totals[index][rows]
        if index not in self.seen:  # its companions had no say
            return total
        seen = self.seen[index].take(rows)
        return gather(self.chain.processors[index], total, tokens, seen, told=True, drawn=True)[:, -1]

    @contextlib.contextmanager
    def lagging(self) -> Iterator[None]:
        """While texts are continued token by token, row by row: take that for granted and check it a step later.

        Raises RuntimeError at the next step, or at the end, when it was not so; see `Companion.lagging`.
        """
        self.lags = True
        try:
            yield
            self._settle()
        finally:
            self.lags, self.unread = False, []

    def _settle(self) -> None:
        unread, self.unread = self.unread, []
        self._refuse(any(differs() for differs in unread), self.history.shape[1] if self.history is not None else 0)

    def _refuse(self, rolled_back: bool, length: int) -> None:
        if rolled_back:
            name = next(processor.name for processor in self.chain.processors if processor.evidence_size)
            raise RuntimeError(
                f"{name!r} gathers evidence from token to token, and a text of {length} tokens came that does not "
                "follow from the step before. It cannot be used with assisted decoding."
            )


def _parents(old: Tensor, new: Tensor) -> Tensor | slice | None:
    """As `find_parents`, but a slice where no row has moved: what belongs to the rows need not be copied."""
    return slice(None) if torch.equal(old, new) else find_parents(old, new)
