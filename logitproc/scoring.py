"""Teacher-forced scoring through a chain: a row is a position of a text, so there is no decode loop.

The model reads a text once; its logits at every position are then processed as `generate` would have
processed them there. From the raw ("base") and the processed distribution over the next token follow
negative log-likelihood, perplexity, bits per byte, and how far the chain moved the model: Jensen-Shannon
divergence, both Kullback-Leibler divergences, total variation, top-1 agreement and negative flips.

This module knows nothing of files, data sets or tables; `eval/` does.
"""

import itertools
import math
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import ops
from .chain import Chain, asks, histories

LOSSES = ("base_nll", "nll")
DIVERGENCES = ("js", "kl", "reverse_kl", "tv", "agree", "flip")

# Scores processed at once. On a CPU 2 MiB of float32, about what a core's cache holds; a GPU wants more.
_ELEMENTS, _ELEMENTS_ON_CPU = 1 << 24, 1 << 19
_ASKED_AHEAD = 1 << 26  # scores of a companion held at once
_PIECE = 1 << 20  # characters tokenized at once
_BUFFER = 32  # batches of windows held back to be grouped by length


# --- positions ---


def process_positions(
    chain: Chain,
    input_ids: Tensor,
    logits: Tensor,
    attention_mask: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    max_rows: int | None = None,
    drawn: bool = False,
) -> Tensor:
    """The scores that the chain makes of `logits` at every position of a text.

    Shapes: input_ids and attention_mask [B, T], logits [B, T, V], prompt_lengths [B]; the result is new and
    has the shape and dtype of `logits`. Row [b, t] equals a call of the chain with the first t + 1 tokens.
    Padded positions (mask 0, on either side) are no token (-1) in any history.

    `prompt_lengths` counts the tokens of each prompt without padding; tokens after it count as generated,
    as with `Chain.bind`. None: all tokens do, as with a chain that is not bound. A negative length says
    that so many generated tokens stood before this text and are not shown. `drawn` says that the chain drew the
    tokens after the prompt itself, which then are no evidence for a method that learns from given text only.

    At most `max_rows` positions are processed at once, by default as many as hold a few million scores, so
    beyond the result only the tokens that methods read grow with the text.
    """
    mask = _mask(input_ids, attention_mask)
    every, max_rows = torch.ones_like(mask), max_rows or _fitting(logits)
    out = torch.empty_like(logits)
    for b, t, _, scores in _processed(chain, input_ids, mask, prompt_lengths, logits, every, max_rows, drawn):
        out[b, t] = scores
    return out


def _processed(
    chain: Chain, ids: Tensor, mask: Tensor, prompt_lengths: Tensor | None, logits: Tensor, wanted: Tensor,
    max_rows: int, drawn: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """The wanted positions [B, T] in groups: b, t, raw and processed scores, on the device of the logits."""
    device, (rows, length, width) = logits.device, logits.shape
    generated = mask.cumsum(1)
    if prompt_lengths is not None:
        generated = (generated - prompt_lengths.to(ids.device)[:, None]).clamp(min=0)
    history = ids.masked_fill(~mask, -1)[:, :length].to(device)
    generated, wanted = generated[:, :length].to(device), wanted[:, :length].to(device, copy=True)
    gathers = any(processor.evidence_size for processor in chain.processors)
    block, totals = length, dict[int, Tensor]()
    if chain.companions:
        block = max(2, min(length, _ASKED_AHEAD // (rows * width), max_rows // rows if gathers else length))
    # Evidence goes from position to position, so a block begins with the last position of the one before.
    for start in range(0, max(1, length - gathers), block - gathers):
        stop = min(start + block, length)
        texts, counts = history[:, :stop], generated[:, start:stop]
        heard = _heard(chain, texts, stop - start)
        if gathers:
            b, k = torch.ones_like(counts).nonzero().unbind(1)
            ask = asks(heard, (b, k), width)
            done = chain.apply_positions(texts, logits[:, start:stop], counts, ask, totals, drawn)
            totals = {index: total[:, -1] for index, total in done.totals.items()}
            b, k = wanted[:, start:stop].nonzero().unbind(1)
            wanted[:, :stop] = False
            yield b, k + start, logits[b, k + start], done.scores[b, k]
            continue
        b, k = wanted[:, start:stop].nonzero().unbind(1)
        t, counts = k + start, counts[b, k]
        recent = None if chain.context is None else histories(texts, b, t, chain.context)
        for i in (slice(first, first + max_rows) for first in range(0, len(b), max_rows)):
            rows_of = histories(texts, b[i], t[i], None) if recent is None else recent[i]
            base = _rows_at(logits.flatten(0, 1), b[i] * length + t[i])
            yield b[i], t[i], base, chain.apply(rows_of, base, counts[i], asks(heard, (b[i], k[i]), width))


def _rows_at(scores: Tensor, index: Tensor) -> Tensor:
    """scores[index], ascending; a view, which copies nothing, where the rows follow each other."""
    first, last = int(index[0]), int(index[-1])
    return scores[first : last + 1] if last - first == len(index) - 1 else scores.index_select(0, index)


def _heard(chain: Chain, history: Tensor, positions: int) -> dict[int, Tensor]:
    """What each companion says after the last positions of texts [B, T]: [B, positions, width] by its id.

    One with a prompt of its own reads another text at every position: it is left out.
    """
    after = (history >= 0).flip(1).cumsum(1).flip(1) == 0  # padding on the right, which no token sees
    texts = history.masked_fill(after, 0)
    heard = {}
    for companion in chain.companions:
        if companion.prompt is None:
            companion.check_length(texts.shape[1])
            scores = companion(texts, texts >= 0, positions)
            if scores is not None:
                heard[id(companion)] = scores
    return heard


def _mask(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()


def _fitting(logits: Tensor) -> int:
    elements = _ELEMENTS_ON_CPU if logits.device.type == "cpu" else _ELEMENTS
    return max(1, elements // logits.shape[-1])


# --- tokens ---


@torch.no_grad()
def score_tokens(
    model: Any,
    chain: Chain,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    divergence: bool = True,
    only: Tensor | None = None,
    drawn: bool = False,
) -> dict[str, Tensor]:
    """Figures of every token given the tokens before it, raw (base p) and through the chain (processed q).

    Shapes: input_ids, attention_mask and `only` (bool: which tokens to score, default all) [B, T];
    prompt_lengths [B] and `drawn` as in `process_positions`. The result holds float64 [B, T] tensors on the device of
    the logits, 0 where nothing was scored, and `scored`, bool [B, T]:

        base_nll, nll    -ln p(token), -ln q(token), nats; infinite for a token that is forbidden
        js               Jensen-Shannon divergence of p and q, bits, in [0, 1]
        kl, reverse_kl   KL(q || p), KL(p || q), nats; the latter is infinite when q forbids what p allows
        tv               total variation of p and q, in [0, 1]
        agree            1 where p and q have the same most probable token
        flip             1 where p's most probable token is the text's and q's is not

    The last six come with `divergence` only. The first token of a row has nothing before it and is never
    scored, so T may be one more than what the model reads. Padding may stand on either side: rows are moved
    to the left before the model reads them, so the figures are those of the row alone.

    Raises ValueError for a text longer than the model reads.
    """
    ids, mask = input_ids.to(model.device), _mask(input_ids, attention_mask).to(model.device)
    limit = max_context(model)
    if limit is not None and ids.shape[1] - 1 > limit:
        raise ValueError(f"The model reads {limit} tokens, the text has {ids.shape[1]}; score it in windows.")
    # No token sees what stands to its right, so padding on the right needs no mask and no position ids.
    left = mask.long().argsort(dim=1, descending=True, stable=True)
    ids, mask = ids.gather(1, left), mask.gather(1, left)
    scored = mask & (torch.arange(ids.shape[1], device=ids.device) > 0)
    if only is not None:
        scored &= only.to(ids.device).bool().gather(1, left)

    names = LOSSES + DIVERGENCES if divergence else LOSSES
    values = torch.zeros(len(names), *ids.shape, dtype=torch.float64, device=ids.device)
    if bool(scored.any()):
        logits = model(input_ids=ids.masked_fill(~mask, 0)[:, :-1], use_cache=False).logits
        rows = _processed(chain, ids, mask, prompt_lengths, logits, scored[:, 1:], _fitting(logits), drawn)
        targets, found = ids.to(logits.device), []
        for b, t, base, processed in rows:
            figures = compare(base.float(), processed.float(), targets[b, t + 1], divergence)
            found.append((b, t, torch.stack([figures[name].double() for name in names])))
        b, t, measured = (torch.cat(parts, -1).to(ids.device) for parts in zip(*found, strict=True))
        values[:, b, t + 1] = measured
    values = torch.zeros_like(values).scatter(2, left.expand_as(values), values)
    result = dict(zip(names, values, strict=True))
    return {**result, "scored": torch.zeros_like(scored).scatter(1, left, scored)}


def compare(base: Tensor, processed: Tensor, target: Tensor, divergence: bool = True) -> dict[str, Tensor]:
    """The figures of `score_tokens`, each [rows]: base and processed scores [rows, V], target ids [rows]."""
    base_nll = ops.nll(base, target)
    nll = base_nll if processed is base else ops.nll(processed, target)
    result = {"base_nll": base_nll, "nll": nll}
    if not divergence:
        return result
    js, kl, reverse_kl, tv, top_p, top_q = ops.divergences(base, processed)
    return {
        **result,
        "js": (js / math.log(2)).clamp(0, 1),
        "kl": kl.clamp(min=0),
        "reverse_kl": reverse_kl.clamp(min=0),
        "tv": tv,
        "agree": top_p == top_q,
        "flip": (top_p == target) & (top_q != target),
    }


def max_context(model: Any) -> int | None:
    """How many tokens the model reads, by its config; None when that is not stated."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


# --- windows ---


class Window(NamedTuple):
    """tokens[start:stop] of a document, of which tokens[first:stop] are predicted."""

    start: int
    stop: int
    first: int


def windows(n_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Strided sliding windows: tokens 1 .. n_tokens - 1 are each predicted in exactly one window.

    With context 4, stride 2 and 9 tokens (x predicted, . read only):

        token       0 1 2 3 4 5 6 7 8
        window 0    . x x x x
        window 1        . . . x x
        window 2            . . . x x

    The model reads `context` tokens of a window at most; the last one is predicted and not read. From the
    second window on every prediction rests on at least context - stride + 1 tokens, and all windows of a
    document longer than the context have one length. Token 0 is never predicted: it is BOS if the tokenizer
    has one, on which the first token of the text is then conditioned; without BOS it is the first token of
    the text, which is counted as not scored.

    Raises ValueError unless 1 <= stride <= context.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be from 1 to the context, got stride {stride} and context {context}.")
    return _windows(n_tokens, context, stride)


def _windows(n_tokens: int, context: int, stride: int) -> Iterator[Window]:
    first, stop = 1, context + 1
    while first < n_tokens:
        stop = min(stop, n_tokens)
        yield Window(max(0, stop - context - 1), stop, first)
        first, stop = stop, stop + stride


# --- a corpus ---


@dataclass(frozen=True)
class Report:
    """What `score_corpus` found, over all tokens scored and all processes.

    `mean` and `error` hold, for each measure of `score_tokens` and for `delta_nll` = nll - base_nll, the mean
    over tokens and its standard error: standard deviation / sqrt(tokens), tokens taken as independent.
    `words` are separated by whitespace, `bytes` are UTF-8. `unscored` counts first tokens of documents that
    had no BOS before them, `forbidden` tokens of the text to which the chain gives probability 0; one of
    these makes `nll` infinite.
    """

    documents: int
    words: int
    bytes: int
    tokens: int
    unscored: int
    forbidden: int
    mean: dict[str, float]
    error: dict[str, float]

    def perplexity(self, loss: str = "nll") -> float:
        """exp(nats per token); loss is "nll" (processed) or "base_nll"."""
        return _exp(self.mean[loss])

    def word_perplexity(self, loss: str = "nll") -> float:
        """exp(nats in all / words), which compares models of different vocabularies."""
        return _exp(self.mean[loss] * self.tokens / self.words) if self.words else math.nan

    def bits_per_byte(self, loss: str = "nll") -> float:
        """Bits in all / bytes of text, which compares models of different vocabularies."""
        return self.mean[loss] * self.tokens / math.log(2) / self.bytes


def score_corpus(
    model: Any,
    tokenizer: Any,
    chain: Chain,
    documents: Iterable[str],
    *,
    context: int,
    stride: int,
    batch_size: int = 8,
    divergence: bool = True,
    accelerator: Any = None,
    limit: int | None = None,
) -> Report:
    """Score documents through a chain in sliding `windows`, in memory that does not grow with the corpus.

    Documents are read lazily, at most `limit` of them. One document and its ids are held at a time; a
    document of more than a million characters is tokenized in pieces that end at whitespace. Every token
    counts as generated, those before its window too. With an `accelerate.Accelerator` the documents are
    dealt to the processes in turn, and sums and counts, never means, are added up.

    Raises ValueError unless 1 <= stride <= context <= what the model reads, for a chain fitted for another
    tokenizer, for ids beyond the model's vocabulary and for a corpus without a token to score.
    """
    windows(0, context, stride)  # refuses a bad stride before anything is read
    limit_of_model = max_context(model)
    if limit_of_model is not None and context > limit_of_model:
        raise ValueError(f"context must be at most what the model reads, {limit_of_model}; got {context}.")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    chain.check(width=vocabulary, tokenizer=tokenizer)

    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    dealt = itertools.islice(itertools.islice(documents, limit), rank, None, world)
    names = LOSSES + (DIVERGENCES if divergence else ()) + ("delta_nll",)
    # Sum and sum of squares of each measure, then the counts: one tensor, so one message to add up.
    moments = torch.zeros(2, len(names), dtype=torch.float64)
    counts = _Counts()
    stream = _document_windows(tokenizer, dealt, context, stride, vocabulary, counts)
    with _progress(hidden=rank > 0) as bar:
        for batch in _batches(stream, batch_size):
            ids, mask, only, prompts = _collate(batch)
            figures = score_tokens(model, chain, ids, mask, prompts, divergence, only)
            figures["delta_nll"] = figures["nll"] - figures["base_nll"]
            values = torch.stack([figures[name][figures["scored"]] for name in names])
            moments += torch.stack([values.sum(1), values.square().sum(1)]).cpu()
            counts.tokens += values.shape[1]
            counts.forbidden += int(values[names.index("nll")].isinf().sum())
            bar.update(values.shape[1])

    totals = torch.cat([moments.flatten(), torch.tensor(list(vars(counts).values()), dtype=torch.float64)])
    if accelerator:
        totals = accelerator.reduce(totals.to(accelerator.device), reduction="sum").cpu()
    sums, squares = totals[: moments.numel()].view_as(moments).tolist()
    counts = _Counts(*(int(x) for x in totals[moments.numel() :].tolist()))
    if counts.tokens == 0:
        raise ValueError(f"The corpus holds no token to score: {counts.documents} documents were read.")
    return Report(
        **vars(counts),
        mean={name: x / counts.tokens for name, x in zip(names, sums, strict=True)},
        error={name: _error(x, xx, counts.tokens) for name, x, xx in zip(names, sums, squares, strict=True)},
    )


@dataclass
class _Counts:
    documents: int = 0
    words: int = 0
    bytes: int = 0
    tokens: int = 0
    unscored: int = 0
    forbidden: int = 0


class _Text(NamedTuple):
    """Ids, the index of the first one that is scored, and the length of the prompt."""

    ids: Sequence[int]
    first: int
    prompt: int


def _document_windows(
    tokenizer: Any, documents: Iterable[str], context: int, stride: int, vocabulary: int, counts: _Counts
) -> Iterator[_Text]:
    bos = tokenizer.bos_token_id
    for document in documents:
        ids = array("i", [] if bos is None else [bos])
        for piece in _pieces(document):
            ids.extend(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
            counts.words += len(piece.split())
            counts.bytes += len(piece.encode("utf-8", "surrogatepass"))
        counts.documents += 1
        counts.unscored += bos is None and len(ids) > 0
        if max(ids, default=0) >= vocabulary:
            raise ValueError(
                f"The tokenizer gives the id {max(ids)}, the model has {vocabulary} tokens; "
                "use the tokenizer that belongs to the model."
            )
        for start, stop, first in windows(len(ids), context, stride):
            yield _Text(ids[start:stop], first - start, -start)


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text after a line break, else before a space, where tokenizers rarely join."""
    start = 0
    while len(text) - start > _PIECE:
        end = start + _PIECE
        stop = text.rfind("\n", start, end) + 1 or text.rfind(" ", start + 1, end)
        stop = stop if stop > start else end
        yield text[start:stop]
        start = stop
    yield text[start:]


def _batches(texts: Iterable[_Text], batch_size: int) -> Iterator[list[_Text]]:
    """Batches of nearly equal length: short documents are sorted within a bounded buffer."""
    texts = iter(texts)
    while held := list(itertools.islice(texts, batch_size * _BUFFER)):
        held.sort(key=lambda text: len(text.ids))
        for start in range(0, len(held), batch_size):
            yield held[start : start + batch_size]


def _collate(batch: Sequence[_Text]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids [B, T] padded on the right, mask, which tokens are scored, and prompt lengths [B]."""
    length = max(len(text.ids) for text in batch)
    ids = torch.stack([pad(torch.tensor(text.ids), (0, length - len(text.ids))) for text in batch]).long()
    column = torch.arange(length)
    mask = column < torch.tensor([len(text.ids) for text in batch])[:, None]
    only = mask & (column >= torch.tensor([text.first for text in batch])[:, None])
    return ids, mask, only, torch.tensor([text.prompt for text in batch])


def _progress(hidden: bool) -> Any:
    from tqdm import tqdm

    return tqdm(desc="scoring", unit=" tokens", unit_scale=True, disable=hidden or not sys.stderr.isatty())


def _error(total: float, squares: float, n: int) -> float:
    """Standard error of a mean; NaN when it is infinite or rests on one token."""
    if n < 2 or not math.isfinite(squares):
        return math.nan
    return math.sqrt(max(0.0, squares - total * total / n) / (n - 1) / n)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


# --- continuations ---


def score_continuations(
    model: Any,
    chain: Chain,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int = 8,
) -> list[dict[str, float]]:
    """Means over the tokens of each continuation, given its prompt; one dict a text, in the order given.

    Keys are the measures of `score_tokens` and `tokens`, how many were scored. `base_nll` says how fluent
    the unsteered model finds a text. The prompt counts as prompt, so the chain acts as it did under
    `logitproc.generate`. A continuation without tokens gives `tokens` 0 and NaN; so that the first token is
    scored, a prompt should hold at least one (BOS).

    Raises ValueError when there are not as many prompts as continuations, or a text is too long.
    """
    if len(prompts) != len(continuations):
        raise ValueError(f"{len(prompts)} prompts were given for {len(continuations)} continuations.")
    texts = [
        _Text([*prompt, *text], len(prompt), len(prompt))
        for prompt, text in zip(prompts, continuations, strict=True)
    ]
    results: list[dict[str, float]] = [{} for _ in texts]
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    for start in range(0, len(texts), batch_size):
        batch = by_length[start : start + batch_size]
        ids, mask, only, lengths = _collate([texts[i] for i in batch])
        figures = score_tokens(model, chain, ids, mask, lengths, only=only, drawn=True)
        scored = figures.pop("scored")
        tokens = scored.sum(1)
        means = {name: (value.sum(1) / tokens).tolist() for name, value in figures.items()}
        for row, i in enumerate(batch):
            results[i] = {name: column[row] for name, column in means.items()} | {"tokens": int(tokens[row])}
    return results
