"""VQ preview: show what a compressed output head would make of a model, without converting it.

Shao et al., "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits",
arXiv:2505.10202 (2025). Codes that are weighted means of rows give weighted means of logits:

    c_k = sum omega_v w_v / sum omega_v   =>   c_k . h = sum omega_v z_v / sum omega_v      over the tokens v of k

so the logits of the head follow from those of the dense model:

    z'_v = (mean of z over the tokens of the code of v, weighted by omega) + b_v

Nothing gets faster: that needs the head itself, `lp.attach` or `lp.convert`. Differs from the paper, which knows no
such view; omega = 1 and b = 0 are its head.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..checks import in_range
from ..heads import KINDS, VQHead
from ..ops.dispatch import op
from ..processor import Processor
from ..registry import register


@op
def share_logits(scores: Tensor, mapping: Tensor, weights: Tensor, codes: int, bias: Tensor | None = None) -> Tensor:
    """Each score replaced by the weighted mean over its code, plus the bias of its token: scores [rows, width].

    mapping int32, weights and bias [V]; scores of tokens that they do not hold stay, and so does -inf, which is left
    out of the mean. A code of one token keeps its score, bit for bit, up to the bias.
    """
    given, rest = scores[:, : len(mapping)], scores[:, len(mapping) :]
    finite, index = given > -torch.inf, mapping[: given.shape[1]].long().expand_as(given)
    sums = lambda values: torch.zeros_like(given[:, :1]).expand(-1, codes).scatter_add(1, index, values)
    weights = weights[: given.shape[1]].to(scores.dtype)
    share = torch.where(finite, weights, 0.0)
    total = sums(share).gather(1, index)
    # Relative to the largest score of the row: what is added up is then no larger than differences of scores.
    top = given.amax(1, keepdim=True).nan_to_num(neginf=0.0)
    mean = sums(torch.where(finite, weights * (given - top), 0.0)).gather(1, index) / total
    alone = total == share  # nothing else in the code has a say
    out = torch.where(finite & ~alone, mean + top, given)
    if bias is not None:
        out += bias[: given.shape[1]]
    return torch.cat([out, rest], 1)


@register("vq", paper="arXiv:2505.10202")
@dataclass(eq=False)
class VQLogitsProcessor(Processor):
    """Preview of a compressed output head: the tokens of a code share their logit.

    scores [rows, width] -> scores [rows, width].

    head       a `VQHead` of kind `paper` or `weighted`, or the folder it was saved in (`logitproc fit vq`)
    softcap    the model's final soft-capping c, logits = c tanh(z / c), as Gemma-2 has it: undone before the mean and
               applied again after it; None for none

    The result is what the head returns, up to rounding, where the scores are the model's raw logits or differ from
    them by a constant: put it first, and use no penalty beside it (transformers applies those of its config before).
    A head over more tokens than the scores have is cut; scores beyond its tokens are left alone. A code with a
    forbidden token (-inf) has the mean of its others.

    Raises ValueError for kinds whose codes are no means of rows: distilled, tiebreak, residual.

    Example:
        >>> import logitproc as lp
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained(lp.pocket("mini"))
        >>> head = lp.VQHead.fit(model, ["It was a dark and stormy night. " * 60], codes=32)
        >>> chain = lp.Chain([lp.VQLogitsProcessor(head)])
    """

    head: VQHead
    softcap: float | None = None

    context = 0
    artifacts = {"head": VQHead}

    def __post_init__(self) -> None:
        if self.head.token_weights is None:
            previewed = "paper or weighted"
            raise ValueError(
                f"A head of kind {self.head.kind!r} has no preview: its codes are no means of rows. Take {previewed}, "
                "or the head itself: lp.attach(model, head)."
            )
        if self.softcap is not None:
            in_range("softcap", self.softcap, 1e-3, math.inf)
        self._mapping, self._weights = self.head.mapping[0], self.head.token_weights
        self._bias = self.head.token_bias
        if not 0 <= int(self._mapping.min()) <= int(self._mapping.max()) < len(self.head.codes):
            raise ValueError(f"The head maps tokens to codes that it does not have: it has {len(self.head.codes)}.")

    def step(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """scores [rows, width] float32 -> the head's logits [rows, width]."""
        self._to(scores.device)
        tables = (self._mapping, self._weights, len(self.head.codes), self._bias)
        if self.softcap is None:
            return share_logits(scores, *tables)
        given = scores[:, : len(self._mapping)]
        out = share_logits(uncapped(given, self.softcap), *tables)
        out = torch.where(given > -torch.inf, self.softcap * (out / self.softcap).tanh(), given)
        return torch.cat([out, scores[:, len(self._mapping) :]], 1)

    def _to(self, device: torch.device) -> None:
        if self._mapping.device != device:  # once; later calls cost nothing
            self._mapping, self._weights = self._mapping.to(device), self._weights.to(device)
            self._bias = None if self._bias is None else self._bias.to(device)

    @classmethod
    def example(cls, width: int) -> Self:
        return cls(example_head(width, "weighted", codes=max(1, width // 3)))

    @classmethod
    def neutral(cls, width: int) -> Self:
        return cls(example_head(width, "paper", codes=width))

    @classmethod
    def variants(cls, width: int) -> dict[str, Processor]:
        return {"example": cls.example(width), "paper": cls(example_head(width, "paper", codes=max(1, width // 2)))}


def uncapped(scores: Tensor, cap: float) -> Tensor:
    """z of scores = cap tanh(z / cap); a score at the cap, which rounding may reach, is taken a little below it."""
    return torch.where(
        scores > -torch.inf, cap * torch.atanh((scores / cap).clamp(-1 + 1e-6, 1 - 1e-6)), -torch.inf
    )


def example_head(width: int, kind: str, codes: int) -> VQHead:
    """A head of so many codes over random groups of tokens; what its codes are does not matter here."""
    random = torch.Generator().manual_seed(width)
    mapping = torch.arange(width) if codes == width else torch.randint(0, codes, (width,), generator=random)
    mapping[:codes] = torch.arange(codes)
    bias = torch.randn(width, generator=random) if kind == "weighted" else None
    head: VQHead = KINDS[kind].build(torch.zeros(codes, 1), mapping, bias)  # type: ignore[attr-defined]
    head.token_weights, head.token_bias = torch.rand(width, generator=random) + 0.1, bias
    head.tokenizer = {"vocab_size": width, "fingerprint": "example", "name": "example"}
    return head
