"""Chain: an ordered list of processors that is itself one `LogitsProcessor`.

transformers inspects the signature of every entry of `logits_processor` at every step, drops an entry
that equals an earlier one, and passes no attention mask. A chain is one entry, loops by itself, and can be
bound to the prompt. It has a declarative form: a list of `{"name": ..., parameter: value}`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import LogitsProcessor

from . import registry
from .artifact import Artifact, new_folder
from .processor import Processor

VERSION = 1
_FILE = "chain.json"


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

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids [rows, length] int64, scores [rows, width] -> processed scores [rows, width]."""
        for processor in self.processors:
            scores = processor.apply(input_ids, scores)
        return scores

    def apply(self, history: Tensor, scores: Tensor, generated: Tensor | None = None) -> Tensor:
        """Process rows as `Processor.apply` does, one processor after the other."""
        for processor in self.processors:
            scores = processor.apply(history, scores, generated)
        return scores

    def bind(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> LogitsProcessor:
        """This chain for one prompt: input_ids and attention_mask [rows, length].

        The bound chain hides padding from the processors and tells them which tokens were generated. It
        holds no state: it may be called at any length, in any order, for beams and repeated rows.
        """
        return _BoundChain(self, input_ids.shape[1], attention_mask)

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
            return cls._from_file(Path(spec))
        if isinstance(spec, Mapping):
            if spec.get("version", VERSION) > VERSION:
                raise ValueError(
                    f"The chain has version {spec['version']}; this logitproc reads up to {VERSION}. "
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

    @classmethod
    def _from_file(cls, path: Path) -> Self:
        import yaml

        if not path.is_file():
            raise FileNotFoundError(f"There is no chain file {path}.")
        try:
            spec = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is neither YAML nor JSON: {reason}") from None
        return cls.from_spec(spec if spec is not None else [], base=path.parent)

    def save_pretrained(self, folder: str | Path, force: bool = False) -> None:
        """Write `chain.json` and one folder for each artifact; all or nothing."""
        from . import __version__

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
                    item[key] = value
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
        return cls._from_file(Path(folder) / _FILE)

    def __repr__(self) -> str:
        return f"Chain([{', '.join(p.name for p in self.processors)}])"

    def _all(self, flag: str) -> bool:
        return all(getattr(processor, flag) for processor in self.processors)


class _BoundChain(LogitsProcessor):
    def __init__(self, chain: Chain, prompt: int, attention_mask: Tensor | None):
        self.chain, self.prompt = chain, prompt
        self.padded = None if attention_mask is None else attention_mask[:, :prompt] == 0
        self.supports_continuous_batching = False  # it knows one prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows, length = input_ids.shape
        if self.padded is not None and length >= self.prompt > 0:
            # Beams and num_return_sequences repeat each prompt, rows of one prompt side by side.
            padded = self.padded.to(input_ids.device)
            padded = padded.repeat_interleave(rows // padded.shape[0], dim=0)
            padded = torch.nn.functional.pad(padded, (0, length - self.prompt))
            input_ids = input_ids.masked_fill(padded, -1)
        generated = torch.full_like(scores[:, 0], max(0, length - self.prompt), dtype=torch.int64)
        return self.chain.apply(input_ids, scores, generated)


def parse_processor(text: str) -> dict[str, Any]:
    """`NAME:key=value,key=value` -> {"name": NAME, key: value}; values are YAML scalars or flow lists.

    Raises ValueError naming the part that is not `key=value`.
    """
    import yaml

    name, _, rest = text.partition(":")
    spec: dict[str, Any] = {"name": name.strip()}
    for part in re.split(r",(?![^\[{]*[\]}])", rest) if rest.strip() else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"In --proc {text!r}, {part!r} is not key=value.")
        spec[key.strip()] = yaml.safe_load(value)
    return spec
