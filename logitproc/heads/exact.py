"""Exact heads: the dense head's winner from a fraction of its bytes, proved at every step.

A low-bit copy of W scores every token, with a bound on its error; the true rows are read only where a token could still
win. Rows stay stored, so the head is larger by half or so; what shrinks is what a step reads.

    exact_nested    4 bits for all tokens, 4 more for those that survive, then the true rows
    exact_int8      8 bits for all tokens, then the true rows

The bound is Cauchy-Schwarz, |h . (w - w')| <= ||h|| ||w - w'||, with norms stored rounded up. Bounds from centroids
would prune nothing, and rules of the kind "six sigma" would lose winners: see `tests/heads/test_exact.py`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..checks import one_of
from .attachment import check_finite, own_head, softcap_of
from .head import DenseHead, Head, fingerprint, name_of, softcapped
from .planes import Planes, States, round_states, rounding, scores

Mode = Literal["checked", "deferred"]
MODES = ("checked", "deferred")
MOST = 64  # best logits that may be promised
SEEDS, FINALISTS = 16, 256  # rows read for the threshold (more if more are promised), and at most for the decision
_LISTED = 2048  # survivors of the first plane that a list of fixed length holds
_TINY = 1e-18  # a state so short counts as zero
# Settings of `generate` that change or mix logits before the winner is chosen, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1), "repetition_penalty": (None, 1.0), "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0), "encoder_no_repeat_ngram_size": (None, 0), "bad_words_ids": (None,),
    "min_length": (None, 0), "min_new_tokens": (None, 0), "sequence_bias": (None,), "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,), "forced_bos_token_id": (None,), "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,), "guidance_scale": (None, 1, 1.0), "watermarking_config": (None,),
    "penalty_alpha": (None, 0.0), "dola_layers": (None,), "output_scores": (None, False),
    "output_logits": (None, False), "renormalize_logits": (None, False), "constraints": (None,),
    "logits_processor": (None, []), "prefix_allowed_tokens_fn": (None,), "custom_generate": (None,),
}  # fmt: skip
_NEUTRAL_SAMPLED: dict[str, tuple[Any, ...]] = {
    "min_p": (None,), "typical_p": (None, 1.0), "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0),
    "top_h": (None,), "assistant_model": (None,), "prompt_lookup_num_tokens": (None,),
}  # fmt: skip


class ExactHead(Head):
    """The m best logits of the dense head, certified; make one with `ExactHead.of(model)`.

    Under `lp.attach` or `lp.convert`, `model.generate` uses it where m best logits decide: greedy decoding, and
    sampling with top_k <= m, without beams or anything else that touches logits. All other calls, a forward pass
    outside `generate` included, get the dense product, and `counters["uncovered"]` counts them.

    Exact means: the winner (lowest id of several) is that of the model's own matrix product in its dtype, for every
    order of summation whose error is at most gamma sum |h_i w_i| with gamma = 2 (d + 8) 2^-24, as float32 accumulation
    has it. Where rounding could decide otherwise, the dense product is computed: a call is a fallback when its winner
    is `ambiguous`, more tokens survive than may (`overflow`), the state is next to zero, not finite or so long that
    float32 overflows (`special`), more than `max_rows` states come at once (`wide`), or W changed after the planes were
    made (`stale`: `refresh()`).

    m           how many best logits are promised; the others may be -inf
    mode        "checked" decides on fallback at each step; "deferred" never waits for the device: it returns what it
                found, and `certified()` says afterwards whether all of it is exact
    capacity    tokens that may survive the first plane; by default all, and 2,048 when deferred, where it is the
                length of a list. Each costs no more than half of what the dense head reads for it
    max_rows    from 5 states on one pass of the dense product is faster on a CPU, as measured in eval/RESULTS.md
    counters    how often what happened
    """

    guarantee = "top-m"
    nested: ClassVar[bool]
    weight: Tensor
    bias: Tensor | None
    _uncertain: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        m: int = 1,
        mode: Mode = "checked",
        capacity: int | None = None,
        max_rows: int = 4,
        softcap: float | None = None,
        bias: bool = False,
        dtype: str = "float32",
    ):
        super().__init__(
            in_features, out_features, m=m, mode=mode, capacity=capacity, max_rows=max_rows, softcap=softcap,
            bias=bias, dtype=dtype,
        )  # fmt: skip
        self.m, self.mode, self.max_rows, self.softcap = m, mode, max_rows, softcap
        fixed = _LISTED if mode == "deferred" else out_features
        self.capacity = min(fixed if capacity is None else capacity, out_features)
        dense = DenseHead(in_features, out_features, bias, dtype)
        self.weight, self.bias = dense.weight, dense.bias
        for name, value in Planes.empty(in_features, out_features)._asdict().items():
            self.register_buffer(name, value)
        self.reset_counters()
        self._stamp: Any = None
        self._covered = False

    @staticmethod
    @torch.no_grad()
    def of(
        model: Any, kind: str = "exact_nested", *, m: int = 1, mode: Mode = "checked", capacity: int | None = None,
        max_rows: int = 4, softcap: float | None = None,
    ) -> "ExactHead":  # fmt: skip
        """An exact head for a model, or for a linear layer; shares its rows. No text is needed.

        `softcap` is the cap c of c tanh(z / c) where the logits z are soft-capped afterwards, and the winner is that
        of the capped ones. By default it is that of the model, which then runs once over one token, with a probe in
        the place of its head; a linear layer alone has none.

        Raises ValueError for an m outside 1..64 or above the vocabulary, an unknown kind or mode, an output layer that
        is not linear or is a head of this package already, weights that are NaN or infinite, and, where the model
        runs, one that changes its head's logits otherwise than by soft-capping: scales them, for one.
        """
        one_of("kind", kind, ("exact_int8", "exact_nested"))
        one_of("mode", mode, MODES)
        own = own_head(model)
        check_finite(own)
        if not 1 <= m <= min(MOST, own.out_features):
            raise ValueError(f"m must be between 1 and {min(MOST, own.out_features)}, got {m}.")
        if softcap is None and own is not model:
            softcap = softcap_of(model)
        head = {"exact_int8": ExactInt8Head, "exact_nested": ExactNestedHead}[kind](
            own.in_features, own.out_features, m, mode, capacity, max_rows, softcap, own.bias is not None,
            name_of(own.weight.dtype),
        )  # fmt: skip
        head.weight = nn.Parameter(own.weight.detach(), requires_grad=False)
        if own.bias is not None:
            head.bias = nn.Parameter(own.bias.detach(), requires_grad=False)
        head.refresh()
        return head

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the planes of the rows as they are now; call it after W was edited or cast."""
        for name, value in Planes.of(self.weight)._asdict().items():
            setattr(self, name, value)
        self.spec = self.spec | {"dtype": name_of(self.weight.dtype)}
        self.source = fingerprint(self.weight)
        self._settle()

    def _settle(self) -> None:
        self.planes.settle()
        self._stamp = self._state_of_weight()

    def _state_of_weight(self) -> Any:
        version = 0 if self.weight.is_inference() else self.weight._version
        return self.weight.data_ptr(), version, self.weight.dtype

    def _stale(self) -> bool:
        if self._stamp is None:  # filled by `load_state_dict`, planes and rows alike
            self._settle()
        return self._stamp != self._state_of_weight() or name_of(self.weight.dtype) != self.spec["dtype"]

    # --- calls ---

    def forward(self, hidden: Tensor) -> Tensor:
        if self._covered:
            return self.top(hidden)
        self._counts["uncovered"] += 1
        return self.full(hidden)

    def full(self, hidden: Tensor) -> Tensor:
        """All logits: the model's own product."""
        return nn.functional.linear(hidden, self.weight, self.bias)

    @torch.no_grad()
    def top(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of which the m best are exact, by certificate or by fallback, and others may be -inf."""
        rows = hidden.reshape(-1, self.in_features)
        self._counts["calls"] += 1
        self._counts["rows"] += len(rows)
        for cause, holds in (("stale", self._stale()), ("wide", len(rows) > self.max_rows)):
            if holds:
                self._counts[cause] += 1
                return self.full(hidden)
        logits, flags = self._search(rows)
        if self.mode == "deferred":
            self._uncertain = flags.any(0) | self._uncertain.to(flags.device)
            return logits.reshape(*hidden.shape[:-1], -1)
        failed = flags.any(1)
        if bool(failed.any()):
            for cause, count in zip(("special", "overflow", "ambiguous"), flags.sum(0).tolist(), strict=True):
                self._counts[cause] += count
            logits[failed] = self.full(rows)[failed]  # of all rows at once: the product that was promised
        return logits.reshape(*hidden.shape[:-1], -1)

    def certified(self) -> bool:
        """Whether everything that `deferred` calls have returned since the last question was exact."""
        sure = not bool(self._uncertain.any())
        self._uncertain = torch.zeros(3, dtype=torch.bool)
        return sure

    @property
    def counters(self) -> dict[str, int]:
        """Calls and rows; fallbacks by cause; tokens that survived the `first` and `second` plane, over all rows."""
        return {key: int(value) for key, value in self._counts.items()}

    def reset_counters(self) -> None:
        names = ("calls", "rows", "special", "overflow", "ambiguous", "stale", "wide", "uncovered", "first", "second")
        self._counts: dict[str, Any] = dict.fromkeys(names, 0)  # survivors are counted on the device
        self._uncertain = torch.zeros(3, dtype=torch.bool)

    # --- the search ---

    @property
    def planes(self) -> Planes:
        return Planes(*(getattr(self, name) for name in Planes._fields))

    def _search(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [b, V], flags [b, 3]: special, overflow, ambiguous)."""
        planes, states = self.planes, round_states(hidden)
        y = scores(planes, "high", states)
        if not self.nested:
            y += scores(planes, "low", states)
        if self.bias is not None:
            y += self.bias.float()
        logits = torch.full_like(y, -torch.inf, dtype=hidden.dtype)
        each = zip(hidden.split(1), y, logits, strict=True)
        return logits, torch.stack(
            [self._decide(h, states.one(i), y, into) for i, (h, y, into) in enumerate(each)]
        )

    def _decide(self, hidden: Tensor, state: States, y: Tensor, logits: Tensor) -> Tensor:
        """Flags [3] of one state [1, d] with scores y [V]; writes the logits [V] that can be among the m best."""
        seeds = y.topk(min(max(SEEDS, self.m), len(y))).indices
        best = self._true(hidden, seeds)
        threshold = best[0].topk(self.m).values[-1]
        upper = y + self._error(state, "first" if self.nested else "second")
        # Where float32 underflows or overflows, its errors are not relative: nothing is proved.
        special = ~torch.isfinite(hidden).all() | (state.norms[0] < _TINY) | ~torch.isfinite(upper.sum())
        overflow = torch.zeros_like(special)
        ids = None
        if self.nested:
            ids, overflow, survivors = self._survivors(upper, threshold, self.capacity)
            self._counts["first"] += survivors
            upper = y[ids] + scores(self.planes, "low", state, ids)[0] + self._error(state, "second", ids)
        at, over, survivors = self._survivors(upper, threshold, FINALISTS)
        self._counts["second"] += survivors
        finalists = at if ids is None else ids[at]
        ids, order = torch.cat([seeds, finalists]).sort()
        parts = zip(best, self._true(hidden, finalists), strict=True)
        low, high, z = (torch.cat(part)[order] for part in parts)
        logits[ids] = z.to(logits.dtype)
        return torch.stack([special, overflow | over, self._ambiguous(ids, low, high, z)])

    def _error(self, state: States, bound: str, ids: Tensor | None = None) -> Tensor:
        """How much a dense logit may exceed a score, [V] or as ids, float32 rounded up.

        ||h|| rho for what the planes leave out, ||h - hq|| ||w'|| for the rounding of the state, gamma ||h|| ||w|| for
        the dense product, and twice that for what is rounded here, which is less.
        """
        slack = state.lost + 3 * rounding(self.in_features) * state.norms
        rho, norms = (getattr(self, name).view(torch.float32) for name in (bound, "norms"))
        rho, norms = (rho, norms) if ids is None else (rho[ids], norms[ids])
        up = lambda factor: (factor * (1 + 1e-5)).float()
        error = up(state.norms) * rho + up(slack) * norms
        if self.bias is not None:
            error += 4 * rounding(self.in_features) * self.bias.float().abs().max()
        return error

    def _survivors(self, upper: Tensor, threshold: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        """(ids of tokens that could still win, at most `capacity`, whether there are more, how many there are)."""
        alive = self._seen(upper) >= self._seen(threshold)
        count = alive.sum()
        if self.mode == "deferred":  # no shape may depend on what is found
            ids = upper.topk(min(capacity, len(upper)), sorted=False).indices
        else:
            ids = alive.nonzero()[:capacity, 0]
        return ids, count > capacity, count

    def _true(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(least, largest, exact) logits [n] that the dense product may have for ids [n], before rounding."""
        rows, h = self.weight[ids].double(), hidden[0].double().nan_to_num(0.0, 0.0, 0.0)
        z, size = rows @ h, rows.abs() @ h.abs()
        if self.bias is not None:
            beta = self.bias.double()[ids]
            z, size = z + beta, size + beta.abs()
        error = rounding(self.in_features) * size
        return (z - error).float(), (z + error).float(), z

    def _seen(self, logits: Tensor) -> Tensor:
        """What the model makes of a logit: rounded to its dtype, and capped in it. Monotone."""
        return softcapped(logits.to(getattr(torch, self.spec["dtype"])), self.softcap).float()

    def _ambiguous(self, ids: Tensor, low: Tensor, high: Tensor, z: Tensor) -> Tensor:
        """Whether rounding could change the m best; ids ascend, and one may stand twice.

        The winner w of m = 1 is certain if every other token u has hi_u < lo_w, or hi_u = lo_w and w < u. For m > 1
        the m-th must be clear of the next.
        """
        low, high, value = self._seen(low), self._seen(high), self._seen(z)
        repeated = torch.zeros_like(ids, dtype=torch.bool)
        repeated[1:] = ids[1:] == ids[:-1]
        low, high, value = (x.masked_fill(repeated, -torch.inf) for x in (low, high, value))
        order = value.argsort(descending=True, stable=True)
        best, others = order[: self.m], order[self.m :]
        least, rivals = low[best].amin(), high[others]
        if self.m == 1:
            return ((rivals > least) | ((rivals == least) & (ids[others] < ids[best]))).any()
        return (rivals >= least).any()

    # --- what `generate` may ask for ---

    @contextlib.contextmanager
    def covering(self, model: Any, kwargs: dict[str, Any]) -> Iterator[None]:
        """While the block runs, calls are certified if m best logits decide what `generate(**kwargs)` says."""
        before, self._covered = self._covered, self._covers(model, kwargs)
        try:
            yield
        finally:
            self._covered = before

    def _covers(self, model: Any, kwargs: dict[str, Any]) -> bool:
        configs = (kwargs.get("generation_config"), model.generation_config)

        def setting(key: str) -> Any:
            values = (kwargs.get(key), *(getattr(config, key, None) for config in configs))
            return next((value for value in values if value is not None), None)

        sampled = bool(setting("do_sample"))
        neutral = _NEUTRAL | _NEUTRAL_SAMPLED if sampled else _NEUTRAL
        if not all(any(setting(key) == value for value in values) for key, values in neutral.items()):
            return False
        top_k = setting("top_k")
        return not sampled or (50 if top_k is None else top_k) in range(1, self.m + 1)

    def bytes_per_step(self, batch: int = 1) -> int:
        """Bytes for `batch` states when one token survives, which nothing but reading all rows could avoid."""
        unread = {"low", "second"} if self.nested else {"first"}
        planes = [value for name, value in self.planes._asdict().items() if name not in unread]
        rows = (max(SEEDS, self.m) + 1) * self.in_features * self.weight.element_size()
        return sum(t.nbytes for t in planes) + batch * (rows + self._row_bytes())


class ExactInt8Head(ExactHead):
    """Both planes at once: 8 bits for every token, then the true rows of the few that remain."""

    kind = "exact_int8"
    nested = False


class ExactNestedHead(ExactHead):
    """4 bits for every token, 4 more for survivors, then the true rows."""

    kind = "exact_nested"
    nested = True
