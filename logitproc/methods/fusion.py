"""Logit fusion: move a large model as far as a small one was moved by fine-tuning, or weigh the candidates.

Fan et al., "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion", arXiv:2406.15480 (2024);
Liu et al., "Tuning Language Models by Proxy", arXiv:2401.08565 (`mode="static"`); Mitchell et al., "An Emulator for
Fine-Tuning Large Language Models using Small Language Models", arXiv:2310.12962 (`mode="upscale"`). With the host's
scores z, the small base's z_S and the small experts' z_t,

    d_t = z_t - z_S        z' = z + sum over t of alpha_t d_t        P, Q, Q_t, P' = softmax of z, z_S, z_t, z'
    c1_t = KL(Q_t || Q)    c2_t = KL(Q || Q_t)      R = KL(P' || P)      F = KL(P || P')      J = R + F

    static   alpha as given
    upscale  z' = z_t + beta (z - z_S): the expert, moved as the large model moves the small one
    grid     argmin (R - c1)^2 + (F - c2)^2 over alpha = 0, .1, ..., 2: the paper's rule, section 3.1
    newton   R = c1, F = c2 or J = c1 + c2, a root; or, target L, what grid minimises, at its minimum
    select   the paper's rule for several experts: the grid of each against the mean of the c_t, best one acts
    match    argmin KL(sum over t of w_t Q_t || P'), convex ("level"); or mean of d shifted as it was ("shift")
    mixture  z' = ln sum over j of w_j P_j, components P, upscaled experts and static fusions, w_j by how well each
             predicted the text so far: on given text, with share 0, the loss is at most that of the best component
             plus ln M nats

`static` with alpha from 0 to 1 and then `upscale` with beta from 1 to 0 is a path from the host to the expert.

Differs from the papers: alpha is solved for anew at every step (read literally, the printed loop freezes it);
temperature acts after fusion; everything but `static`, `grid` and `select`, and `upscale` with a beta other than 1.
The mixture is Vovk's and Cover's;
its fixed share is Herbster and Warmuth, "Tracking the Best Expert", Machine Learning 32 (1998).
"""

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from .. import tilt
from ..checks import in_range, one_of
from ..companion import Companion, tiny_companion
from ..ops import plausible, within_budget
from ..ops.dispatch import op
from ..processor import Processor
from ..registry import register

Mode = Literal["static", "upscale", "grid", "newton", "select", "match", "mixture"]
Target = Literal["R", "F", "J", "L"]
Kind = Literal["level", "shift"]
FORBIDDEN = -1e30  # a score below it is a mask, whatever finite number a model uses for one
DEAD = 1e-6  # nats; an expert closer to its base than this says nothing
GRID = 10  # points a unit
UPSCALE = 0.3  # beta: what suits both pairs of models of `eval/fusion.py`, on its dev documents
CACHED = 1 << 21  # scores; on a CPU, rows are solved so many at a time


# --- math ---


class Fusion(NamedTuple):
    """Fused scores and how they came about; T experts."""

    scores: Tensor  # [rows, V]
    alpha: Tensor  # [rows, T]
    kl: Tensor  # [rows, T], c1 = KL(Q_t || Q)
    reverse_kl: Tensor  # [rows, T], c2 = KL(Q || Q_t)
    beyond: Tensor  # bool [rows]: the root lies beyond the bound
    dead: Tensor  # bool [rows, T]: the expert equals its base here


class Shifts(NamedTuple):
    """d on the tokens that host, base and all experts allow, less its value at the host's first choice; 0 elsewhere."""

    d: Tensor  # [rows, T, V]
    first: Tensor  # int64 [rows, 1], the host's first choice among these tokens
    inside: Tensor | None  # bool [rows, V]; None when all tokens are
    blocked: Tensor | None  # bool [rows, T, V]: forbidden by expert t


class Divergences(NamedTuple):
    """What the solvers aim at; distributions renormalised on the common support."""

    variance: Tensor  # [rows, T], of d_t under P
    expert_mean: Tensor  # [rows, T, T], E_{Q_s} d_t
    base_mean: Tensor  # [rows, T], E_Q d_t
    kl: Tensor  # [rows, T], c1 = KL(Q_t || Q)
    reverse_kl: Tensor  # [rows, T], c2 = KL(Q || Q_t)
    change: Tensor  # [rows, T], c1 + c2 = E_{Q_t} d_t - E_Q d_t, without their cancellation


def fuse(host: Tensor, base: Tensor, experts: Sequence[Tensor], mode: Mode = "newton", *,
         target: Target = "J", bounds: Sequence[tuple[float, float]] = ((0.0, 2.0),),
         kind: Kind = "level", weights: Tensor | None = None, ridge: float = 1e-3, centre: float = 0.0,
         steps: int | None = None) -> Fusion:  # fmt: skip
    """Solve for one alpha an expert and row, and fuse; every mode but `static`, `upscale` and `mixture`.

    Shapes: host, base and each expert [rows, V], float32 or float64, where -inf or less than -1e30 forbids a
    token; weights [rows, T], of the experts in `match`, equal if left out. bounds has one (low, high), or one an
    expert. grid and newton take one expert. ridge and centre as in `tilt.match`; steps, at most, of newton (12) and
    match (32), where rows that are done stop.

    A constant added to a row of any input changes no softmax. Tokens are compared on the common support. A row
    with alpha 0 is the host's, bit for bit: so is one whose experts equal the base (up to a constant), and one
    without a token that all allow. What the host forbids, or an expert with another alpha, is forbidden; where
    only the base forbids, d is 0.
    """
    if mode == "grid" or (mode == "newton" and target != "L"):
        points = _points(*bounds[0]) if mode == "grid" else None
        return Fusion(*fuse_one(host, base, experts[0], points, target, *bounds[0], steps or 12))
    if weights is None:
        weights = _columns([1 / len(experts)] * len(experts), host)
    if mode == "match":
        return Fusion(*fuse_match(host, base, experts, weights, bounds, kind, ridge, centre, steps or 32))
    return _fuse(host, base, experts, weights, mode, target, bounds, kind, ridge, centre, steps or 12)


@op
def fuse_one(
    host: Tensor, base: Tensor, expert: Tensor, points: range | None, target: Target, low: float, high: float,
    steps: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of `Fusion`, by "grid" over k / 10 for k in `points`, or where these are None by "newton"."""
    mode, weights = "newton" if points is None else "grid", torch.ones_like(host[:, :1])
    return _fuse(host, base, [expert], weights, mode, target, [(low, high)], "level", 0.0, 0.0, steps)


@op
def fuse_match(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], weights: Tensor, bounds: Sequence[tuple[float, float]],
    kind: Kind, ridge: float, centre: float, steps: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of `Fusion`, by "match"."""
    return _fuse(host, base, experts, weights, "match", "J", bounds, kind, ridge, centre, steps)


def _fuse(host: Tensor, base: Tensor, experts: Sequence[Tensor], weights: Tensor, *options: Any) -> Fusion:
    """On a CPU so many rows at once as stay in its caches."""
    on_cpu = host.device.type == "cpu"
    rows = max(1, torch.get_num_threads() * CACHED // host.shape[1] if on_cpu else len(host))
    parts = [
        _solve(host[i], base[i], [e[i] for e in experts], weights[i], *options)
        for i in (slice(start, start + rows) for start in range(0, max(1, len(host)), rows))
    ]
    return parts[0] if len(parts) == 1 else Fusion(*map(torch.cat, zip(*parts, strict=True)))


def _solve(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], weights: Tensor, mode: Mode, target: Target,
    bounds: Sequence[tuple[float, float]], kind: Kind, ridge: float, centre: float, steps: int,
) -> Fusion:  # fmt: skip
    s = shifts(host, base, experts)
    family, c = _measure(host, base, experts, s)
    rows, count = c.kl.shape
    bounds = list(bounds) * (count if len(bounds) == 1 else 1)
    beyond = torch.zeros(rows, dtype=torch.bool, device=host.device)
    dead = ~((c.change >= DEAD) & (c.variance > 0))  # true for NaN: a row without a common token
    if mode == "newton":
        low, high = bounds[0]
        if target == "L":
            a = tilt.least(family, c.kl[:, 0], c.reverse_kl[:, 0], low, high, _points(low, high), steps)
        else:
            goal = {"R": c.kl, "F": c.reverse_kl, "J": c.change}[target][:, 0].clamp(min=0)
            a, beyond = tilt.root(family, c.variance[:, 0], goal, target, high, steps)
        a = a.clamp(min=low)[:, None]
    elif mode == "match":
        goal = (weights[:, None].to(family.d) @ c.expert_mean.to(family.d)).squeeze(1)
        if kind == "shift":
            goal = goal + family.mean - c.base_mean
        low_side, high_side = (_columns(side, goal) for side in zip(*bounds, strict=True))
        a = tilt.match(family, goal, low_side, high_side, ridge, centre, steps)
    else:  # grid; for several experts select: each on its grid against the mean of the divergences, the best acts
        kl, reverse_kl = c.kl.mean(1), c.reverse_kl.mean(1)
        found = [tilt.grid(family.one(t), kl, reverse_kl, _points(*bounds[t])) for t in range(count)]
        best, loss = torch.stack([a for a, _ in found], 1), torch.stack([loss for _, loss in found], 1)
        a = best * torch.nn.functional.one_hot(loss.argmin(1), count)
    a = torch.where(dead, 0.0, a)
    return Fusion(shift(host, s, a), a, c.kl, c.reverse_kl, beyond & ~dead[:, 0], dead)


def shifts(host: Tensor, base: Tensor, experts: Sequence[Tensor]) -> Shifts:
    """See `fuse` for the shapes."""
    allowed = (torch.stack([x.amin(-1) for x in (host, base, *experts)]) > FORBIDDEN).all()  # false for NaN
    inside = blocked = None
    if host.device.type != "cpu" or not bool(allowed):
        blocked = torch.stack([~(e > FORBIDDEN) for e in experts], 1)
        inside = (host > FORBIDDEN) & (base > FORBIDDEN) & ~blocked.any(1)
        host = host.masked_fill(~inside, -torch.inf)
    first = host.max(-1, keepdim=True).indices
    d = torch.empty(len(host), len(experts), host.shape[1], dtype=host.dtype, device=host.device)
    for t, expert in enumerate(experts):
        reference = expert.gather(-1, first) - base.gather(-1, first)
        for block in tilt.blocks(host):
            torch.sub(expert[:, block], base[:, block], out=d[:, t, block]).sub_(reference)
    return Shifts(d if inside is None else d.masked_fill_(~inside[:, None], 0.0), first, inside, blocked)


def shift(host: Tensor, s: Shifts, alpha: Tensor) -> Tensor:
    """host + sum over t of alpha_t d_t, where no expert with alpha_t other than 0 forbids; alpha [rows, T]."""
    if s.d.shape[1] == 1:
        out = torch.addcmul(host, s.d[:, 0], alpha)
    else:
        out = torch.baddbmm(host[:, None], alpha[:, None], s.d).squeeze(1)
    if s.blocked is None or s.inside is None:
        return out
    forbidden = (s.blocked & (alpha != 0)[:, :, None]).any(1)
    out = out.masked_fill(forbidden, -torch.inf)
    return torch.where(s.inside.any(-1, keepdim=True), out, host)


def _measure(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], s: Shifts
) -> tuple[tilt.Family, Divergences]:
    """The host's tilts, and how far each expert lies from the base."""
    if s.inside is not None:
        host, base, *experts = (x.masked_fill(~s.inside, -torch.inf) for x in (host, base, *experts))
    log_w = host - host.gather(-1, s.first)
    p, q = tilt.moments(log_w, s.d), tilt.moments(base, s.d)
    own = [tilt.moments(expert, s.d) for expert in experts]
    # d is 0 at `first`, where ln q_t - ln q is then less than d_t by ln E_Q exp d_t.
    log_q = lambda scores, m: scores.gather(-1, s.first).squeeze(-1) - m.log_z
    ratio = torch.stack([log_q(base, q) - log_q(e, m) for e, m in zip(experts, own, strict=True)], 1)
    expert_mean = torch.stack([m.mean for m in own], 1)
    expert_own = expert_mean.diagonal(dim1=1, dim2=2)
    c = Divergences(p.variance, expert_mean, q.mean, (expert_own - ratio).clamp(min=0),
                    (ratio - q.mean).clamp(min=0), expert_own - q.mean)  # fmt: skip
    return tilt.Family(log_w, p.log_z, s.d, p.mean), c


def _columns(values: Sequence[float], like: Tensor) -> Tensor:
    """[rows, len(values)], made where `like` is: a copy from the host would wait for the device."""
    return torch.cat([like.new_full((len(like), 1), value) for value in values], 1)


def _points(low: float, high: float) -> range:
    """k such that k / 10 lies in [low, high]."""
    return range(math.ceil(low * GRID - 1e-9), math.floor(high * GRID + 1e-9) + 1)


# --- mixture ---


def upscaled(host: Tensor, base: Tensor, expert: Tensor, betas: Sequence[float]) -> list[Tensor]:
    """expert + beta (host - base) for each beta, [rows, V]; beta = 0 is the expert and beta = 1 static fusion.

    What the host or the expert forbids is forbidden; where only the base forbids, host - base counts as 0. A row
    of which nothing is left is the host's.
    """
    s = shifts(expert, base, [host])
    found = [shift(expert, s, torch.full_like(host[:, :1], beta)) for beta in betas]
    if s.inside is None:
        return found
    common = (host > FORBIDDEN) & (expert > FORBIDDEN)
    left = common.any(-1, keepdim=True)
    return [torch.where(left, out.masked_fill(~common, -torch.inf), host) for out in found]


def candidates(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], alphas: Sequence[float], betas: Sequence[float]
) -> list[Tensor]:
    """The components of a mixture, [rows, V] scores each: host, each expert upscaled, each expert fused.

    What the host forbids is forbidden in all.
    """
    found = [host]
    for expert in experts:
        found += upscaled(host, base, expert, betas)
    for expert in experts if alphas else ():
        s = shifts(host, base, [expert])
        found += [shift(host, s, torch.full_like(host[:, :1], alpha)) for alpha in alphas]
    return found


def mix(components: Sequence[Tensor], log_weights: Tensor) -> Tensor:
    """ln sum over j of w_j softmax(component_j), [rows, V]; components [rows, V], log_weights [rows, M].

    One component is returned as it came. A row of -inf stays one.
    """
    if len(components) == 1:
        return components[0]
    log_w = log_weights.log_softmax(-1)
    out = components[0].log_softmax(-1).add_(log_w[:, :1])
    for j, scores in enumerate(components[1:], 1):
        out = torch.logaddexp(out, scores.log_softmax(-1).add_(log_w[:, j : j + 1]))
    return out.nan_to_num_(nan=-torch.inf, neginf=-torch.inf)


@op
def mixture(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], alphas: Sequence[float], betas: Sequence[float],
    log_weights: Tensor,
) -> Tensor:  # fmt: skip
    """`mix` of the `candidates`."""
    return mix(candidates(host, base, experts, alphas, betas), log_weights)


@op
def log_likelihoods(
    host: Tensor, base: Tensor, experts: Sequence[Tensor], alphas: Sequence[float], betas: Sequence[float],
    tokens: Tensor,
) -> Tensor:  # fmt: skip
    """ln of what each of the `candidates` gave a token, [rows, M]; tokens int64 [rows]. 0 in a row without a token."""
    return likelihoods(candidates(host, base, experts, alphas, betas), tokens)


def likelihoods(components: Sequence[Tensor], tokens: Tensor) -> Tensor:
    found = [c.log_softmax(-1).gather(-1, tokens[:, None]) for c in components]
    return torch.cat(found, 1).nan_to_num(nan=0.0, neginf=-torch.inf)


def updated(log_weights: Tensor, log_likelihood: Tensor, share: float) -> Tensor:
    """Weights after a token: w_j ~ w_j pi_j(token), then w_j = (1 - share) w_j + share / M; ln, [rows, M].

    log_likelihood [rows, M] holds ln pi_j(token). A component that gave the token probability 0 has weight 0, and
    with a share recovers. A token that no component thought possible makes all weights equal.
    """
    count = log_weights.shape[1]
    log_w = (log_weights + log_likelihood).log_softmax(-1).nan_to_num(nan=-math.log(count), neginf=-torch.inf)
    if not share:
        return log_w
    even = torch.full_like(log_w, math.log(share / count))
    return torch.logaddexp(log_w + math.log1p(-share), even)


# --- processor ---


@register("fusion", paper="arXiv:2406.15480")
@dataclass(eq=False)  # generate() drops a processor that equals an earlier one
class DynamicFusionLogitsProcessor(Processor):
    """Give a large model what small ones learned, with no training: proxy tuning, dynamic fusion, Bayes mixture.

    scores [rows, width] -> z' [rows, width], nats, with the scores of a small base model and of one or more
    experts fine-tuned from it, all of one tokenizer; equations in the module's docstring. The host is whatever
    the scores say, so it includes earlier processors; temperature and top-p act on the result. Models are
    `Companion`s, or in a chain file their folders or names.

    Parameters:
        expert: the fine-tuned small model, or a sequence of them.
        base: the small model before fine-tuning.
        mode: "static", "upscale", "grid", "newton", "select", "match" or "mixture", the default. "upscale", "grid"
            and "newton" take one expert; "select" is "grid" for several.
        target: which divergence "newton" makes equal, "R", "F" or "J"; or "L", for the loss of "grid" at its minimum.
        alpha: of "static", a number or one an expert, 1 by default; of "mixture", the static fusions that take
            part, none by default.
        beta: of "upscale", a number, 0.3 by default; of "mixture", a number or several, the upscaled experts that
            take part, 0.3 by default; 0 is the expert itself.
        bounds: (low, high) of alpha, or one pair an expert; not for "static" and "mixture".
        kind: "level" or "shift", for "match".
        weights: of the experts in "match": "uniform", "evidence", or a number each.
        ridge, centre: of "match", rho / 2 |alpha - centre|^2.
        kl_budget: bound on KL(P', P) in nats; z' is moved towards z until it holds.
        plausibility: in [0, 1]; tokens with p < plausibility max p are forbidden, after everything else.
        evidence_from: the tokens that "mixture" and weights "evidence" learn from: "given", which are the prompt,
            and all tokens of a text that is scored; "all", also those that the chain draws itself; or "none".
            The small base stands in for the host on tokens of a prompt, which the host's scores do not reach.
            Tokens sampled from the mixture leave the expected weights as they are and only make them vary: without
            them it comes nearer to a fine-tuned host (eval/RESULTS.md).
        share: in [0, 0.1], of the weight that is spread evenly after every token. With 0 the loss of "mixture" on
            a text is at most that of its best component plus ln M nats, M = 1 + T (len(beta) + len(alpha)).

    Raises ValueError for a parameter outside its range, for alpha or beta of another mode, and for another number of
    experts than the mode takes. Source:
    arXiv:2406.15480, section 3 ("grid", "select"); arXiv:2401.08565 ("static"); arXiv:2310.12962 ("upscale").

    Where all alpha are 0 the scores are returned bit for bit. Beams are safe. Evidence cannot be
    rolled back: assisted decoding is refused with it.

    Example:
        >>> import logitproc as lp
        >>> spec = [{"name": "fusion", "expert": "mini-dpo", "base": "mini"}]
        >>> chain = lp.Chain.from_spec(spec)
    """

    expert: Companion | Sequence[Companion]
    base: Companion
    mode: Mode = "mixture"
    target: Target = "J"
    alpha: float | Sequence[float] | None = None
    beta: float | Sequence[float] | None = None
    bounds: Sequence[float] | Sequence[tuple[float, float]] = (0.0, 2.0)
    kind: Kind = "level"
    weights: str | Sequence[float] = "uniform"
    ridge: float = 1e-3
    centre: float = 0.0
    kl_budget: float | None = None
    plausibility: float = 0.0
    evidence_from: Literal["given", "all", "none"] = "given"
    share: float = 0.02

    companions: ClassVar = ("base", "expert")
    context = None

    def __post_init__(self) -> None:
        experts = list(self.expert) if isinstance(self.expert, Sequence) else [self.expert]
        for key, model in (("base", self.base), *(("expert", expert) for expert in experts)):
            if not isinstance(model, Companion):
                raise ValueError(f"{key} must be a Companion (Companion.load(NAME)), got {type(model).__name__}.")
        if any(not expert.reads_as(self.base) for expert in experts):
            warnings.warn(
                "An expert and the small base of 'fusion' read different prompts, so their difference is also that of "
                "the prompts; give both the same one.", stacklevel=3,
            )  # fmt: skip
        one_of("mode", self.mode, get_args(Mode))
        one_of("target", self.target, get_args(Target))
        one_of("kind", self.kind, get_args(Kind))
        one_of("evidence_from", self.evidence_from, ("given", "all", "none"))
        in_range("ridge", self.ridge, 0, math.inf)
        in_range("centre", self.centre, -1e4, 1e4)
        in_range("plausibility", self.plausibility, 0, 1)
        in_range("share", self.share, 0, 0.1)
        if self.kl_budget is not None:
            in_range("kl_budget", self.kl_budget, 0, math.inf)
        self._count = len(experts)
        if not experts:
            raise ValueError(f"mode={self.mode!r} needs at least one expert, got none.")
        if self.mode in ("upscale", "grid", "newton") and self._count > 1:
            raise ValueError(
                f"mode={self.mode!r} takes one expert, got {self._count}; use 'mixture', 'match' or 'select'."
            )
        self._alpha, self._beta, self._bounds = self._read_alpha(), self._read_beta(), self._read_bounds()
        self._weights = self._read_weights()
        self._learns = self.mode == "mixture" or (self.mode == "match" and self.weights == "evidence")
        learning = self._learns and self.evidence_from != "none"
        self.evidence_size = 0
        if learning:
            fused = self._count * (len(self._alpha) + len(self._beta))
            self.evidence_size = self._count if self.mode == "match" else 1 + fused
        self.learns_from_drawn = self.evidence_from == "all"
        self.supports_assisted = not learning  # type: ignore[misc]

    def _read_alpha(self) -> list[float]:
        given = self.alpha
        if given is None:
            given = 1.0 if self.mode == "static" else ()
        elif self.mode not in ("static", "mixture"):
            raise ValueError(f"mode={self.mode!r} takes no alpha; give it to 'static' or 'mixture'.")
        alpha = list(given) if isinstance(given, Sequence) else [given]
        for value in alpha:
            in_range("alpha", value, -1e4, 1e4)
        if self.mode == "static" and len(alpha) not in (1, self._count):
            raise ValueError(f"alpha must be a number, or one an expert ({self._count}), got {self.alpha!r}.")
        return alpha * self._count if self.mode == "static" and len(alpha) == 1 else alpha

    def _read_beta(self) -> list[float]:
        if self.beta is not None and self.mode not in ("upscale", "mixture"):
            raise ValueError(f"mode={self.mode!r} takes no beta; give it to 'upscale' or 'mixture'.")
        given = UPSCALE if self.beta is None else self.beta
        beta = list(given) if isinstance(given, Sequence) else [given]
        for value in beta:
            in_range("beta", value, -1e4, 1e4)
        if self.mode == "upscale" and len(beta) != 1:
            raise ValueError(f"beta must be a number for mode='upscale', got {self.beta!r}.")
        if self.mode == "mixture" and not (beta or self._read_alpha()):
            raise ValueError("mode='mixture' needs a beta or an alpha: without them only the host takes part.")
        return beta

    def _read_bounds(self) -> list[tuple[float, float]]:
        pairs: list[Any] = list(self.bounds) if isinstance(self.bounds, Sequence) else []
        if all(isinstance(bound, int | float) for bound in pairs):
            pairs = [pairs]
        if len(pairs) not in (1, self._count) or any(not isinstance(p, Sequence) or len(p) != 2 for p in pairs):
            raise ValueError(f"bounds must be (low, high), or one such pair an expert, got {self.bounds!r}.")
        for low, high in pairs:
            in_range("bounds", low, 0, 100)
            in_range("bounds", high, low, 100)
            searched = self.mode in ("grid", "select") or (self.mode == "newton" and self.target == "L")
            if searched and not _points(low, high):
                raise ValueError(f"bounds must hold a multiple of 0.1 for mode={self.mode!r}, got {self.bounds!r}.")
        return [(float(low), float(high)) for low, high in pairs]

    def _read_weights(self) -> list[float]:
        """One a expert; they add up to 1."""
        given = self.weights
        if isinstance(given, str):
            one_of("weights", given, ("uniform", "evidence"))
            return [1 / self._count] * self._count
        if not isinstance(given, list | tuple) or len(given) != self._count:
            raise ValueError(f"weights must be one number an expert ({self._count}), got {given!r}.")
        for value in given:
            in_range("weights", value, 0, math.inf)
        if not sum(given):
            raise ValueError("weights must not all be 0.")
        return [value / sum(given) for value in given]

    @classmethod
    def example(cls, width: int) -> Self:
        return cls(expert=tiny_companion(width, 1), base=tiny_companion(width, 0), mode="newton")

    @classmethod
    def neutral(cls, width: int) -> Self:
        return cls(expert=tiny_companion(width, 1), base=tiny_companion(width, 0), mode="static", alpha=0.0)

    @classmethod
    def variants(cls, width: int) -> dict[str, Processor]:
        first, second, base = (tiny_companion(width, seed) for seed in (1, 2, 0))
        one, two = functools.partial(cls, first, base), functools.partial(cls, (first, second), base)
        return {
            "static": two("static", alpha=(1.0, -0.5)),
            "upscale": one("upscale"),
            "grid": one("grid"),
            "newton": one("newton", target="F", plausibility=0.01),
            "least": one("newton", target="L"),
            "select": two("select"),
            "match": two("match", weights=(3, 1)),
            "learning": two("match", kind="shift", weights="evidence", share=0.0),
            "mixture": two("mixture", kl_budget=0.5),
            "all": one("mixture", evidence_from="all"),
            "even": one("mixture", alpha=(0.5, 1.5), beta=0.0, evidence_from="none"),
        }

    def step(
        self, tokens: Tensor, scores: Tensor, *companion_scores: Tensor, evidence: Tensor | None = None
    ) -> Tensor:
        base, *experts = companion_scores
        if self.mode == "mixture":
            count = 1 + len(experts) * (len(self._alpha) + len(self._beta))
            log_weights = scores.new_zeros(len(scores), count) if evidence is None else evidence
            out = mixture(scores, base, experts, self._alpha, self._beta, log_weights)
        elif self.mode == "static":
            out = shift(scores, shifts(scores, base, experts), _columns(self._alpha, scores))
        elif self.mode == "upscale":
            (out,) = upscaled(scores, base, experts[0], self._beta)
        else:
            weights = _columns(self._weights, scores) if evidence is None else evidence.softmax(-1)
            out = fuse(
                scores, base, experts, self.mode, target=self.target, bounds=self._bounds, kind=self.kind,
                weights=weights, ridge=self.ridge, centre=self.centre,
            ).scores  # fmt: skip
        if self.kl_budget is not None:
            change = torch.where(scores > -torch.inf, out - scores, 0.0)
            fraction = within_budget(scores, change, self.kl_budget)
            out = torch.where(fraction > 0, scores + fraction * change, scores)
        if self.plausibility:
            out = out.masked_fill(~plausible(scores.softmax(-1), self.plausibility), -torch.inf)
        return out

    def evidence(self, tokens: Tensor, scores: Tensor | None, *companion_scores: Tensor) -> Tensor | None:
        """ln of what each component gave the token, [rows, M]."""
        base, *experts = companion_scores
        if self.mode == "match":
            return likelihoods(experts, tokens)
        host = base if scores is None else scores
        return log_likelihoods(host, base, experts, self._alpha, self._beta, tokens)

    def accumulate(self, total: Tensor, evidence: Tensor) -> Tensor:
        return updated(total, evidence, self.share)
