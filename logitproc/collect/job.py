"""The job file: what to generate, how much of it and how. Checked whole before anything is loaded."""

import dataclasses
import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import yaml

from ..chain import parse_yaml
from ..checks import in_range, one_of
from ..registry import unknown

PLACEHOLDERS = ("text_type", "Text_type", "label", "text")
Sync = Literal["round", "async"]


@dataclass(frozen=True)
class Sampling:
    """How a text is drawn. top_k 0, top_p 1 and min_p 0 are off. A text ends at the first of `stop`, beside what
    the template puts after it."""

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _whole("generation.max_new_tokens", self.max_new_tokens, 1)
        _whole("generation.min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        _whole("generation.top_k", self.top_k, 0)
        in_range("generation.temperature", self.temperature, 0.01, 100)
        in_range("generation.top_p", self.top_p, 1e-6, 1)
        in_range("generation.min_p", self.min_p, 0, 1)


@dataclass(frozen=True)
class Memory:
    """What the ledger forgets: see `TokenLedger`."""

    window: int | None = None
    decay: float | None = None


@dataclass(frozen=True)
class Oracle:
    """Files of real labelled texts (csv, tsv, jsonl with `text` and `label`), to judge labels and students with."""

    train: str
    test: str | None = None


class Item(NamedTuple):
    """One text to be made; `replicate` counts the items of one label and prompt."""

    id: str
    label: str
    prompt_id: int
    replicate: int
    round: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """A collection of labelled texts: labels x wordings x replicates, in rounds.

    Parameters:
        labels: label -> its wording in the prompt, or several, which are taken in turn.
        template: one example in full, with {label} and {text}, and {text_type} or {Text_type} (capitalised).
            A prompt is the template up to {text}; what follows {text} on its line ends a text.
        text_type: what is written: "movie review".
        items_per_label: one number for all labels, or label -> number.
        seed_examples: label -> texts. Each prompt begins with `shots` of them, drawn for this item, in the form
            of the template; `shots_of` "own" shows those of the item's label, "all" so many of every label.
        generation: see `Sampling`. chain: processors, as in a chain file. A processor that reads a ledger and is
            given none reads the job's own, as it was when the round began. ledger: see `Memory`.
        model, dtype: a bundled model, a folder or ORG/NAME; auto: as it is stored.
        seed: of all draws. batch_size: texts generated at once. round_items: texts of a round; the ledger is
            updated between rounds.
        sync: "round": processes wait for each other after a round, and any number of them makes the same items.
            "async": they do not, which is faster and does not repeat.
        retries: how often a text that is empty or a duplicate is drawn again.
        plain_items_per_label: so many texts are also sampled without the chain, for comparison; 0 for none.
        oracle: see `Oracle`. embeddings: a sentence-transformers model for the report.

    Raises ValueError or LookupError (unknown keys, with near ones), a sentence each.
    """

    labels: dict[str, tuple[str, ...]]
    template: str
    items_per_label: dict[str, int]
    text_type: str = "text"
    seed_examples: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shots: int = 1
    shots_of: Literal["own", "all"] = "own"
    generation: Sampling = field(default_factory=Sampling)
    chain: tuple[dict[str, Any], ...] = ()
    ledger: Memory = field(default_factory=Memory)
    model: str = "base"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0
    batch_size: int = 10
    round_items: int = 20
    sync: Sync = "round"
    retries: int = 10
    plain_items_per_label: int = 50
    oracle: Oracle | None = None
    embeddings: str | None = None

    # These say where and how a report is made, and change no item.
    REPORTING = ("plain_items_per_label", "oracle", "embeddings")

    @classmethod
    def from_file(cls, path: str | Path, settings: Sequence[str] = ()) -> Self:
        """Read a YAML or JSON file; `settings` are KEY=VALUE, with dots (generation.top_p=0.9), and beat it."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no job file {path}.")
        try:
            given = parse_yaml(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(given, dict):
            raise ValueError(f"{path} is no job: it holds no mapping of keys to values.")
        for setting in settings:
            _set(given, setting)
        return cls.from_dict(given, path.parent)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], base: Path = Path()) -> Self:
        """Build a job from what a job file holds; files in it lie in `base`, else where the path leads from here."""
        given = dict(given)
        _check_keys("key of the job file", given, cls)
        for key in ("labels", "template", "items_per_label"):
            if key not in given:
                raise ValueError(f"The job file needs {key!r}.")
        labels = given["labels"]
        if not isinstance(labels, Mapping) or not labels:
            raise ValueError("labels must map each label to its wording: {positive: positive sentiment}.")
        given["labels"] = {str(label): _texts(f"labels.{label}", words) for label, words in labels.items()}
        given["items_per_label"] = _items(given["items_per_label"], given["labels"])
        examples = given.get("seed_examples") or {}
        if not isinstance(examples, Mapping):
            raise ValueError("seed_examples must map each label to a list of texts.")
        given["seed_examples"] = {
            str(label): _texts(f"seed_examples.{label}", texts) for label, texts in examples.items()
        }
        for key, kind in {"generation": Sampling, "ledger": Memory, "oracle": Oracle}.items():
            if given.get(key) is not None:
                given[key] = _section(key, given[key], kind)
            elif key != "oracle":
                given.pop(key, None)
        if given.get("oracle"):
            beside = lambda name: str(base / name) if (base / name).is_file() else name
            given["oracle"] = Oracle(**{key: beside(name) for key, name in vars(given["oracle"]).items() if name})
        given["chain"] = _chain(given.get("chain") or [], base)
        return cls(**given)

    def __post_init__(self) -> None:
        if not isinstance(self.template, str):
            raise ValueError(f"template must be text, got {self.template!r:.60}.")
        for name in re.findall(r"\{(\w*)\}", self.template):
            if name not in PLACEHOLDERS:
                raise unknown("placeholder of the template", name, PLACEHOLDERS)
        for name in ("label", "text"):
            if f"{{{name}}}" not in self.template:
                raise ValueError(f"The template needs the placeholder {{{name}}}: {self.template!r:.80}.")
        if self.template.count("{text}") > 1:
            raise ValueError(f"The template holds {{text}} more than once: {self.template!r:.80}.")
        if self.template.index("{label}") > self.template.index("{text}"):
            raise ValueError("The template needs {label} before {text}: a prompt ends where the text begins.")
        for label in self.seed_examples:
            if label not in self.labels:
                raise unknown("label in seed_examples", label, self.labels)
        for key, low in (("shots", 0), ("seed", 0), ("batch_size", 1), ("round_items", 1), ("retries", 0),
                         ("plain_items_per_label", 0)):  # fmt: skip
            _whole(key, getattr(self, key), low)
        one_of("sync", self.sync, get_args(Sync))
        one_of("shots_of", self.shots_of, ("own", "all"))
        one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        for key in ("text_type", "model"):
            if not isinstance(getattr(self, key), str) or not getattr(self, key):
                raise ValueError(f"{key} must be text, got {getattr(self, key)!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists: what `from_dict` reads, every default filled in."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def digest(self, about: Mapping[str, Any]) -> str:
        """Of everything that decides which items are made; `about` are fingerprints of the model, its tokenizer and
        the chain's processors, which stand in for their names and folders."""
        free = (*self.REPORTING, "model", "chain")
        given = {key: value for key, value in self.to_dict().items() if key not in free}
        return _hash(given, about)

    def plain(self) -> Self | None:
        """The job that the report compares with: without chain and memory, `plain_items_per_label` items of each
        label. None when there is nothing to compare."""
        if not self.chain or not self.plain_items_per_label:
            return None
        number = {label: min(n, self.plain_items_per_label) for label, n in self.items_per_label.items()}
        return dataclasses.replace(self, chain=(), ledger=Memory(), items_per_label=number)

    def items(self, digest: str) -> list[Item]:
        """Everything to be made, in order: labels take turns, so that each round is balanced."""
        order = []
        for number in range(max(self.items_per_label.values())):
            for label, wordings in self.labels.items():
                if number < self.items_per_label[label]:
                    order.append((label, number % len(wordings), number // len(wordings)))
        return [
            Item(_hash(digest, *key)[:16], *key, at // self.round_items) for at, key in enumerate(order)
        ]

    def prompt(self, item: Item, seed: int) -> str:
        """The prompt of an item: seed examples drawn with its seed, then the template up to {text}."""
        draw = random.Random(seed)
        return self._prompt(item, lambda texts, number: draw.sample(texts, number), draw.shuffle)

    def longest_prompt(self, item: Item) -> str:
        """The prompt that shows the longest examples."""
        return self._prompt(item, lambda texts, number: sorted(texts, key=len)[-number:], lambda shown: None)

    def _prompt(self, item: Item, choose: Callable, shuffle: Callable) -> str:
        shown = []
        for label in [item.label] if self.shots_of == "own" else self.labels:
            texts = self.seed_examples.get(label, ())
            wording = self.labels[label][item.prompt_id % len(self.labels[label])]
            if number := min(self.shots, len(texts)):
                shown += [self._fill(self.template, wording, text) for text in choose(texts, number)]
        shuffle(shown)
        opening = self._fill(self.template.partition("{text}")[0], self.labels[item.label][item.prompt_id])
        # A text begins with the space before it: after a space of its own the model sees no beginning of a word.
        return "".join(example.strip() + "\n\n" for example in shown) + opening.rstrip(" ")

    @property
    def stop(self) -> list[str]:
        """Strings that end a text."""
        after = self.template.partition("{text}")[2].partition("\n")[0].strip()
        return [*([after] if after else []), *self.generation.stop]

    def _fill(self, template: str, wording: str, text: str = "") -> str:
        kind = self.text_type
        values = {"label": wording, "text": text, "text_type": kind, "Text_type": kind[:1].upper() + kind[1:]}
        return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


def seed_of(item_id: str, attempt: int) -> int:
    """The seed of an item's draws: 63 bits of a hash of its id, another one for each attempt."""
    return int(_hash(item_id, attempt)[:16], 16) >> 1


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --- checks ---


def _check_keys(kind: str, given: Mapping[str, Any], cls: type) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            raise unknown(kind, str(key), known)


def _section(key: str, given: Any, kind: type) -> Any:
    if not isinstance(given, Mapping):
        raise ValueError(f"{key} must be a mapping of keys to values, got {given!r:.60}.")
    _check_keys(f"key of {key}", given, kind)
    given = dict(given)
    if "stop" in given:
        given["stop"] = _texts("generation.stop", given["stop"] or (), empty=True)
        if "" in given["stop"]:
            raise ValueError("generation.stop holds an empty string, which would end every text; leave it out.")
    if kind is Oracle and not given.get("train"):
        raise ValueError("oracle needs train, a file of real labelled texts: {train: real.csv}.")
    return kind(**given)


def _texts(key: str, given: Any, empty: bool = False) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list | tuple) else None
    if texts is None or not all(isinstance(text, str) for text in texts) or not (texts or empty):
        raise ValueError(f"{key} must be a text or a list of texts, got {given!r:.60}.")
    return texts


def _items(given: Any, labels: Mapping[str, Any]) -> dict[str, int]:
    if not isinstance(given, Mapping):
        _whole("items_per_label", given, 1)
        return dict.fromkeys(labels, given)
    for label in given:
        if str(label) not in labels:
            raise unknown("label in items_per_label", str(label), labels)
    numbers = {str(label): number for label, number in given.items()}
    for label in labels:
        if label not in numbers:
            raise ValueError(f"items_per_label has no items for the label {label!r}; give a number of at least 1.")
        _whole(f"items_per_label.{label}", numbers[label], 1)
    return {label: numbers[label] for label in labels}


def _chain(given: Any, base: Path) -> tuple[dict[str, Any], ...]:
    """Dicts with a name; folders that lie beside the job file become paths from here."""
    if not isinstance(given, list | tuple):
        raise ValueError(f"chain must be a list of processors, each with a name, got {given!r:.60}.")
    found = []
    for item in given:
        item = {"name": item} if isinstance(item, str) else item
        if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
            raise ValueError(f"Each processor of the chain needs a name, got {item!r:.60}.")
        beside = lambda value: isinstance(value, str) and (base / value / "artifact.json").is_file()
        found.append({key: str(base / value) if beside(value) else value for key, value in item.items()})
    return tuple(found)


def _set(given: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    *path, last = key.strip().split(".")
    if not equals or not last:
        raise ValueError(f"--set {setting!r} is not KEY=VALUE.")
    for part in path:
        given = given.setdefault(part, {})
        if not isinstance(given, dict):
            raise ValueError(f"--set {setting!r}: {part!r} has no keys of its own.")
    given[last] = parse_yaml(value)


def _whole(key: str, value: Any, low: int, high: float = math.inf) -> None:
    if not isinstance(value, int):
        raise ValueError(f"{key} must be a whole number, got {value!r}.")
    in_range(key, value, low, high)


