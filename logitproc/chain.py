"""Chain: an ordered list of processors that is itself one `LogitsProcessor`.

transformers inspects the signature of every entry of `logits_processor` at every step, drops an entry
that equals an earlier one, and passes no attention mask. A chain is one entry, loops by itself, and can be
bound to the prompt. It has a declarative form: a list of `{"name": ..., parameter: value}`.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import yaml
from torch import Tensor
from transformers import LogitsProcessor

from . import registry
from .artifact import Artifact, new_folder
from .companion import Companion
from .evidence import Gathered, Seen, from_prompt, gather
from .processor import Processor, as_wide

VERSION = 1
_FILE = "chain.json"

# The scores of a processor's companions for texts [rows, length], of which so many tokens were generated.
Ask = Callable[[Processor, Tensor, Tensor | None], list[Tensor] | None]


class Positions(NamedTuple):
    """What `Chain.apply_positions` returns."""

    scores: Tensor  # [B, K, V], processed
    totals: dict[int, Tensor]  # what each processor of that index had gathered at each position, [B, K, E]
    seen: dict[int, Seen]  # what it was given there, rows [B K]


class Chain(LogitsProcessor):
    """Apply processors in order: `model.generate(**inputs, logits_processor=[Chain([...])])`.

    Each processor keeps at least one finite score in a row that has one, so the chain does too, and no
    guard runs at the end. An empty chain returns the scores as they are.

    Raises TypeError for an entry that is no `Processor`.
    """

    def __init__(self, processors: Sequence[Processor] = ()):
        for processor in processors:
            if not isinstance(processor, Processor):
                raise TypeError(
                    f"A Chain holds logitproc processors, got {type(processor).__name__}. Pass other "
                    "LogitsProcessors beside the chain: logits_processor=[chain, other]."
                )
        self.processors = tuple(processors)
        contexts = [p.context for p in self.processors]
        self.context = None if None in contexts else max(contexts, default=0)  # type: ignore[type-var]
        self.supports_continuous_batching = self._all("supports_continuous_batching")
        self._gathered = Gathered(self)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [rows, length] int64, scores [rows, width] -> processed scores [rows, width]."""
        return self._gathered.apply(input_ids, scores)

    def apply(
        self,
        history: Tensor,
        scores: Tensor,
        generated: Tensor | None = None,
        ask: Ask | None = None,
        evidence: Mapping[int, Tensor] | None = None,
        seen: dict[int, Seen] | None = None,
    ) -> Tensor:
        """Process rows as `Processor.apply` does, one processor after the other.

        `ask` gives the scores of a processor's companions; by default they are asked now. `evidence` is what
        the texts have gathered for the processor of each index. What those see that learn from drawn tokens is put
        into `seen`.
        """
        for index, processor in enumerate(self.processors):
            if ask is None:
                companion_scores = processor.consult(history, scores.shape[1], generated)
            else:
                companion_scores = ask(processor, history, generated)
            if companion_scores is None:
                continue
            if seen is not None and processor.evidence_size and processor.learns_from_drawn:
                seen[index] = Seen(scores.float(), companion_scores)
            total = None if evidence is None else evidence.get(index)
            scores = processor.apply(history, scores, generated, companion_scores, total)
        return scores

    def apply_positions(
        self,
        history: Tensor,
        scores: Tensor,
        generated: Tensor,
        ask: Ask,
        totals: Mapping[int, Tensor] | None = None,
        drawn: bool = False,
    ) -> Positions:
        """Process the last K positions of B texts at once, as step after step would.

        Shapes: history [B, T], scores [B, K, V]; generated [B, K], how many of the tokens up to a position are
        not prompt. `totals` is the evidence of each text before the first of the positions, [B, E] per
        processor, 0 by default; `drawn` is that of `gather`. `ask` gives the scores of companions; its rows are
        all positions of the first text, then those of the next.
        """
        (rows, count), first = scores.shape[:2], history.shape[1] - scores.shape[1]
        at = torch.arange(rows * count, device=history.device)
        texts = histories(history, at // count, first + at % count, self.context)
        out, done = scores.flatten(0, 1), Positions(scores, {}, {})
        for index, processor in enumerate(self.processors):
            companion_scores = ask(processor, texts, generated.flatten())
            if companion_scores is None:
                continue
            evidence = None
            if processor.evidence_size:
                done.seen[index] = seen = Seen(out.float(), companion_scores)
                total = torch.zeros(rows, processor.evidence_size, device=scores.device)
                total = (totals or {}).get(index, total)
                inside = at[at % count < count - 1]  # positions that a token of the history follows
                done.totals[index] = gather(
                    processor, total, history[:, first + 1 :], seen.take(inside), generated[:, 1:] > 0, drawn
                )
                evidence = done.totals[index].flatten(0, 1)
            out = processor.apply(texts, out, generated.flatten(), companion_scores, evidence)
        return done._replace(scores=out.unflatten(0, (rows, count)))

    @property
    def companions(self) -> list[Companion]:
        """The distinct companions of all processors."""
        found = {id(c): c for processor in self.processors for c in processor.auxiliaries()}
        return list(found.values())

    def bind(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> "BoundChain":
        """This chain for one prompt: input_ids and attention_mask [rows, length].

        The bound chain hides padding from the processors and their companions and tells them which tokens
        were generated. It may be called at any length, in any order, for beams and repeated rows; only where a
        method gathers evidence must generated tokens come one at a time.
        """
        return BoundChain(self, input_ids.shape[1], attention_mask)

    def require(self, *, beams: bool = False, assisted: bool = False) -> None:
        """Raise ValueError naming the first processor that lacks a capability this decoding needs."""
        wanted = {"supports_beam": beams, "supports_assisted": assisted}
        words = {"supports_beam": "beam search", "supports_assisted": "assisted decoding"}
        for processor in self.processors:
            for flag, needed in wanted.items():
                if needed and not getattr(processor, flag):
                    raise ValueError(
                        f"{processor.name!r} does not support {words[flag]}; decode without it or take "
                        f"{processor.name!r} out of the chain."
                    )

    def check(self, *, width: int | None = None, tokenizer: Any = None) -> None:
        """Raise ValueError when a fitted part does not fit the model's width or tokenizer."""
        for processor in self.processors:
            if tokenizer is not None:
                processor.check_tokenizer(tokenizer)
            if width is not None:
                processor.check_width(width)

    # --- the declarative form ---

    @classmethod
    def from_spec(cls, spec: Any, base: Path | None = None) -> Self:
        """Build a chain from a list of dicts, a dict with `processors`, or a YAML or JSON file.

        Folders in the spec are relative to `base` (the file's own folder for a file). Unknown names and
        parameters raise LookupError with near names; a malformed spec raises ValueError.
        """
        if isinstance(spec, str | Path):
            base, spec = Path(spec).parent, _read(Path(spec))
        if isinstance(spec, Mapping):
            version = spec.get("version", VERSION)
            if not isinstance(version, int) or version > VERSION:
                raise ValueError(
                    f"The chain has version {version!r}; this logitproc reads up to {VERSION}. "
                    "Upgrade logitproc."
                )
            for key in spec:
                if key not in ("version", "library", "processors"):
                    raise registry.unknown("key of a chain", key, ["version", "processors"])
            spec = spec.get("processors")
        if not isinstance(spec, Sequence) or isinstance(spec, str):
            raise ValueError("A chain is a list of processors, each a mapping with a 'name'.")
        processors = []
        for item in spec:
            if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
                raise ValueError(f"Each processor of a chain is a mapping with a 'name', got {item!r}.")
            parameters = {key: value for key, value in item.items() if key != "name"}
            processors.append(registry.get(item["name"]).from_parameters(parameters, base))
        return cls(processors)

    def save_pretrained(self, folder: str | Path, force: bool = False) -> None:
        """Write `chain.json` and one folder for each artifact; all or nothing.

        Raises ValueError for a processor whose class is not registered: no name would lead back to it.
        """
        from . import __version__

        for processor in self.processors:
            name = processor.name
            if name not in registry.names() or registry.get(name) is not type(processor):
                raise ValueError(f"{name} is not registered, so no saved chain can name it; use @register.")

        saved: dict[int, str] = {}
        spec = []
        with new_folder(folder, force) as new:
            for index, processor in enumerate(self.processors):
                item: dict[str, Any] = {"name": processor.name}
                for key, value in processor.parameters().items():
                    if isinstance(value, Artifact):
                        if id(value) not in saved:
                            saved[id(value)] = f"{index}-{processor.name}-{key}"
                            value.save(new / saved[id(value)])
                        value = saved[id(value)]
                    item[key] = _saved(value)
                spec.append(item)
            document = {"version": VERSION, "library": __version__, "processors": spec}
            (new / _FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, revision: str | None = None) -> Self:
        """Load what `save_pretrained` wrote: a folder, or a repository of the Hugging Face hub."""
        if not Path(folder).is_dir():
            if revision is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
                raise FileNotFoundError(f"There is no folder {folder}.")
            from huggingface_hub import snapshot_download

            folder = snapshot_download(str(folder), revision=revision)
        return cls.from_spec(Path(folder) / _FILE)

    def __repr__(self) -> str:
        return f"Chain([{', '.join(p.name for p in self.processors)}])"

    def _all(self, flag: str) -> bool:
        return all(getattr(processor, flag) for processor in self.processors)


class BoundChain(LogitsProcessor):
    """A chain that knows its prompt; see `Chain.bind`."""

    def __init__(self, chain: Chain, prompt: int, attention_mask: Tensor | None):
        self.chain, self.prompt = chain, prompt
        self.padded = None if attention_mask is None else attention_mask[:, :prompt] == 0
        if self.padded is not None and not bool(self.padded.any()):
            self.padded = None
        self.supports_continuous_batching = False  # it knows one prompt
        self._gathered = Gathered(chain, prompt)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        generated = torch.full_like(scores[:, 0], max(0, input_ids.shape[1] - self.prompt), dtype=torch.int64)
        return self._gathered.apply(self.hide(input_ids), scores, generated)

    @contextlib.contextmanager
    def lagging(self) -> Iterator[None]:
        """While each call continues the texts of the one before by a token: no step waits for the device.

        See `Companion.lagging`; errors as there. Not for beams and drafts.
        """
        with contextlib.ExitStack() as stack:
            for companion in self.chain.companions:
                stack.enter_context(companion.lagging())
            stack.enter_context(self._gathered.lagging())
            yield

    def hide(self, input_ids: Tensor) -> Tensor:
        """The ids [rows, length] with -1 for padding."""
        rows, length = input_ids.shape
        if self.padded is None or not length >= self.prompt > 0:
            return input_ids
        # Beams and num_return_sequences repeat each prompt, rows of one prompt side by side.
        padded = self.padded.to(input_ids.device)
        padded = padded.repeat_interleave(rows // padded.shape[0], dim=0)
        return input_ids.masked_fill(torch.nn.functional.pad(padded, (0, length - self.prompt)), -1)

    def evidence(self, input_ids: Tensor, width: int) -> dict[int, Tensor]:
        """What each processor, by its index, has gathered from the prompt: [rows, E]."""
        generated = torch.zeros_like(input_ids[:, 0])
        return {
            index: from_prompt(processor, self.hide(input_ids), width, generated)
            for index, processor in enumerate(self.chain.processors)
            if processor.evidence_size
        }


def asks(heard: Mapping[int, Tensor], rows: tuple[Any, Any], width: int) -> Ask:
    """Answers from what companions, by id, have said at all positions [B, K, V]: indices b and k of the rows.

    A processor with a companion that was not heard asks for itself.
    """

    def ask(processor: Processor, texts: Tensor, generated: Tensor | None) -> list[Tensor] | None:
        companions = processor.auxiliaries()
        if all(id(companion) in heard for companion in companions):
            return [as_wide(heard[id(companion)][rows], width) for companion in companions]
        return processor.consult(texts, width, generated)

    return ask


def histories(ids: Tensor, b: Tensor, t: Tensor, context: int | None) -> Tensor:
    """The last `context` tokens up to position t of text b (all for None), -1 where there are none."""
    width = int(t.max()) + 1 if context is None else context
    padded = torch.nn.functional.pad(ids, (width, 0), value=-1)
    return padded.unfold(1, width, 1)[b, t + 1]


def parse_processor(text: str) -> dict[str, Any]:
    """`NAME:key=value,key=value` -> {"name": NAME, key: value}; values are YAML scalars or flow lists.

    A comma inside quotes or brackets belongs to the value. Raises ValueError naming the part that is not
    `key=value`, or the key that is given twice.
    """
    name, _, rest = text.partition(":")
    spec: dict[str, Any] = {"name": name.strip()}
    for part in _split(rest) if rest.strip() else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and key and value):
            raise ValueError(f"In --proc {text!r}, {part!r} is not key=value.")
        if key in spec:
            raise ValueError(f"In --proc {text!r}, {key!r} is given twice.")
        try:
            spec[key] = parse_yaml(value)
        except yaml.YAMLError as error:
            raise ValueError(f"In --proc {text!r}, {part!r} has no value: {_one_line(error)}") from None
    return spec


def _saved(value: Any) -> Any:
    """A parameter as a chain file holds it: companions by name."""
    if isinstance(value, Companion):
        return value.saved()
    return [_saved(item) for item in value] if isinstance(value, list | tuple) else value


def _split(text: str) -> list[str]:
    """The parts between the commas that are outside quotes and brackets."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if char == "," and not depth and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and parts[-1][-1:] in "=[{:, ":  # an apostrophe within a word is a letter
            quote = char
        else:
            depth += (char in "[{") - (char in "]}")
        parts[-1] += char
    return parts


def _read(path: Path) -> Any:
    """What a YAML or JSON file holds, a list or a mapping."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no chain file {path}.")
    try:
        text = path.read_text(encoding="utf-8")
        spec = json.loads(text) if path.suffix == ".json" else parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {_one_line(error)}") from None
    if not isinstance(spec, Mapping | list):
        raise ValueError(f"{path} is no chain: it holds neither a list of processors nor a mapping.")
    return spec


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-5 is a number, as in JSON and YAML 1.2; PyYAML asks for 1.0e-5."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
