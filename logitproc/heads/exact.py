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
from .head import DenseHead, Head, fingerprint, name_of
from .planes import GROUP, HIGH, LOW, round_states, rounding, scores, split

Mode = Literal["checked", "deferred"]
MODES = ("checked", "deferred")
SEEDS, FINALISTS = 64, 32  # rows read for the threshold, and for the decision
_TINY = 1e-18  # a state so short counts as zero
_BOUNDS = ("first", "second", "norms")
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
    is `ambiguous`, more tokens survive than `capacity` (`overflow`), the state is next to zero, not finite or so long
    that float32 overflows (`special`), more than `max_rows` states come at once (`wide`), or W changed after the planes
    were made (`stale`: `refresh()`).

    m           how many best logits are promised; the others may be -inf
    mode        "checked" decides on fallback at each step; "deferred" never waits for the device: it returns what it
                found, and `certified()` says afterwards whether all of it is exact
    capacity    tokens that may survive the first plane
    counters    how often what happened
    """

    guarantee = "top-m"
    nested: ClassVar[bool]
    weight: Tensor
    bias: Tensor | None
    high: Tensor
    low: Tensor
    scales: Tensor
    first: Tensor
    second: Tensor
    norms: Tensor
    _uncertain: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        m: int = 1,
        mode: Mode = "checked",
        capacity: int = 2048,
        max_rows: int = 8,
        softcap: float | None = None,
        bias: bool = False,
        dtype: str = "float32",
    ):
        super().__init__(
            in_features, out_features, m=m, mode=mode, capacity=capacity, max_rows=max_rows, softcap=softcap,
            bias=bias, dtype=dtype,
        )  # fmt: skip
        self.m, self.mode, self.max_rows, self.softcap = m, mode, max_rows, softcap
        self.capacity = min(capacity, out_features)
        dense, groups = DenseHead(in_features, out_features, bias, dtype), -(-in_features // GROUP)
        self.weight, self.bias = dense.weight, dense.bias
        for name in ("high", "low"):
            self.register_buffer(name, torch.zeros(out_features, groups, 64, dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(out_features, groups, dtype=torch.int16))
        for name in _BOUNDS:  # bits of float32: `model.to(bfloat16)` must not round a certificate
            self.register_buffer(name, torch.zeros(out_features, dtype=torch.int32))
        self.reset_counters()
        self._stamp: Any = None
        self._covered = False

    @staticmethod
    @torch.no_grad()
    def of(
        model: Any, kind: str = "exact_nested", *, m: int = 1, mode: Mode = "checked", capacity: int = 2048,
        max_rows: int = 8, softcap: float | None = None,
    ) -> "ExactHead":  # fmt: skip
        """An exact head for a model, or for a linear layer; shares its rows. No text is needed.

        Raises ValueError for an m outside 1..64 or above the vocabulary, an unknown kind or mode, and weights that
        are NaN or infinite.
        """
        one_of("kind", kind, ("exact_int8", "exact_nested"))
        one_of("mode", mode, MODES)
        own = model if isinstance(model, nn.Linear) else model.get_output_embeddings()
        if not torch.isfinite(own.weight).all():
            raise ValueError(
                "The head of this model holds NaN or infinite weights; load an intact checkpoint."
            )
        if not 1 <= m <= min(SEEDS, own.out_features):
            raise ValueError(f"m must be between 1 and {min(SEEDS, own.out_features)}, got {m}.")
        if softcap is None and hasattr(model, "config"):
            softcap = getattr(model.config, "final_logit_softcapping", None)
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
        planes = split(self.weight)
        for name, value in planes._asdict().items():
            setattr(self, name, value.view(torch.int32) if name in _BOUNDS else value)
        self.spec = self.spec | {"dtype": name_of(self.weight.dtype)}
        self.source, self._stamp = fingerprint(self.weight), self._state_of_weight()

    def _state_of_weight(self) -> Any:
        version = 0 if self.weight.is_inference() else self.weight._version
        return self.weight.data_ptr(), version, self.weight.dtype

    def _stale(self) -> bool:
        if self._stamp is None:  # filled by `load_state_dict`, planes and rows alike
            self._stamp = self._state_of_weight()
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
        names = (
            "calls",
            "rows",
            "special",
            "overflow",
            "ambiguous",
            "stale",
            "wide",
            "uncovered",
            "first",
            "second",
        )
        self._counts: dict[str, Any] = dict.fromkeys(names, 0)  # survivors are counted on the device
        self._uncertain = torch.zeros(3, dtype=torch.bool)

    # --- the search ---

    def _search(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [b, V], flags [b, 3]: special, overflow, ambiguous); no shape depends on what is found."""
        states = round_states(hidden)
        y = scores(self.high, self.scales, states, HIGH)
        if not self.nested:
            y += scores(self.low, self.scales, states, LOW)
        if self.bias is not None:
            y += self.bias.float()
        seeds = y.topk(min(SEEDS, self.out_features), sorted=False).indices
        best = self._true(hidden, seeds)
        threshold = best[0].topk(self.m).values[:, -1:]
        upper = y + self._error(states, "first" if self.nested else "second")
        # Where float32 underflows or overflows, its errors are not relative: nothing is proved.
        special = ~torch.isfinite(hidden).all(1) | (states.norms < _TINY) | ~torch.isfinite(upper).all(1)
        overflow = torch.zeros_like(special)
        if self.nested:
            ids, over, survivors = self._survivors(upper, threshold, self.capacity)
            overflow |= over
            self._counts["first"] += survivors
            rest = scores(self.low, self.scales, states, LOW, ids)
            upper = y.gather(1, ids) + rest + self._error(states, "second", ids)
            at, over, survivors = self._survivors(upper, threshold, min(FINALISTS, ids.shape[1]))
            finalists = ids.gather(1, at)
        else:
            finalists, over, survivors = self._survivors(upper, threshold, min(FINALISTS, self.out_features))
        overflow |= over
        self._counts["second"] += survivors
        ids, order = torch.cat([seeds, finalists], 1).sort(1)
        parts = zip(best, self._true(hidden, finalists), strict=True)
        low, high, z = (torch.cat(part, 1).gather(1, order) for part in parts)
        logits = torch.full(
            (len(hidden), self.out_features), -torch.inf, dtype=hidden.dtype, device=hidden.device
        )
        logits.scatter_(1, ids, z.to(hidden.dtype))
        return logits, torch.stack([special, overflow, self._ambiguous(ids, low, high, z)], 1)

    def _error(self, states: Any, bound: str, ids: Tensor | None = None) -> Tensor:
        """How much a dense logit may exceed a score, [b, V] or as ids, float32 rounded up.

        ||h|| rho for what the planes leave out, ||h - hq|| ||w'|| for the rounding of the state, and twice the rounding
        of a float32 product, in our score and in the dense head's logit.
        """
        n = states.norms.float()[:, None]
        slack = states.lost.float()[:, None] + 3 * rounding(self.in_features) * n
        rho, norms = (getattr(self, name).view(torch.float32) for name in (bound, "norms"))
        rho, norms = (rho, norms) if ids is None else (rho[ids], norms[ids])
        error = n * rho + slack * norms
        if self.bias is not None:
            error = error + 4 * rounding(self.in_features) * self.bias.float().abs().max()
        return error * (1 + 1e-5)

    def _survivors(self, upper: Tensor, threshold: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        """(the `capacity` tokens of largest bound, whether more could win, how many could)."""
        alive = self._seen(upper) >= self._seen(threshold)
        count = alive.sum(1)
        return upper.topk(capacity, sorted=False).indices, count > capacity, count.sum()

    def _true(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(least, largest, exact) logits [b, n] that the dense product may have for ids [b, n], before rounding."""
        rows, h = self.weight[ids].double(), hidden.double().nan_to_num(0.0, 0.0, 0.0)[:, :, None]
        z, size = (rows @ h)[..., 0], (rows.abs() @ h.abs())[..., 0]
        if self.bias is not None:
            beta = self.bias.double()[ids]
            z, size = z + beta, size + beta.abs()
        error = rounding(self.in_features) * size
        return (z - error).float(), (z + error).float(), z

    def _seen(self, logits: Tensor) -> Tensor:
        """What the model makes of a logit: rounded to its dtype, and capped in it. Monotone."""
        seen = logits.to(getattr(torch, self.spec["dtype"]))
        if self.softcap is not None:
            seen = (seen / self.softcap).tanh() * self.softcap
        return seen.float()

    def _ambiguous(self, ids: Tensor, low: Tensor, high: Tensor, z: Tensor) -> Tensor:
        """Whether rounding could change the m best, [b]; ids ascend, and one may stand twice.

        The winner w of m = 1 is certain if every other token u has hi_u < lo_w, or hi_u = lo_w and w < u. For m > 1
        the m-th must be clear of the next.
        """
        low, high, value = self._seen(low), self._seen(high), self._seen(z)
        repeated = torch.zeros_like(ids, dtype=torch.bool)
        repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
        low, high, value = (x.masked_fill(repeated, -torch.inf) for x in (low, high, value))
        order = value.argsort(dim=1, descending=True, stable=True)
        best, others = order[:, : self.m], order[:, self.m :]
        least = low.gather(1, best).amin(1, keepdim=True)
        rivals, names = high.gather(1, others), ids.gather(1, others)
        if self.m == 1:
            return ((rivals > least) | ((rivals == least) & (names < ids.gather(1, best)))).any(1)
        return (rivals >= least).any(1)

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
        config = kwargs.get("generation_config")

        def setting(key: str) -> Any:
            values = (
                kwargs.get(key),
                getattr(config, key, None),
                getattr(model.generation_config, key, None),
            )
            return next((value for value in values if value is not None), None)

        sampled = bool(setting("do_sample"))
        neutral = _NEUTRAL | _NEUTRAL_SAMPLED if sampled else _NEUTRAL
        if not all(any(setting(key) == value for value in values) for key, values in neutral.items()):
            return False
        top_k = setting("top_k")
        return not sampled or (50 if top_k is None else top_k) in range(1, self.m + 1)

    def bytes_per_step(self, batch: int = 1) -> int:
        """Bytes of planes, bounds and true rows for `batch` states, with full lists of survivors."""
        planes = [self.high, self.scales, self.first, self.norms] + ([] if self.nested else [self.low])
        rows = (SEEDS + FINALISTS) * self.in_features * self.weight.element_size()
        read = rows + self.nested * self.capacity * self.in_features // 2
        return sum(t.nbytes for t in planes) + batch * (read + self._row_bytes())


class ExactInt8Head(ExactHead):
    """Both planes at once: 8 bits for every token, then the true rows of the few that remain."""

    kind = "exact_int8"
    nested = False


class ExactNestedHead(ExactHead):
    """4 bits for every token, 4 more for survivors, then the true rows."""

    kind = "exact_nested"
    nested = True
