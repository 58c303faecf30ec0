"""What a fit knows of a model and a text: hidden states before the head, and statistics of its predictions."""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..artifact import describe_tokenizer
from ..corpus import documents
from .attachment import check_finite, mounted, own_head, softcap_of
from .clustering import Progress, Report
from .floors import tie_floor, tie_floor_min
from .head import fingerprint, softcapped

_ELEMENTS = 1 << 24  # scores held at once
_SMOOTHING = 0.1  # eps of p~ = (1 - eps) p + eps / V
_RIDGE = 1e-6  # of the mean variance, so that unseen directions count a little


@dataclass(frozen=True, eq=False)
class Calibration:
    """Hidden states of a text and the head that reads them.

    weight      [V, d], the model's own rows, not copied
    bias        [V] or None
    states      [T, d], what the head receives, in the model's dtype
    labels      [T] int64, the token that follows
    tokenizer   as `describe_tokenizer` gives it
    softcap     the cap of a model that soft-caps its head's logits, or None
    text        SHA-256 of the token ids, to tell calibration from evaluation text
    """

    weight: Tensor
    bias: Tensor | None
    states: Tensor
    labels: Tensor
    tokenizer: dict[str, Any]
    softcap: float | None = None
    text: str = ""

    @classmethod
    @torch.no_grad()
    def collect(
        cls,
        model: Any,
        texts: str | Path | Iterable[str],
        tokenizer: Any = None,
        *,
        tokens: int = 1 << 16,
        context: int = 256,
        batch_size: int = 8,
        report: Report | None = None,
    ) -> Self:
        """Read up to `tokens` tokens in pieces of `context`; texts as `logitproc.corpus.documents` takes them.

        Documents are joined, so a piece may hold the end of one and the start of the next. Without
        `tokenizer`, that of `model.name_or_path` is loaded. Memory: tokens * d numbers in the model's dtype.

        Raises ValueError when the text has less than one piece, the head has NaN or infinite weights, or the
        model changes its logits after the head otherwise than by soft-capping them.
        """
        own = own_head(model)
        check_finite(own)
        weight, bias = own.weight.detach(), None if own.bias is None else own.bias.detach()
        softcap = softcap_of(model)
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
        pieces = list(_pieces(documents(texts), tokenizer, context, -(-tokens // context)))
        if not pieces:
            raise ValueError(f"The calibration text is too short: it has fewer than {context + 1} tokens.")
        ids = torch.tensor(pieces)
        states = []
        with mounted(model, _Capture()) as capture:
            for done, batch in enumerate(ids[:, :-1].split(batch_size)):
                model(input_ids=batch.to(model.device), use_cache=False)
                states.append(capture.seen)
                if report is not None:
                    report(Progress("reading", done * batch_size + len(batch), len(ids), {}))
        digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        labels = ids[:, 1:].reshape(-1)
        return cls(weight, bias, torch.cat(states), labels, describe_tokenizer(tokenizer), softcap, digest)

    @property
    def source(self) -> str:
        return fingerprint(self.weight)

    @functools.cached_property
    def parts(self) -> tuple["Calibration", "Calibration"]:
        """`split()`, once: heads fitted to the same reading share its statistics."""
        return self.split()

    @functools.cached_property
    def statistics(self) -> "Statistics":
        """`Statistics.of(self)`, once."""
        return Statistics.of(self)

    def split(self, share: float = 0.1) -> tuple["Calibration", "Calibration"]:
        """(the first states, the last ones): to fit, and to judge what was fitted."""
        cut = len(self.states) - max(1, int(share * len(self.states)))
        part = lambda at: replace(self, states=self.states[at], labels=self.labels[at])
        return part(slice(cut)), part(slice(cut, None))

    def first(self, states: int) -> "Calibration":
        return replace(self, states=self.states[:states], labels=self.labels[:states])

    def logits(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(states [b, d], labels [b], float32 logits of the model [b, V]) in blocks that fit in memory.

        Logits are float64 for float64 states.
        """
        size = max(1, _ELEMENTS // len(self.weight))
        for states, labels in zip(self.states.split(size), self.labels.split(size), strict=True):
            logits = self.seen(nn.functional.linear(states, self.weight, self.bias))
            yield states, labels, logits if logits.dtype is torch.float64 else logits.float()

    def seen(self, logits: Tensor) -> Tensor:
        """What the model makes of the logits of a head."""
        return softcapped(logits, self.softcap)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over T states, float64; two of them add up to those of both texts.

    With p the dense prediction and p~ = 0.9 p + 0.1 / V: `count` T, `states` sum h [d], `products` sum h h^T
    [d, d], `mass` sum p [V], `curvatures` sum p~ (1 - p~) [V], `tokens` how often each was the next [V].
    """

    count: int
    states: Tensor
    products: Tensor
    mass: Tensor
    curvatures: Tensor
    tokens: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, calibration: Calibration) -> Self:
        width, d = calibration.weight.shape
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=calibration.weight.device)
        count, states, products = 0, zeros(d), zeros(d, d)
        mass, curvatures, tokens = zeros(width), zeros(width), zeros(width)
        for h, labels, logits in calibration.logits():
            h = h if h.dtype is torch.float64 else h.float()
            p = logits.softmax(-1)
            smooth = p * (1 - _SMOOTHING) + _SMOOTHING / width
            count += len(h)
            states += h.double().sum(0)
            products += (h.T @ h).double()
            mass += p.double().sum(0)
            curvatures += (smooth * (1 - smooth)).double().sum(0)
            tokens += torch.bincount(labels, minlength=width).to(tokens)
        return cls(count, states, products, mass, curvatures, tokens)

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(*(getattr(self, key) + getattr(other, key) for key in self.__dataclass_fields__))

    @property
    def mean(self) -> Tensor:
        """mu = E[h], [d]."""
        return self.states / self.count

    @property
    def probability(self) -> Tensor:
        """pbar_v = E[p_v(h)], [V], at least 1e-12."""
        return (self.mass / self.count).clamp(min=1e-12)

    @property
    def curvature(self) -> Tensor:
        """lambda_v = E[p~_v (1 - p~_v)], [V]: how much an error of a token's logit costs, to second order."""
        return self.curvatures / self.count

    @property
    def root(self) -> Tensor:
        """L [d, d] with L L^T = Cov(h) plus a small ridge: ||L^T (w - c)||^2 is the variance of (w - c) . h.

        The specification of the method takes the symmetric root; distances, and so clusters, are the same.
        """
        covariance = self.products / self.count - torch.outer(self.mean, self.mean)
        scale = covariance.diagonal().mean().clamp(min=1e-12)
        ridge = _RIDGE
        while True:  # rounding may leave a covariance of few states a little indefinite
            shifted = covariance + ridge * scale * torch.eye(len(covariance), dtype=torch.float64).to(
                covariance
            )
            root, failed = torch.linalg.cholesky_ex(shifted)
            if not failed:
                return root
            ridge *= 10


class Floors(NamedTuple):
    """The check before any training, nats per token. With a frozen model, no codes are better than these allow."""

    codes: int
    minimum: float  # tie_floor_min(pbar, K): what any mapping must pay, as a part of its cross-entropy
    floor: float  # E[ln n(v)] under pbar
    floor_labels: float  # E[ln n(v)] over the tokens of the text
    within: float  # CE_within(dense): what the dense model itself loses inside the codes
    information: float  # I(V; H | K): the KL to dense that a head with the best constant bias must pay

    @classmethod
    @torch.no_grad()
    def of(cls, calibration: Calibration, statistics: Statistics, mapping: Tensor) -> Self:
        mapping = mapping.long().to(calibration.weight.device)
        codes = int(mapping.max()) + 1
        pbar, tokens = statistics.probability, statistics.tokens
        pi = pbar / codes_sum(pbar, mapping, codes)[mapping]
        within = information = 0.0
        for _, labels, logits in calibration.logits():
            log_p = logits.double().log_softmax(-1)
            p = log_p.exp()
            inside = log_p - codes_sum(p, mapping, codes).clamp(min=1e-300).log()[:, mapping]
            information += float((p * (inside - pi.log())).sum())
            within -= float(inside.gather(1, labels[:, None].to(inside.device)).sum())
        count = len(calibration.states)
        return cls(
            codes, tie_floor_min(pbar / pbar.sum(), codes), tie_floor(pbar / pbar.sum(), mapping),
            tie_floor(tokens / tokens.sum(), mapping), within / count, information / count,
        )  # fmt: skip


def codes_sum(values: Tensor, mapping: Tensor, codes: int) -> Tensor:
    """The sum of `values` [..., V] over the tokens of each code, [..., codes]."""
    total = torch.zeros(*values.shape[:-1], codes, dtype=values.dtype, device=values.device)
    return total.scatter_add_(-1, mapping.expand_as(values), values)


class _Capture(nn.Module):
    """Stands where the head is and keeps what it is given."""

    seen: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden.detach().flatten(0, -2)
        return hidden[..., :1]


def _pieces(texts: Iterable[str], tokenizer: Any, context: int, limit: int) -> Iterator[list[int]]:
    """At most `limit` pieces of context + 1 ids; each begins with the last id of the one before."""
    held: list[int] = []
    for text in texts:
        held += tokenizer(text, verbose=False)["input_ids"]
        while len(held) > context:
            if limit == 0:
                return
            yield held[: context + 1]
            held, limit = held[context:], limit - 1
