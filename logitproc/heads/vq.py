"""Compressed heads: tokens share codes, and only the codes are multiplied with the hidden state.

"VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits", Shao et al.,
arXiv:2505.10202 (2025), is `kind="paper"`:

    z_v = c_{M(v)} . h

Tokens of one code have one logit, so it can say at most K different tokens greedily, and pays the tie floor
(`floors`) in perplexity. The other kinds, ours, spend the same numbers better:

    weighted    z_v = c_{M(v)} . h + b_v        common tokens have a code of their own; the others are clustered by
                                                what an error costs (after Cavalcanti and Wilson, arXiv:2608.12026)
    distilled   the same, with c and b trained to the dense model's predictions
    tiebreak    z_v = c_{M(v)} . h + u_v . (P h) + b_v             the context decides between tokens of a code
    residual    z_v = sum_j (C_j h)[M_j(v)] + b_v                  several books
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..checks import in_range, one_of, whole, whole_up_to
from ..ops.dispatch import op
from ..registry import unknown
from .attachment import check_finite, own_head, softcap_in_config
from .calibration import Calibration, Floors, Statistics, codes_sum
from .clustering import Progress, Report, kmeans, means
from .evaluation import evaluate
from .fitted import FittedHead
from .floors import check_codes, tie_floor_min
from .head import KINDS, fingerprint, name_of, zeros
from .refine import FEATURES, TOKENS, RefinedHead, ScreenedHead

_CACHED = 1 << 27  # scores of codes, or teacher posteriors, held at once
_POINTS = 1 << 30  # whitened rows held in float32; more of them are held in bfloat16
_TOKEN_PASSES, _TOKEN_STATES = 10, 4096  # of matching a bias token by token
SINGLETONS = 0.75  # share of the codes that are given to the commonest tokens


class VQHead(FittedHead):
    """z_v = sum_j (C h)[M_j(v)] + u_v . (P h) + b_v; hidden states [..., d] -> logits [..., V].

    codes        [K, d] parameter, model's dtype
    mapping      [J, V] int32: the code of each token in each book, as a row of `codes`
    bias         [V] float32 buffer, or None
    rows, projection    [V, r] and [r, d] parameters, or None

    Products are accumulated in float32 and rounded to the model's dtype, sums are float32, and the result has the
    dtype of the hidden states. Tokens that agree in all codes, bias and row have the same logit, bit for bit.
    """

    codes: Tensor
    mapping: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        codes: int,
        books: int = 1,
        rank: int = 0,
        bias: bool = True,
        dtype: str = "float32",
    ):
        super().__init__(
            in_features, out_features, codes=codes, books=books, rank=rank, bias=bias, dtype=dtype
        )
        self.codes = nn.Parameter(zeros(codes, in_features, dtype=dtype))
        self.register_buffer("mapping", torch.zeros(books, out_features, dtype=torch.int32))
        self.register_buffer("bias", zeros(out_features) if bias else None)
        self.rows = nn.Parameter(zeros(out_features, rank, dtype=dtype)) if rank else None
        self.projection = nn.Parameter(zeros(rank, in_features, dtype=dtype)) if rank else None

    def forward(self, hidden: Tensor) -> Tensor:
        scores, extra = self._products(hidden), None
        if self.rows is not None and self.projection is not None:
            extra = nn.functional.linear(nn.functional.linear(hidden, self.projection), self.rows)
        return spread(scores, self.mapping, self.bias, extra)

    def _products(self, hidden: Tensor) -> Tensor:
        """c_k . h, [..., K]; of one state on a CPU by `mv`, which is faster than `linear` but not cast by autocast."""
        one = hidden.numel() == self.in_features and hidden.device.type == "cpu"
        if one and hidden.dtype is self.codes.dtype and not torch.is_autocast_enabled("cpu"):
            return torch.mv(self.codes, hidden.flatten()).reshape(*hidden.shape[:-1], -1)
        return nn.functional.linear(hidden, self.codes)

    def _row_bytes(self) -> int:
        return super()._row_bytes() + 4 * len(self.codes)

    # --- without a logit for every token ---

    def log_prob(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """ln q(token | h), [...], of tokens [...] given states [..., d], which may broadcast, from K logits and not V.

        ln q(v) = s_k + b_v - logsumexp_k(s_k + A_k), with A_k the logsumexp of b over the tokens of k. Exact in
        float32 and float64; in half precision `forward` rounds once more. This and the next two are about the logits
        that the head returns: a model that soft-caps them afterwards makes other probabilities of them.
        """
        scores, bias, code = self._scores(hidden), self._bias(), self.mapping[0].long()
        total = (scores + self._masses().to(scores)).logsumexp(-1)
        scores = scores.expand(*tokens.shape, -1)
        return scores.gather(-1, code[tokens][..., None])[..., 0] + bias[tokens].to(scores) - total

    def greedy(self, hidden: Tensor) -> Tensor:
        """The most probable token, the lowest id of several, [...]: what argmax of `forward` finds, from K logits."""
        bias, code = self._bias(), self.mapping[0].long()
        order = bias.argsort(descending=True, stable=True)
        order = order[code[order].argsort(stable=True)]  # by code, then by bias, then by id
        first = torch.searchsorted(code[order], torch.arange(len(self.codes), device=order.device))
        best = order[first].sort().values  # the lowest of equal tokens is the first
        scores = self._scores(hidden)
        return best[(scores.index_select(-1, code[best]) + bias[best].to(scores)).argmax(-1)]

    def sample(self, hidden: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A token drawn from q(. | h) for each state [..., d], [...]: a code first, then one of its tokens."""
        bias, code = self._bias().double(), self.mapping[0].long()
        scores = self._scores(hidden.reshape(-1, self.in_features))
        chosen = torch.multinomial((scores + self._masses().to(scores)).softmax(-1), 1, generator=generator)
        order = code.argsort(stable=True)
        pi = (bias - self._masses()[code]).exp()[order]
        drawn = torch.rand(chosen.shape, dtype=torch.float64, generator=generator, device=hidden.device)
        at = torch.searchsorted(pi.cumsum(0), chosen + drawn)  # each code's tokens fill one unit
        sizes = torch.bincount(code, minlength=len(self.codes)).cumsum(0)
        at = at.clamp(max=sizes[chosen] - 1)  # rounding must not lead into the next code
        return order[at].reshape(hidden.shape[:-1])

    def _scores(self, hidden: Tensor) -> Tensor:
        """c_k . h, [..., K], of a head with one code a token."""
        if len(self.mapping) > 1 or self.rows is not None:
            raise ValueError(f"{self.kind!r} has more than one code a token: its logits take `forward`.")
        scores = self._products(hidden)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def _bias(self) -> Tensor:
        return (
            self.codes.new_zeros(self.out_features, dtype=torch.float32) if self.bias is None else self.bias
        )

    def _masses(self) -> Tensor:
        """A_k, [K] float64: logsumexp of the bias over the tokens of each code."""
        return group_logsumexp(self._bias().double(), self.mapping[0].long(), len(self.codes))

    # --- fitting ---

    @classmethod
    def fit(
        cls,
        model: Any,
        calibration: "str | Path | Iterable[str] | Calibration",
        *,
        codes: int | None = None,
        kind: str = "weighted",
        refine: int = 0,
        screened: int = 0,
        seed: int = 0,
        tokenizer: Any = None,
        tokens: int = 1 << 16,
        report: Report | None = None,
        **options: Any,
    ) -> FittedHead:
        """A head for `model` with `codes` codes, fitted to what the model predicts on a text.

        `calibration` is a text, of which `Calibration.collect` reads up to `tokens` tokens, or a `Calibration`, to
        fit several heads to one reading. A tenth of it judges: `head.about["held_out"]`. `report` receives every
        `Progress`.

        Two things keep quality and save no memory. `refine=N` scores the N best tokens again with the model's own
        rows, which the head then holds too (`RefinedHead`). `screened=R` takes the R directions in which a state is
        largest in place of codes (`ScreenedHead`), and wants refining. `options`:

            singletons=0.75      weighted, distilled, tiebreak: the share of codes given to the commonest tokens
            start="weighted"     distilled: the kind to start from; "paper" trains its codes without a bias
            epochs=4             distilled: passes over the states
            rank=16              tiebreak: r
            books=2              residual: J

        A model that soft-caps its logits (Gemma 2) is fitted and judged by the capped ones. There every bias is matched
        token by token, and `distilled` is refused: mass does not add up over codes.

        The same seed, device and number of threads give the same head.

        Raises ValueError for more codes than tokens or none, codes that books do not divide, `codes` beside `screened`,
        counts out of range, a text with fewer tokens than codes or for another model, and what `Calibration.collect`
        refuses; LookupError for an unknown kind or option.
        """
        own = own_head(model)
        weight = own.weight
        softcap = calibration.softcap if isinstance(calibration, Calibration) else softcap_in_config(model)
        solve = _check(weight, softcap, codes, kind, refine, screened, options)
        if isinstance(calibration, Calibration):
            check_finite(own)
        else:
            calibration = Calibration.collect(model, calibration, tokenizer, tokens=tokens, report=report)
        if calibration.weight.shape != weight.shape or calibration.source != fingerprint(weight):
            raise ValueError("The calibration was collected from another model; collect it from this one.")
        if len(calibration.states) < (least := max(codes or 0, 10)):
            raise ValueError(
                f"The calibration text is too short: it has {len(calibration.states)} tokens; give at least {least}, "
                "better ten times as many."
            )
        train, held = calibration.parts
        head: FittedHead
        floors = None
        if codes is None:
            head = ScreenedHead.of(train.weight, train.bias, train.statistics.products, directions=screened)
        else:
            problem = Problem(train, held, train.statistics, codes, seed, report)
            if report is not None:  # what no mapping can avoid, before anything is fitted
                minimum = tie_floor_min(problem.statistics.probability, codes)
                report(Progress("floor", 1, 1, {"minimum": minimum}))
            options = solve.options | options
            with torch.no_grad():
                head = made = solve.solve(problem, **options)
            if len(made.mapping) == 1 and not refine:
                floors = Floors.of(held, problem.statistics, made.mapping[0])._asdict()
        if refine:
            head = RefinedHead.of(head, train.weight, train.bias, best=refine)
        head.source, head.tokenizer = calibration.source, calibration.tokenizer
        head.about = {
            "codes": codes, "refine": refine, "screened": screened, "seed": seed, "options": options,
            "calibration": calibration.text, "tokens": len(calibration.states),
            "held_out": evaluate(head, held)._asdict(), "floors": floors,
        }  # fmt: skip
        return head

    options: ClassVar[dict[str, Any]] = {}  # of `solve`, with what they are by default

    @classmethod
    def solve(cls, problem: "Problem", **options: Any) -> "VQHead":
        """Fit this kind."""
        raise NotImplementedError

    @classmethod
    def build(
        cls,
        codes: Tensor,
        mapping: Tensor,
        bias: Tensor | None = None,
        rows: Tensor | None = None,
        projection: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A head of these tensors; mapping [V] or [J, V], parameters in `dtype`, by default that of `codes`."""
        mapping = mapping if mapping.dim() == 2 else mapping[None]
        dtype = dtype or codes.dtype
        rank = 0 if rows is None else rows.shape[1]
        head = cls(
            codes.shape[1], mapping.shape[1], len(codes), len(mapping), rank, bias is not None, name_of(dtype)
        ).to(codes.device)
        given = {"codes": codes, "mapping": mapping, "bias": bias, "rows": rows, "projection": projection}
        with torch.no_grad():
            for name, value in given.items():
                if value is not None and value.numel():
                    getattr(head, name).copy_(value)
        return head

    @classmethod
    def like(cls, head: "VQHead") -> Self:
        """A head of this kind with the codes, mapping and bias of another."""
        return cls.build(head.codes, head.mapping, head.bias)


@op(half=True)
def spread(scores: Tensor, mapping: Tensor, bias: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
    """sum_j scores[M_j(v)] + extra[v] + bias[v] for every token v: scores [..., K] of codes -> [..., V].

    mapping int32 [J, V], bias [V] and extra [..., V]. Sums are float32 and rounded to the dtype of the scores.
    """
    first, *others = mapping
    if bias is None and extra is None and not others:
        return scores.index_select(-1, first)
    exact = scores.to(torch.promote_types(scores.dtype, torch.float32))
    logits = exact.index_select(-1, first)
    for book in others:
        logits += exact.index_select(-1, book)
    if extra is not None:
        logits += extra
    if bias is not None:
        logits += bias
    return logits.to(scores.dtype)


def _fitted() -> dict[str, type[VQHead]]:
    return {kind: cls for kind, cls in KINDS.items() if issubclass(cls, VQHead)}


def _check(
    weight: Tensor, softcap: float | None, codes: int | None, kind: str, refine: int, screened: int,
    options: dict[str, Any],
) -> type[VQHead]:  # fmt: skip
    """The class of `kind`, after every check of what `VQHead.fit` was asked for."""
    if kind not in _fitted():
        raise unknown("kind of head", kind, _fitted())
    solve, (width, d) = _fitted()[kind], weight.shape
    if screened and (codes is not None or kind != "weighted" or options):
        raise ValueError("screened takes directions in place of codes; leave out codes, kind and its options.")
    if codes is None and not screened:
        raise ValueError("codes is missing: how many the head has; or give screened, a number of directions instead.")
    if codes is not None:
        check_codes(codes, width)
    for key in options:
        if key not in solve.options:
            raise unknown(f"option of {kind!r}", key, solve.options)
    options = solve.options | options
    in_range("singletons", options.get("singletons", 0), 0, 1)
    one_of("start", options.get("start", "weighted"), ("weighted", "paper"))
    whole("epochs", options.get("epochs", 1), 1)
    books = options.get("books", 1)
    whole("books", books, 1)
    if codes is not None and codes % books:
        raise ValueError(f"{codes} codes cannot be divided among {books} books.")
    whole_up_to("refine", refine, 0, width, TOKENS)
    whole_up_to("screened", screened, 0, d, FEATURES)
    whole_up_to("rank", options.get("rank", 0), 0, d, FEATURES)
    if kind == "distilled" and softcap is not None:
        raise ValueError(
            "This model soft-caps its logits, and kind 'distilled' is for plain ones; take weighted, tiebreak or "
            "residual."
        )
    return solve


# --- kinds ---


class Problem(NamedTuple):
    """What a kind is fitted to."""

    train: Calibration
    held: Calibration
    statistics: Statistics
    codes: int
    seed: int
    report: Report | None

    @property
    def weight(self) -> Tensor:
        return self.train.weight

    def cluster(self, points: Tensor, weights: Tensor, codes: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return kmeans(points, weights, codes, generator, report=self.report)

    def singletons(self, share: float) -> tuple[Tensor, Tensor]:
        """Ids of the tokens of largest pbar that get a code each, and of all others, ascending."""
        order = self.statistics.probability.argsort(descending=True, stable=True)
        alone = min(int(share * self.codes), self.codes - 1) if self.codes < len(order) else len(order)
        return order[:alone].sort().values, order[alone:].sort().values


class PaperHead(VQHead):
    """k-means on the rows of W, Euclidean, unweighted; no bias but the model's own."""

    kind = "paper"

    @classmethod
    def solve(cls, problem: Problem, **options: Any) -> "VQHead":
        weight, bias = problem.weight, problem.train.bias
        even = torch.ones(len(weight), device=weight.device)
        whole = problem.codes == len(weight)
        mapping = torch.arange(len(weight)) if whole else problem.cluster(weight.float(), even, problem.codes)
        mapping = mapping.to(weight.device)
        head = cls.build(means(weight, even, mapping, problem.codes), mapping, bias, dtype=weight.dtype)
        _previewable(head, even, bias)
        return head


class WeightedHead(VQHead):
    """Singletons for the commonest tokens, weighted whitened k-means for the others, a matched bias."""

    kind = "weighted"
    options = {"singletons": SINGLETONS}

    @classmethod
    def solve(cls, problem: Problem, **options: Any) -> "VQHead":
        statistics = problem.statistics
        points = lambda ids: whiten(problem.weight, statistics.root, ids=ids)
        mapping = partition(problem, options["singletons"], points)
        codes = means(problem.weight, statistics.curvature, mapping, problem.codes).to(problem.weight.dtype)
        if problem.train.softcap is None:
            head = cls.build(codes, mapping, matched_bias(codes, mapping, problem))
        else:  # mass does not add up over codes
            head = cls.build(codes, mapping, quick_bias((codes.double() @ statistics.mean)[mapping], problem))
            _match_tokens(head, problem)
        _previewable(head, statistics.curvature, problem.train.bias)
        return head


class DistilledHead(VQHead):
    """Codes and bias trained to the dense model's predictions, from `start`, if that helps on held-out text.

    With M fixed, KL(dense || head) is convex in the codes and the masses of codes, and no gradient touches V: it is
    logistic regression of the dense model's mass of each code on h, and the best division of a code's mass among
    its tokens is that of pbar.
    """

    kind = "distilled"
    options = {"start": "weighted", "singletons": SINGLETONS, "epochs": 4}

    @classmethod
    def solve(cls, problem: Problem, **options: Any) -> "VQHead":
        start = _fitted()[options["start"]].solve(problem, singletons=options["singletons"])
        best, least = start, evaluate(start, problem.held).kl
        if problem.report is not None:  # no training brings the KL below this mapping's information
            floors = Floors.of(problem.held, problem.statistics, start.mapping[0])
            problem.report(
                Progress("floor", 1, 1, {"floor": floors.floor, "information": floors.information})
            )
        for epoch, candidate in enumerate(distil(start, problem, options["epochs"]), 1):
            kl = evaluate(candidate, problem.held).kl
            if problem.report is not None:
                problem.report(
                    Progress("distillation", epoch, options["epochs"], {"kl": kl, "best": min(kl, least)})
                )
            if kl < least:
                best, least = candidate, kl
        return cls.like(best)


class TiebreakHead(VQHead):
    """Low rank plus codes: the context decides between the tokens of a code."""

    kind = "tiebreak"
    options = {"rank": 16, "singletons": SINGLETONS}

    @classmethod
    def solve(cls, problem: Problem, **options: Any) -> "VQHead":
        rank, statistics, weight = options["rank"], problem.statistics, problem.weight
        if rank == 0:
            return cls.like(WeightedHead.solve(problem, singletons=options["singletons"]))
        root, curvature = statistics.root, statistics.curvature
        centre = weight.double().mean(0)
        whitened = whiten(weight, root, centre)
        gram = torch.zeros_like(root)
        for x, c in zip(whitened.split(4096), curvature.split(4096), strict=True):
            gram += (x.float().T @ (x.float() * c[:, None].float())).double()
        basis = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
        projection = torch.linalg.solve_triangular(root.T, basis, upper=True).T.to(weight.dtype)
        alone, others = problem.singletons(options["singletons"])
        rows = (whitened.float() @ basis.float()).to(weight.dtype)
        rows[alone] = 0
        for x, row in zip(whitened.split(4096), rows.split(4096), strict=True):
            x -= (row.double() @ basis.T).to(x.dtype)
        mapping = partition(problem, options["singletons"], lambda ids: whitened[ids])
        explained = means(rows, curvature, mapping, problem.codes) @ projection.double()
        codes = (means(weight, curvature, mapping, problem.codes) - explained).to(weight.dtype)
        mean = statistics.mean
        bias = quick_bias(
            (codes.double() @ mean)[mapping] + rows.double() @ (projection.double() @ mean), problem
        )
        head = cls.build(codes, mapping, bias, rows, projection)
        _match_tokens(head, problem)
        return head


class ResidualHead(VQHead):
    """J books of K / J codes, each fitted to what the ones before left."""

    kind = "residual"
    options = {"books": 2}

    @classmethod
    def solve(cls, problem: Problem, **options: Any) -> "VQHead":
        books, weight, statistics = options["books"], problem.weight, problem.statistics
        if books == 1:
            return cls.like(WeightedHead.solve(problem, singletons=0.0))
        size, curvature, root = problem.codes // books, statistics.curvature, statistics.root
        left = whiten(weight, root)  # of the rows
        approximate = torch.zeros_like(curvature)  # their mean logits
        codes: list[Tensor] = []
        mapping: list[Tensor] = []
        for _ in range(books):
            labels = problem.cluster(left, curvature, size)
            code = means(weight, curvature, labels, size)
            for earlier, theirs in zip(codes, mapping, strict=True):  # less the mean of what those explain
                code -= means(nn.functional.one_hot(theirs, size), curvature, labels, size) @ earlier.double()
            codes.append(code.to(weight.dtype))
            mapping.append(labels)
            approximate += (codes[-1].double() @ statistics.mean)[labels]
            explained = (codes[-1].double() @ root).to(left.dtype)
            for x, label in zip(left.split(4096), labels.split(4096), strict=True):
                x -= explained[label]
        bias = quick_bias(approximate, problem)
        mapping = [labels + book * size for book, labels in enumerate(mapping)]
        head = cls.build(torch.cat(codes), torch.stack(mapping), bias)
        _match_tokens(head, problem)
        return head


# --- what kinds share ---


def partition(problem: Problem, share: float, points: Callable[[Tensor], Tensor]) -> Tensor:
    """M [V]: the commonest tokens alone in codes 0, 1, ..., the others clustered; `points` of ids gives rows."""
    alone, others = problem.singletons(share)
    mapping = torch.empty(len(problem.weight), dtype=torch.int64, device=problem.weight.device)
    mapping[alone] = torch.arange(len(alone), device=mapping.device)
    if len(others):
        curvature = problem.statistics.curvature[others]
        mapping[others] = len(alone) + problem.cluster(points(others), curvature, problem.codes - len(alone))
    return mapping


def whiten(weight: Tensor, root: Tensor, centre: Tensor | float = 0.0, ids: Tensor | None = None) -> Tensor:
    """(w - centre) L of all rows, or of `ids`: distances are errors of logits. Very many are held in bfloat16."""
    ids = torch.arange(len(weight), device=weight.device) if ids is None else ids
    dtype = torch.float32 if len(ids) * len(root) <= _POINTS else torch.bfloat16
    out, root = torch.empty(len(ids), len(root), dtype=dtype, device=weight.device), root.to(dtype)
    for block, into in zip(ids.split(4096), out.split(4096), strict=True):
        torch.mm((weight[block].double() - centre).to(dtype), root, out=into)
    return out


def quick_bias(approximate: Tensor, problem: Problem) -> Tensor:
    """b = beta + mu . (w - w'), [V] float64: no logit is wrong on average. `approximate` [V] holds mu . w'."""
    mean = problem.statistics.mean
    bias = torch.cat([rows.double() @ mean for rows in problem.weight.split(4096)]) - approximate
    return bias if problem.train.bias is None else bias + problem.train.bias.double()


def matched_bias(
    codes: Tensor, mapping: Tensor, problem: Problem, passes: int = 100, tolerance: float = 1e-4
) -> Tensor:
    """b_v = a_k + ln pi(v | k), [V] float64, such that each code has its dense mass: qbar_k = pbar_k.

    pi(v | k) = pbar_v / pbar_k is the best constant division of a code. Only the K numbers a are iterated. The
    states are as many of the calibration's as fit in memory with K scores each.
    """
    train = problem.train.first(max(1, _CACHED // len(codes)))
    whole = len(train.states) == problem.statistics.count
    statistics = problem.statistics if whole else train.statistics
    exact = torch.promote_types(codes.dtype, torch.float32)
    scores = nn.functional.linear(train.states, codes).to(exact)
    mass = codes_sum(statistics.probability, mapping, len(codes))
    a = group_logsumexp(
        quick_bias((codes.double() @ problem.statistics.mean)[mapping], problem), mapping, len(codes)
    )
    for step in range(1, passes + 1):
        total = torch.zeros_like(a)
        for block in scores.split(4096):
            total += (block + a.to(exact)).softmax(-1).double().sum(0)
        change = mass.log() - (total / len(scores)).clamp(min=1e-30).log()
        a += change
        error = float((mass * change.abs()).sum())
        if problem.report is not None:
            problem.report(Progress("bias", step, passes, {"error": error}))
        if error < tolerance:
            break
    pbar = problem.statistics.probability
    return a[mapping] + pbar.log() - codes_sum(pbar, mapping, len(codes)).log()[mapping]


def group_logsumexp(values: Tensor, mapping: Tensor, codes: int) -> Tensor:
    """logsumexp of `values` [V] over the tokens of each code, [K]."""
    top = torch.full((codes,), -torch.inf, dtype=values.dtype, device=values.device)
    top = top.scatter_reduce_(0, mapping, values, "amax")
    return top + codes_sum((values - top[mapping]).exp(), mapping, codes).log()


def _match_tokens(head: VQHead, problem: Problem) -> None:
    """b += ln pbar - ln qbar, token by token, a few times over a few thousand states."""
    train, bias = problem.train.first(_TOKEN_STATES), head._bias()  # changed in place
    pbar = train.statistics.probability
    for step in range(1, _TOKEN_PASSES + 1):
        total = torch.zeros_like(pbar)
        for states, _, _ in train.logits():
            total += train.seen(head(states)).float().softmax(-1).double().sum(0)
        bias += pbar.log() - (total / len(train.states)).clamp(min=1e-12).log()
        if problem.report is not None:
            problem.report(Progress("bias", step, _TOKEN_PASSES, {}))


def _previewable(head: VQHead, weights: Tensor, bias: Tensor | None) -> None:
    """Note the weights whose means of rows the codes are, for `VQLogitsProcessor`."""
    head.token_weights = weights.float()
    if head.bias is not None:
        head.token_bias = head.bias.clone()
        if bias is not None:  # dense logits hold beta; their means hold its means
            mapping = head.mapping[0].long()
            head.token_bias -= means(bias[:, None], weights, mapping, len(head.codes))[mapping, 0].float()


# --- distillation ---


def distil(
    start: VQHead, problem: Problem, epochs: int, batch: int = 1024, rate: float = 0.01
) -> "Iterable[VQHead]":
    """Heads after each pass over the states: Adam with a rate that falls to 0, in whitened coordinates.

    theta_k . g + alpha_k with g = L^-1 (h - mu) equals c_k . h + a_k. A start without a bias keeps a_k = ln n_k.
    """
    mapping, codes = start.mapping[0].long(), len(start.codes)
    train = problem.train.first(max(1, 4 * _CACHED // codes))
    teacher = torch.cat([codes_sum(z.softmax(-1), mapping, codes).half() for _, _, z in train.logits()])
    root, free = problem.statistics.root, problem.train.bias is None and start.bias is None
    mean = torch.zeros_like(problem.statistics.mean) if free else problem.statistics.mean
    theta = (start.codes.double() @ root).float()
    offset = start._masses() + start.codes.double() @ mean
    alpha = offset.float()
    optimiser = torch.optim.Adam([theta, alpha] if not free else [theta], lr=rate)
    whitened = torch.linalg.solve_triangular(root, (train.states.double() - mean).T, upper=False).T.float()
    generator = torch.Generator().manual_seed(problem.seed)
    steps = epochs * -(-len(whitened) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    pbar = problem.statistics.probability
    log_pi = (pbar.log() - codes_sum(pbar, mapping, codes).log()[mapping]) if not free else None
    for _ in range(epochs):
        for rows in torch.randperm(len(whitened), generator=generator).split(batch):
            _, theta.grad, alpha.grad = posterior_loss(theta, alpha, whitened[rows], teacher[rows].float())
            optimiser.step()
            schedule.step()
        new = torch.linalg.solve_triangular(root.T, theta.double().T, upper=True).T
        bias = None if log_pi is None else (alpha.double() - new @ mean)[mapping] + log_pi
        yield type(start).build(new, mapping, bias, dtype=start.codes.dtype)


def posterior_loss(
    theta: Tensor, alpha: Tensor, states: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean of logsumexp(y) - sum_k P_k y_k, its gradients by theta and alpha) with y = states theta^T + alpha.

    theta [K, d], alpha [K], states [b, d], teacher [b, K] rows of which sum to 1.
    """
    y = torch.addmm(alpha, states, theta.T)
    error = (y.softmax(-1) - teacher) / len(states)
    loss = (y.logsumexp(-1) - (teacher * y).sum(-1)).mean()
    return loss, error.T @ states, error.sum(0)
