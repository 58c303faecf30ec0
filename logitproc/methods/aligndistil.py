"""AlignDistil: extrapolate from a reverse-DPO model through a DPO model, further where the two disagree.

Zhang et al., "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation",
arXiv:2503.02832 (ACL 2025), a training method; `teacher` is the distribution that it distils from,
`distill_loss` its loss, and the processor samples from the teacher without training anything.

    log pi* = u log pi_anchor + a (log pi_plus - log pi_minus) + const
    a       = r TVD(pi_plus, pi_minus) + eps         the paper's coefficient; or a constant; or bounded in KL

The paper has anchor = plus = the DPO model, minus = the reverse DPO model (chosen and rejected swapped), u = 1.
The same line is DeRa (arXiv:2402.02992), proxy tuning and EFT (arXiv:2401.08565, 2310.12962), DExperts
(arXiv:2105.03023), contrastive decoding (arXiv:2210.15097, 2309.09117) and classifier-free guidance
(arXiv:2306.17806): see the table in `AlignDistilLogitsProcessor`.

Differs from the paper: used while decoding; the plausibility mask; `kl_cap`; any anchor. The released code
leaves out the 1/2 of the total variation: `tvd_units="code"`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from ..checks import in_range, one_of
from ..companion import Companion, tiny_companion
from ..ops import within_budget
from ..ops.dispatch import op
from ..processor import Processor
from ..registry import register

Coefficient = float | Literal["adaptive"]
FARTHEST = 1e4  # nats; a log-ratio beyond this is one, so that no multiple of it overflows

# --- math ---


def r_from_code_beta2(beta2: float) -> float:
    """The paper's r of the released code's `--beta2`, whose total variation lacks the 1/2: r = 2 beta2."""
    return 2 * beta2


@torch.no_grad()
def teacher(
    plus: Tensor,
    minus: Tensor,
    anchor: Tensor,
    *,
    coefficient: Coefficient = "adaptive",
    r: float = 1.0,
    eps: float = 1e-3,
    tvd_units: Literal["paper", "code"] = "paper",
    clamp: tuple[float, float] | None = None,
    kl_cap: float | None = None,
    plausibility: float = 0.0,
    anchor_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(log pi*, a): the teacher of the module's docstring and its coefficient, [..., V] and [...].

    Scores plus, minus, anchor [..., V], nats up to a constant a row: logits and log-probabilities give the
    same. Leading axes are any rows: [rows, V] while decoding, [sequences, tokens, V] in training.
    a = coefficient, or r TVD + eps for "adaptive", in [eps, r + eps]; then clamped; then lowered to where
    KL(pi* || pi_anchor) = kl_cap, the anchor being taken with its mask and weight.

    -inf: a token forbidden in anchor or plus is forbidden in pi*; one forbidden in minus alone has d = 0; the
    TVD is that of the tokens all three allow, renormalised. Tokens with pi_anchor < plausibility max pi_anchor
    are forbidden. A row with nothing left is log pi_anchor; one that was forbidden altogether stays so.
    """
    constant = None if coefficient == "adaptive" else coefficient
    r = 2 * r if tvd_units == "code" else r
    bounds = clamp or (-math.inf, math.inf)
    return extrapolated(plus, minus, anchor, constant, r, eps, bounds, kl_cap, plausibility, anchor_weight)


@op
def extrapolated(
    plus: Tensor, minus: Tensor, anchor: Tensor, constant: float | None, r: float, eps: float,
    clamp: tuple[float, float], kl_cap: float | None, plausibility: float, anchor_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `teacher`; constant None stands for "adaptive", r is in the paper's units."""
    # In place wherever a tensor is our own: at large V the allocations cost more than the arithmetic.
    allowed = plus > -torch.inf
    if anchor is not plus:
        allowed &= anchor > -torch.inf
    outside = (minus == -torch.inf).logical_or_(~allowed)
    p, q = (z.masked_fill(outside, -torch.inf).log_softmax(-1) for z in (plus, minus))
    d = (p - q).nan_to_num_(0.0).clamp_(-FARTHEST, FARTHEST)  # NaN outside the common tokens

    if constant is None:
        a = r * (p.exp_().sub_(q.exp_()).abs_().sum(-1).nan_to_num_(0.0) / 2) + eps  # r TVD + eps
    else:
        a = torch.full_like(d[..., 0], constant)
    a = a.clamp(*clamp)

    log_anchor = anchor.log_softmax(-1).nan_to_num_(-torch.inf, neginf=-torch.inf)  # rows without a token
    if plausibility:
        allowed &= log_anchor >= log_anchor.amax(-1, keepdim=True) + math.log(plausibility)
    base = (anchor_weight * log_anchor).masked_fill_(~allowed, -torch.inf)
    if kl_cap is not None:
        a = a * within_budget(base, a[..., None] * d, kl_cap)[..., 0]
    log_teacher = base.addcmul_(a[..., None], d).log_softmax(-1)
    return torch.where(allowed.any(-1, keepdim=True), log_teacher, log_anchor), a


def distill_loss(
    student: Tensor,
    log_teacher: Tensor,
    a: Tensor,
    beta0: float,
    mask: Tensor,
    length_norm: bool = True,
    beta_clip: float = math.inf,
) -> Tensor:
    """mean over sequences of (1/|y|) sum_t beta_t KL(pi_student || pi*), beta_t = beta0 / a_t; a scalar.

    Shapes: student logits and log_teacher [sequences, tokens, V]; a and mask (bool) [sequences, tokens]. The
    mask picks the positions that predict the |y| response tokens, end token included; what stands elsewhere
    may be anything. Reverse KL over the whole vocabulary: use a teacher without plausibility mask, or it is
    infinite. beta_t spans orders of magnitude; `beta_clip` bounds it. Without `length_norm` there is no 1/|y|.

    Differs from the released code, which leaves the first response token untrained: clear it in the mask.
    """
    row = mask.nonzero()[:, 0]
    log_q = student[mask].log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_teacher[mask])).sum(-1)
    loss = kl.new_zeros(len(mask)).index_add(0, row, kl * (beta0 / a[mask]).clamp(max=beta_clip))
    return (loss / mask.sum(-1) if length_norm else loss).mean()


# --- processor ---


@register("aligndistil", paper="arXiv:2503.02832")
@dataclass(eq=False)  # generate() drops a processor that equals an earlier one
class AlignDistilLogitsProcessor(Processor):
    """Push a model further along the direction from one companion to another, token by token.

    scores [rows, width] -> log pi* [rows, width], see the module's docstring and `teacher`. A model that is
    not given is the host, the model that generates. Published methods are settings, to be written after
    `--proc aligndistil:` or as keys in YAML:

        AlignDistil                      reverse=REVERSE                     the host is the DPO model
        ... on a larger model            dpo=DPO,reverse=REVERSE             the host is any base
        ... the host as reference        dpo=DPO,reverse=REVERSE,anchor=dpo  the host only forbids tokens
        Theorem 1, adaptive              dpo=DPO                             the host is the reference
        DeRa, lambda                     dpo=ALIGNED,coefficient=lambda      the host is the reference
        DeRa, lambda                     reverse=REFERENCE,coefficient=lambda-1      the host is aligned
        proxy tuning, EFT, weight w      dpo=EXPERT,reverse=BASE,coefficient=w
        DExperts, alpha                  dpo=EXPERT,reverse=ANTIEXPERT,coefficient=alpha,host_top_p=0.9
        contrastive decoding, lambda     reverse=AMATEUR,coefficient=lambda,anchor_weight=1-lambda,plausibility=0.1
        contrastive decoding, beta       reverse=AMATEUR,coefficient=beta,plausibility=0.1
        classifier-free guidance, gamma  reverse={model: HOST, prompt: OTHER},coefficient=gamma-1

    Parameters:
        reverse: the model to go away from.
        dpo: the model to go towards.
        anchor: "host" or "dpo", the distribution that is extrapolated.
        coefficient: "adaptive" for a = r TVD + eps, or the constant a.
        r, eps: of the adaptive coefficient; a lies in [eps, r + eps]. r = 1 was chosen by `eval/aligndistil.py`.
        tvd_units: "paper" has TVD in [0, 1], "code" in [0, 2]; `r_from_code_beta2` gives r for the former.
        clamp: (low, high) bounds of a.
        kl_cap: a is lowered to where one token moves the anchor by so many nats of KL(pi* || pi_anchor).
        plausibility: in [0, 1]; tokens with pi_anchor < plausibility max pi_anchor are forbidden, 0 for none:
            extrapolation multiplies the log-ratios of rare tokens, which are mostly noise.
        anchor_weight: u in [0, 1].
        host_top_p: the nucleus of the host that is kept before anything else.

    coefficient=0 alone returns the scores bit for bit. Raises ValueError for a parameter
    outside its range and when neither dpo nor reverse is given. Source: arXiv:2503.02832, eqs. (8) to (19).

    Cost per token: one forward of each companion, and a few passes over their scores. The coefficient depends
    on the tokens so far only, so beams, assisted decoding and batches of any kind are safe. Rounding of the
    companions' scores is amplified 1 + 2a times: for a large a load them as {model: NAME, dtype: float32}.

    Example:
        >>> import logitproc as lp
        >>> pair = {"dpo": "mini-dpo", "reverse": "mini-reverse-dpo"}
        >>> chain = lp.Chain.from_spec([{"name": "aligndistil", **pair}])  # for the host "base"
    """

    reverse: Companion | None = None
    dpo: Companion | None = None
    anchor: Literal["host", "dpo"] = "host"
    coefficient: Coefficient = "adaptive"
    r: float = 1.0
    eps: float = 1e-3
    tvd_units: Literal["paper", "code"] = "paper"
    clamp: tuple[float, float] | None = None
    kl_cap: float | None = None
    plausibility: float = 0.0
    anchor_weight: float = 1.0
    host_top_p: float = 1.0

    companions: ClassVar = ("reverse", "dpo")
    context = None

    def __post_init__(self) -> None:
        if self.reverse is None and self.dpo is None:
            raise ValueError("'aligndistil' needs reverse, dpo or both: --proc aligndistil:reverse=MODEL")
        for key in self.companions:
            if not isinstance(getattr(self, key), Companion | None):
                kind = type(getattr(self, key)).__name__
                raise ValueError(f"{key} must be a Companion (Companion.load(NAME)), got {kind}.")
        one_of("anchor", self.anchor, ("host", "dpo"))
        one_of("tvd_units", self.tvd_units, ("paper", "code"))
        if self.anchor == "dpo" and self.dpo is None:
            raise ValueError("anchor='dpo' needs the model dpo; without one the host is the DPO model.")
        if self.coefficient != "adaptive":
            in_range("coefficient ('adaptive' or a number)", self.coefficient, -FARTHEST, FARTHEST)
        in_range("r", self.r, 0, FARTHEST)
        in_range("eps", self.eps, 0, FARTHEST)
        in_range("plausibility", self.plausibility, 0, 1)
        in_range("anchor_weight", self.anchor_weight, 0, 1)
        in_range("host_top_p", self.host_top_p, 1e-6, 1)
        if not self.anchor_weight and not self.plausibility:
            raise ValueError("anchor_weight=0 needs plausibility above 0: nothing else would hold the text together.")
        if self.kl_cap is not None:
            in_range("kl_cap", self.kl_cap, 0, math.inf)
        if self.clamp is not None:
            if not isinstance(self.clamp, Sequence) or len(self.clamp) != 2:
                raise ValueError(f"clamp must be (low, high), got {self.clamp!r}.")
            low, high = self.clamp
            self.clamp = (low, high)
            in_range("clamp (low)", low, -FARTHEST, FARTHEST)
            in_range("clamp (high)", high, low, FARTHEST)
        self._neutral = (
            self.coefficient == 0 and self.clamp is None and self.anchor == "host" and self.anchor_weight == 1
            and not self.plausibility and self.host_top_p == 1
        )  # fmt: skip

    @classmethod
    def example(cls, width: int) -> Self:
        return cls(tiny_companion(width), coefficient=0.5)

    @classmethod
    def neutral(cls, width: int) -> Self:
        return cls(tiny_companion(width), coefficient=0.0)

    @classmethod
    def variants(cls, width: int) -> dict[str, Processor]:
        one, two = tiny_companion(width), tiny_companion(width, seed=1)
        return {
            "adaptive": cls(one, tvd_units="code", clamp=(0.1, 1.5)),
            "anchor dpo": cls(one, two, anchor="dpo", r=2.0, plausibility=0.1),
            "weak to strong": cls(one, two, coefficient=1.0, host_top_p=0.9),
            "reference": cls(dpo=two, kl_cap=0.2),
            "contrastive": cls(one, coefficient=1.0, anchor_weight=0.0, plausibility=0.1),
        }

    def step(self, tokens: Tensor, scores: Tensor, *companion_scores: Tensor) -> Tensor:
        if self._neutral:
            return scores
        if self.host_top_p < 1:
            scores = TopPLogitsWarper(self.host_top_p)(tokens, scores)
        models = iter(companion_scores)
        minus = scores if self.reverse is None else next(models)
        plus = scores if self.dpo is None else next(models)
        anchor = scores
        if self.anchor == "dpo":
            anchor = torch.where(scores > -torch.inf, plus, -torch.inf)
            anchor = torch.where((anchor > -torch.inf).any(-1, keepdim=True), anchor, scores)
        return teacher(
            plus, minus, anchor, coefficient=self.coefficient, r=self.r, eps=self.eps, tvd_units=self.tvd_units,
            clamp=self.clamp, kl_cap=self.kl_cap, plausibility=self.plausibility, anchor_weight=self.anchor_weight,
        )[0]  # fmt: skip
