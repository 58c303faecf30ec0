"""The contract: a method is a row-wise pure function of (tokens, scores).

Subclass `Processor`, write `step`, decorate with `@register`. Everything that all methods share (float32
arithmetic, history slicing, the input's dtype) is written here once. `tests/test_contract.py` checks every
registered method against every promise.
"""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .artifact import Artifact
from .companion import Companion
from .evidence import from_prompt
from .registry import unknown


class Processor(LogitsProcessor):
    """Base of every method: `step(tokens [rows, context], scores [rows, width]) -> scores [rows, width]`.

    Row i of the result depends on row i of the inputs and on the fields of the instance only. `tokens`
    are the last `context` ids of each row, oldest first; an id of -1 stands for "no token" (padding, or
    a history that is too short). `scores` are float32: logits under greedy decoding and sampling,
    log-probabilities under beam search, so a method depends on their softmax and not on their offset.

    A `step` that declares the keyword `generated` also receives an int64 [rows] tensor: how many of the
    trailing tokens of each row were generated rather than prompted. Plain `model.generate` does not
    tell a processor where the prompt ends; unless the chain is bound to its prompt (`Chain.bind`, which
    `logitproc.generate` does), all tokens count as generated. An instance that does without sets
    `reads_generated` to False.

    Parameters are the fields of a dataclass declared with `eq=False`: transformers drops a processor
    that equals an earlier one. Fields that hold an `Artifact` are listed in `artifacts`.

    Fields that hold a `Companion`, a sequence of them or None are listed in `companions`; `context` is then
    None. For each, in that order, `step` receives a further argument [rows, width] float32: the companion's
    logits after the same tokens, cut to the width of the scores or filled up with -inf.

        step(tokens, scores, *companion_scores)

    A method whose step depends on how well something predicted the tokens so far gathers `evidence`: numbers
    that accumulate along a text. It says how many (`evidence_size`), what a token adds (`evidence`), and, if
    that is no plain sum, how it is added (`accumulate`); its `step` declares the keyword `evidence` and
    receives [rows, evidence_size] float32, what the tokens so far have added up to, 0 at the start. A chain
    keeps that for each text while it is generated, and `scoring` for each position. The method itself
    remembers nothing. With `learns_from_drawn` False only given tokens are evidence, prompts and texts that are
    scored, and none that the chain draws itself.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    artifacts: ClassVar[dict[str, type[Artifact]]] = {}

    # How many trailing tokens `step` reads; None means all of them. May be a property.
    context: int | None = 0

    # Capabilities; what is not supported is refused before the first token, never ignored.
    supports_beam: ClassVar[bool] = True
    supports_assisted: ClassVar[bool] = True
    supports_continuous_batching: bool = False  # transformers passes no history there
    argmax_invariant: ClassVar[bool] = False  # True: greedy decoding is unaffected
    companions: ClassVar[tuple[str, ...]] = ()  # fields that hold auxiliary models

    # How many numbers a text gathers; 0 for a method that needs none. May be a property.
    evidence_size: int = 0
    learns_from_drawn: bool = True

    reads_generated: bool = False  # whether `step` receives `generated`; True where it declares it

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__name__  # until `register` names it: a subclass never passes for its parent
        cls.reads_generated = "generated" in inspect.signature(cls.step).parameters

    def step(self, tokens: Tensor, scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define step().")

    def evidence(self, tokens: Tensor, scores: Tensor | None, *companion_scores: Tensor) -> Tensor | None:
        """What each row's next token adds: tokens [rows] int64 -> [rows, evidence_size] float32.

        `scores` and `companion_scores` are what `step` received, or would have, before those tokens. `scores`
        is None for tokens of the prompt: nobody told the chain what the host thought of them. None as the
        result says that these tokens add nothing and leave no trace.
        """
        raise NotImplementedError(f"{type(self).__name__} must define evidence().")

    def accumulate(self, total: Tensor, evidence: Tensor) -> Tensor:
        """What a text has gathered after one more token: both and the result [rows, evidence_size]."""
        return total + evidence

    @classmethod
    def example(cls, width: int) -> Self:
        """A small instance that changes scores of the given width; tests and `describe` use it."""
        raise NotImplementedError(f"{cls.__name__} must define example().")

    @classmethod
    def neutral(cls, width: int) -> Self:
        """The instance whose parameters leave the scores as they are, bit for bit."""
        raise NotImplementedError(f"{cls.__name__} must define neutral().")

    @classmethod
    def variants(cls, width: int) -> "dict[str, Processor]":
        """Instances that between them take every path through `step`; the contract is tested on each."""
        return {"example": cls.example(width)}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The transformers interface: input_ids [rows, length] int64, scores [rows, width]."""
        return self.apply(input_ids, scores)

    def apply(
        self,
        history: Tensor,
        scores: Tensor,
        generated: Tensor | None = None,
        companion_scores: Sequence[Tensor] | None = None,
        evidence: Tensor | None = None,
    ) -> Tensor:
        """Process rows: history [rows, length] int64 (-1 where there is no token), scores [rows, width].

        `generated` is described above; None means that the whole history was generated, and that companions
        guess which leading tokens are padding. `companion_scores` and `evidence` are what `step` receives;
        None: companions are asked now, and all tokens so far count as prompt. The inputs are not modified; the
        result has the shape, dtype and device of `scores`.
        """
        z = scores if scores.dtype is torch.float32 else scores.float()
        if companion_scores is None:
            companion_scores = self.consult(history, scores.shape[1], generated)
        if companion_scores is None:
            return scores
        known: dict[str, Tensor] = {}
        if self.evidence_size:
            if evidence is None:
                evidence = from_prompt(self, history, scores.shape[1], generated)
            known["evidence"] = evidence
        if self.reads_generated:
            if generated is None:
                generated = history.new_full((history.shape[0],), history.shape[1])
            known["generated"] = generated
        out = self.step(trailing(history, self.context), z, *companion_scores, **known)
        return out if out.dtype is scores.dtype else out.to(scores.dtype)

    def consult(
        self, history: Tensor, width: int, generated: Tensor | None = None, positions: int | None = None
    ) -> list[Tensor] | None:
        """The scores of each companion, as `step` receives them; None when one has no say in these texts.

        [rows, width] each, after the last token; with `positions` [rows, positions, width], after the last ones.
        """
        if not self.companions:  # most methods, at every step
            return []
        mask = None if generated is None else history >= 0
        found = [companion(history, mask, positions, generated) for companion in self.auxiliaries()]
        said = [as_wide(part, width) for part in found if part is not None]
        return said if len(said) == len(found) else None

    def auxiliaries(self) -> list[Companion]:
        """The companions of all fields, in order."""
        values = [getattr(self, key) for key in self.companions]
        flat = [value if isinstance(value, Sequence) else [value] for value in values if value is not None]
        return [companion for group in flat for companion in group]

    def check_width(self, width: int) -> None:
        """Raise ValueError when a fitted part or a companion does not fit scores of this width."""
        for artifact in self._artifacts():
            size = artifact.tokenizer["vocab_size"]
            if size > width:
                raise ValueError(
                    f"{self.name!r} was fitted for a vocabulary of {size} tokens; this model scores "
                    f"{width}. Fit it with this model's tokenizer."
                )
        for companion in self.auxiliaries():
            companion.check_width(width)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise ValueError when a fitted part or a companion belongs to another tokenizer."""
        for artifact in self._artifacts():
            artifact.check_tokenizer(tokenizer)
        for companion in self.auxiliaries():
            companion.check_tokenizer(tokenizer)

    def parameters(self) -> dict[str, Any]:
        """Field name -> value, artifacts and companions included."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]

    @classmethod
    def from_parameters(cls, parameters: dict[str, Any], base: Path | None = None) -> Self:
        """Build an instance; artifacts may be given as folders, relative to `base` or bundled by name.

        Companions may be given as `Companion.from_parameter` reads them. Unknown parameters raise LookupError
        with near names.
        """
        known = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        for key in parameters:
            if key not in known:
                raise unknown(f"parameter of {cls.name!r}", key, known)
        required = [
            f.name
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            if f.init and f.default is f.default_factory is dataclasses.MISSING
        ]
        for key in required:
            if key not in parameters:
                raise ValueError(f"{cls.name!r} needs the parameter {key!r}: --proc {cls.name}:{key}=...")
        loaded = dict(parameters)
        for key, kind in cls.artifacts.items():
            if isinstance(loaded.get(key), str | Path):
                loaded[key] = kind.load(loaded[key], base=base)
        for key in cls.companions:
            if key in loaded:
                loaded[key] = Companion.from_parameter(loaded[key], base)
        return cls(**loaded)

    def _artifacts(self) -> list[Artifact]:
        values = (getattr(self, key) for key in self.artifacts)
        return [value for value in values if value is not None]


def trailing(history: Tensor, context: int | None) -> Tensor:
    """The last `context` columns, filled up on the left with -1; all columns for None."""
    length = history.shape[1]
    if context is None or length == context:
        return history
    if length > context:
        return history[:, length - context :]
    return torch.nn.functional.pad(history, (context - length, 0), value=-1)


def as_wide(scores: Tensor, width: int) -> Tensor:
    """Cut the last dimension to `width`, or fill it up with -inf: what a companion does not know."""
    if scores.shape[-1] >= width:
        return scores[..., :width]
    return torch.nn.functional.pad(scores, (0, width - scores.shape[-1]), value=-torch.inf)
