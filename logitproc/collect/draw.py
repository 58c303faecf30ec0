"""Sampling with a stream of random numbers for each row, so that a text does not depend on its neighbours.

`model.generate` samples all rows from one generator. Here it decodes greedily what an entry of
`logits_processor` has drawn: that entry runs the chain, then transformers' own warpers, and leaves one token.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedModel,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..chain import Chain
from ..generation import decode
from .job import Sampling


class Request(NamedTuple):
    """A text to be drawn: its prompt, the label that chooses its chain, the seed of its row."""

    prompt: str
    label: str
    seed: int


class Drawn(NamedTuple):
    """A text, without what ended it ("stop", "eos" or "length") and without white space around it.

    `token_ids` are the generated ids of the text: neither end-of-text token nor stop string. `base_nll` is their
    mean -ln p under the model alone at temperature 1, None for no ids.
    """

    text: str
    token_ids: list[int]
    finish: str
    base_nll: float | None


@torch.no_grad()
def draw(
    model: PreTrainedModel, tokenizer: Any, chains: Mapping[str, Chain], requests: Sequence[Request],
    sampling: Sampling, stop: Sequence[str] = (),
) -> list[Drawn]:  # fmt: skip
    """Draw one text for each request, in one batch; `chains` by label.

    A row depends on the other rows by the rounding of the model's arithmetic only.
    """
    prompts = [tokenizer(request.prompt)["input_ids"] for request in requests]
    width = max(map(len, prompts))
    eos = model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)

    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=ends or None
    )
    # A copy that shares the weights: settings in the model's own generation_config would come in unasked.
    bare = copy.copy(model)
    bare.generation_config = config
    by_label = _by_label(chains, requests, ids, mask)
    drawing = _Draw(by_label, _warpers(sampling, width, ends, model.device), requests, width, sampling.max_new_tokens)
    output = bare.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=[drawing],
        stopping_criteria=[_Stop(tokenizer, stop, width)],
    )  # fmt: skip
    rows = output[:, width:].tolist()
    losses = drawing.base_nll.tolist()
    return [_finish(tokenizer, *row, ends, stop, sampling) for row in zip(prompts, rows, losses, strict=True)]


class _Draw(LogitsProcessor):
    """Leaves one token of each row, drawn by inverting the distribution function at the row's random number."""

    supports_continuous_batching = False

    def __init__(
        self, chains: Sequence[tuple[Tensor, LogitsProcessor]], warpers: Sequence[LogitsProcessor],
        requests: Sequence[Request], prompt: int, length: int,
    ):  # fmt: skip
        self.chains, self.warpers, self.prompt = chains, warpers, prompt
        device = chains[0][0].device
        # Drawn on the CPU, so that they are the same on every device.
        streams = [torch.rand(length, generator=_generator(r.seed), dtype=torch.float64) for r in requests]
        self.uniform = torch.stack(streams).to(device)
        self.base_nll = torch.zeros(len(requests), length, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt
        z = torch.empty_like(scores)
        for rows, chain in self.chains:
            z[rows] = chain(input_ids[rows], scores[rows])
        for warper in self.warpers:
            z = warper(input_ids, z)
        token = invert(z, self.uniform[:, step])
        self.base_nll[:, step] = torch.nn.functional.cross_entropy(scores.float(), token, reduction="none")
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def invert(scores: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the distribution function first exceeds u: scores [rows, width], u [rows] in [0, 1).

    For uniform u that is a sample of softmax(scores). A token of probability 0 is never taken.
    """
    cumulated = scores.double().softmax(-1).cumsum(-1)
    return (cumulated <= uniform[:, None] * cumulated[:, -1:]).sum(-1)


class _Stop(StoppingCriteria):
    """Ends a row whose text holds a stop string; token by token this decodes byte tokens too, which
    transformers' `stop_strings` does not see."""

    def __init__(self, tokenizer: Any, strings: Sequence[str], prompt: int):
        self.tokenizer, self.strings, self.prompt = tokenizer, strings, prompt
        self.tail = max([len(s.encode()) for s in strings], default=0) + 2  # a token is a byte at least

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if not self.strings:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        tails = input_ids[:, max(self.prompt, input_ids.shape[1] - self.tail) :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        done = [any(s in text for s in self.strings) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _by_label(
    chains: Mapping[str, Chain], requests: Sequence[Request], ids: Tensor, mask: Tensor
) -> list[tuple[Tensor, LogitsProcessor]]:
    """(rows, chain bound to their prompts) for each chain; labels that share one go through it together."""
    rows: dict[int, list[int]] = {}
    for row, request in enumerate(requests):
        rows.setdefault(id(chains[request.label]), []).append(row)
    found: list[tuple[Tensor, LogitsProcessor]] = []
    for of_chain in rows.values():
        index = torch.tensor(of_chain, device=ids.device)
        found.append((index, chains[requests[of_chain[0]].label].bind(ids[index], mask[index])))
    return found


def _warpers(sampling: Sampling, prompt: int, ends: list[int], device: Any) -> list[LogitsProcessor]:
    """What transformers would apply, in its order."""
    warpers: list[LogitsProcessor] = []
    if sampling.min_new_tokens and ends:
        warpers.append(
            MinNewTokensLengthLogitsProcessor(prompt, sampling.min_new_tokens, ends, device=device)
        )
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(float(sampling.min_p)))
    return warpers


def _finish(
    tokenizer: Any, prompt: list[int], ids: list[int], losses: list[float], ends: list[int],
    stop: Sequence[str], sampling: Sampling,
) -> Drawn:  # fmt: skip
    """Cut a row at its end-of-text token and at the first stop string."""
    end = next((at for at, token in enumerate(ids) if token in ends), None)
    finish = "eos" if end is not None else "length"
    ids = ids[:end]
    text = decode(tokenizer, prompt, ids)
    cut = min((at for at in map(text.find, stop) if at >= 0), default=None)
    if cut is not None:
        finish, text = "stop", text[:cut]
        # The ids that lie wholly before the cut: the last one may hold the beginning of the stop string.
        kept = len(ids)
        while kept and not text.startswith(decode(tokenizer, prompt, ids[:kept])):
            kept -= 1
        ids = ids[:kept]
    return Drawn(text.strip(), ids, finish, sum(losses[: len(ids)]) / len(ids) if ids else None)
