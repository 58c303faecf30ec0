"""Companions: auxiliary causal language models beside the one that generates.

A companion scores the next token of any text, `companion(input_ids, attention_mask)`, and is a pure function of
the two. It keeps the keys and values of the text it saw last, and continues from whatever part of that a new
call shares with it; nothing but the time shows whether it did. So a companion may be called with the rows of
beams, of a rolled back draft, or of another prompt, in any order, and several processors may share one.
"""

import contextlib
import functools
import math
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from .bundled import find_model
from .checks import one_of

Prompt = str | Sequence[int] | Callable[[list[int]], Sequence[int]]

_PROBE = (
    "The 2 naïve cafés,  tabs\tand\nlines; 日本 🙂 don't 1,234.5"  # texts that normalisers treat differently
)
_SPECIAL = ("bos_token_id", "eos_token_id", "unk_token_id")
_GROWING_ROPE = ("dynamic", "longrope")  # keys depend on the length of the text
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # layers whose cache can be cropped
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SPREAD = ("auto", "balanced")  # over all devices, in place of one
_NEAR = 1024  # widths of one vocabulary differ by padding at most


class ContextOverflow(ValueError):
    """A text is longer than what a companion reads."""


class CompanionDesync(RuntimeError):
    """A text did not continue the one before, though it was said to: the last result was wrong."""


class _State(NamedTuple):
    history: Tensor  # [rows, length] int64; -1 where there is no token
    cache: DynamicCache | None
    logits: Tensor  # [rows, positions, width] after the last tokens of the history
    whole: bool  # known to hold no padding


class Companion:
    """A causal LM that scores texts beside the host: `companion(ids [rows, length]) -> logits [rows, width]`.

    The result is a pure function of ids, mask and `generated`: cached equals uncached up to rounding (1e-4 in
    float32). Padding is never read and shifts no position.

    Parameters:
        model: any causal LM of transformers, also with an adapter of peft, used as it is: on its device, in its
            dtype. `Companion.load` takes a name.
        tokenizer: the model's own, to be compared with the host's.
        prompt: what the companion reads in place of the host's prompt: a text, token ids, or a function from
            the host's prompt (token ids without padding) to token ids. The generated tokens follow it.
        pad_token_id: for calls without a mask; that of the tokenizer or the model if left out, and where these have
            none the end of a text, as in transformers.
        cache: False computes every text anew, as is done anyway with models whose cache cannot be cropped: those
            with recurrent or convolutional layers (Mamba, Qwen3.5, LFM2) and with a RoPE that grows.
        overflow: what becomes of a text longer than the model reads. "error" raises `ContextOverflow`;
            "truncate" drops the oldest tokens, half a context at a time; "off" gives no opinion (None), so
            that processors leave the scores alone.

    Raises ValueError for an encoder-decoder model, TypeError for a name. Calls take turns; `fork` for parallel
    generations.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        prompt: Prompt | None = None,
        pad_token_id: int | None = None,
        cache: bool = True,
        overflow: Literal["error", "truncate", "off"] = "error",
    ):
        if isinstance(model, str | Path):
            raise TypeError(f"A companion is made of a loaded model; Companion.load({str(model)!r}) loads one by name.")
        config = model.config.get_text_config()
        self.name = Path(str(model.config.name_or_path)).name or type(model).__name__
        if model.config.is_encoder_decoder:
            raise _not_causal(self.name)
        if overflow not in ("error", "truncate", "off"):
            raise ValueError(f"overflow must be error, truncate or off, got {overflow!r}.")
        self.model, self.tokenizer, self.overflow = model, tokenizer, overflow
        self.prompt, self._given_prompt = _as_function(prompt, tokenizer), prompt
        ends = _listed(config.eos_token_id)
        pads = (pad_token_id, getattr(tokenizer, "pad_token_id", None), config.pad_token_id, *ends)
        self.pad_token_id = next((pad for pad in pads if pad is not None), None)
        self._ambiguous_pads = {config.bos_token_id, *ends}
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        self._cacheable = cache and not getattr(model, "_is_stateful", False)
        self._cacheable &= rope.get("rope_type") not in _GROWING_ROPE
        self._cacheable &= set(getattr(config, "layer_types", None) or ()) <= _ATTENTION
        self._saved: str | dict[str, Any] | None = None
        self._state: _State | None = None
        self._lock, self._warned = threading.RLock(), False
        self._lags = False  # see `lagging`
        self._unread: list[Callable[[], bool]] = []
        self._side: Any = None  # the stream of `start`, for which every call waits
        self._agrees: tuple[Any, tuple[Any, ...]] | None = None  # see `check_tokenizer`
        self.forwards = 0

    # --- scores ---

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        positions: int | None = None,
        generated: Tensor | None = None,
    ) -> Tensor | None:
        """Logits after the last token, [rows, width] float32.

        With `positions`, those after so many of the last tokens, [rows, positions, width], oldest first. Before
        the first token of a row all logits are 0; what stands for padding after it means nothing.

        Shapes: input_ids and attention_mask [rows, length]; a shorter mask is that of the prompt. Without a
        mask the leading pad tokens of each row are padding; where the pad token may also begin a text, the
        shortest such run of the batch is not (a warning says so, once). Negative ids are no tokens, ids beyond
        its vocabulary are read as its last one. The result is on the device of `input_ids`, without gradient;
        do not write into it.

        `generated` [rows]: how many trailing tokens are not prompt; a companion with a `prompt` needs it.

        Raises ValueError for a text of no columns; without `positions`, for a row that ends in padding; for
        NaN; and without `generated` where it is needed.
        """
        if input_ids.shape[1] == 0:
            raise ValueError(f"The text given to the companion {self.name} holds no token; begin with BOS.")
        history = torch.where(self._mask(input_ids, attention_mask), input_ids, -1)
        ends_in_padding = positions is None and not self._lags and int(history[:, -1].min()) < 0
        if ends_in_padding and bool((history >= 0).any(1)[history[:, -1] < 0].any()):
            raise ValueError("A prompt ends in padding; pad prompts on the left (padding_side='left').")
        if self.prompt is not None:
            history = self._prompted(history, generated, positions or 1)
        with self._lock, torch.no_grad():
            if self._side is not None:
                _streams(self.device).current_stream(self.device).wait_stream(self._side)
            logits = self._windowed(history.to(self.device), positions or 1)
        if logits is None:
            return None
        logits = logits.to(input_ids.device)
        return logits[:, 0] if positions is None else logits

    def start(self, newest: Tensor) -> None:
        """Go on with the texts seen last by a token each, newest [rows, 1], beside whatever the device does next.

        The call that asks about these texts waits for that on the device, not on the host, and finds the scores.
        While `lagging` only, which notices when it asks about others. Nothing happens before the first call, and
        where the texts are as long as the model reads.
        """
        with self._lock, torch.no_grad():
            state, device = self._state, self.device
            if not self._lags or state is None or state.cache is None or len(newest) != len(state.history):
                return
            if self.max_length is not None and state.history.shape[1] >= self.max_length:
                return
            streams, newest = _streams(device), newest.to(device)
            if self._side is None:
                self._side = streams.Stream(device) if device.type == "cuda" else streams.Stream()
            self._side.wait_stream(streams.current_stream(device))
            if device.type == "cuda":  # or what is freed meanwhile could be given away before it is read
                layers: list[Any] = state.cache.layers
                for part in (newest, state.history, *(p for layer in layers for p in (layer.keys, layer.values))):
                    part.record_stream(self._side)
            with streams.stream(self._side):
                self._scores(torch.cat([state.history, newest], 1), 1)

    def reset(self) -> None:
        """Forget the text seen last. It changes no result."""
        self._state = None

    def fork(self) -> "Companion":
        """Another companion with the same weights and an empty state."""
        twin = object.__new__(type(self))
        own: dict[str, Any] = {"_state": None, "_lags": False, "_unread": [], "_side": None, "forwards": 0}
        twin.__dict__ |= self.__dict__ | own | {"_lock": threading.RLock()}
        return twin

    @property
    def device(self) -> torch.device:
        """Where the model takes its ids."""
        return self.model.get_input_embeddings().weight.device

    @property
    def width(self) -> int:
        """How many tokens it scores."""
        head = self.model.get_output_embeddings()
        return getattr(head, "out_features", None) or self.model.config.get_text_config().vocab_size

    def memory(self) -> dict[str, int]:
        """Bytes held: `weights`, `cache` and `logits`."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        state = self._state
        layers: list[Any] = list(state.cache.layers) if state and state.cache else []
        size = lambda group: sum(t.numel() * t.element_size() for t in group)
        return {
            "weights": size({t.data_ptr(): t for t in tensors}.values()),
            "cache": size(part for layer in layers for part in (layer.keys, layer.values)),
            "logits": size([state.logits] if state else []),
        }

    def _mask(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is not None:
            mask = attention_mask.to(ids.device, torch.bool)
            missing = ids.shape[1] - mask.shape[1]
            return torch.nn.functional.pad(mask, (0, missing), value=True) if missing else mask
        if self.pad_token_id is None:
            return ids >= 0
        padding = (ids == self.pad_token_id).long().cumprod(1).sum(1, keepdim=True)
        if self.pad_token_id in self._ambiguous_pads:
            padding = padding - padding.min()  # the longest row of a padded batch has none
            if not self._warned and bool((padding > 0).any()):
                self._warned = True
                warnings.warn(
                    f"The pad token of the companion {self.name} may also be text, so padding was guessed from "
                    "the lengths of the rows; pass the attention mask: use logitproc.generate, or bind the "
                    "chain to its prompt.", stacklevel=4,
                )  # fmt: skip
        return (ids >= 0) & (torch.arange(ids.shape[1], device=ids.device) >= padding)

    def _prompted(self, history: Tensor, generated: Tensor | None, positions: int) -> Tensor:
        """The history with this companion's own prompt in place of the host's."""
        assert self.prompt is not None
        if generated is None:
            raise ValueError(
                f"The companion {self.name} has a prompt of its own and must be told where the host's ends: "
                "use logitproc.generate, or bind the chain to its prompt."
            )
        rows = []
        for row, count in zip(history.tolist(), generated.tolist(), strict=True):
            if count < positions - 1:
                raise ValueError("Positions inside the prompt have no scores under a prompt of its own.")
            cut = len(row) - count
            own = list(self.prompt([token for token in row[:cut] if token >= 0]))
            rows.append(own + row[cut:])
        longest = max(map(len, rows))
        return history.new_tensor([[-1] * (longest - len(row)) + row for row in rows])

    def _windowed(self, history: Tensor, positions: int) -> Tensor | None:
        """`_scores`, or what `overflow` says of a text that is too long."""
        if self.max_length is None or history.shape[1] <= self.max_length:
            return self._scores(history, positions)
        tokens = (history >= 0).cumsum(1)  # up to each column
        longest = int(tokens[:, -1].max())
        if longest <= self.max_length:
            return self._scores(history, positions)
        if self.overflow == "error":
            raise ContextOverflow(
                f"The companion {self.name} reads {self.max_length} tokens, the text has {longest}; shorten "
                "the prompt or generate fewer tokens."
            )
        if self.overflow == "off":
            warnings.warn(
                f"The companion {self.name} reads {self.max_length} tokens; in longer texts it has no say.",
                stacklevel=4,
            )
            return None
        # Half a context is dropped at a time, so that most steps can continue the one before.
        half = max(1, self.max_length // 2)
        dropped = (tokens[:, -positions:] - self.max_length).clamp(min=0).add(half - 1) // half * half
        if bool((dropped != dropped[:, :1]).any()):
            parts = [
                self._windowed(history[:, : history.shape[1] - back], 1)
                for back in reversed(range(positions))
            ]
            return torch.cat([part for part in parts if part is not None], dim=1)
        history = history.masked_fill(tokens <= dropped[:, -1:], -1)
        first = int((history >= 0).any(0).int().argmax())
        return self._scores(history[:, min(first, history.shape[1] - positions) :], positions)

    def _scores(self, history: Tensor, positions: int) -> Tensor:
        if not 1 <= positions <= history.shape[1]:
            raise ValueError(f"positions must be from 1 to the length {history.shape[1]}, got {positions}.")
        state, self._state = self._state, None  # whatever fails from here on leaves no state behind
        if state is not None and self._lags and positions == 1 and _may_follow(state, history):
            kept, whole = state.history.shape[1], state.whole
            if kept < history.shape[1]:
                self._settle()
            self._unread.append(read_later((history[:, :kept] != state.history).any()))
        else:
            state, kept = _continued(state, history, positions)
            whole = int(history.min()) >= 0
        if state is None or kept < history.shape[1]:
            cache = state.cache if state is not None and kept else None
            if cache is None:
                kept, cache = 0, DynamicCache() if self._cacheable else None
            state = _State(history, cache, self._forward(history, kept, cache, positions, whole), whole)
        self._state = state
        return state.logits[:, state.logits.shape[1] - positions :]

    @contextlib.contextmanager
    def lagging(self) -> Iterator[None]:
        """While one prompt is continued token by token: take that for granted and check it a step later.

        To see whether a text continues the one before, the host must wait for the device at every step. Here
        it looks at the answer of the step before instead. Raises CompanionDesync at the next call, or at the
        end, when a text did not follow; the step in between was wrong then. Not for beams and drafts.

        With padding, models whose attention is not the common one (sdpa over all tokens) wait all the same.
        """
        self.reset()
        self._lags = True
        try:
            yield
            self._settle()
        finally:
            self._lags, self._unread = False, []

    def _settle(self) -> None:
        unread, self._unread = self._unread, []
        if any(differs() for differs in unread):
            self.reset()
            raise CompanionDesync(
                f"The companion {self.name} was told that one text would be continued token by token, and "
                "another one came. Call reset() before a new prompt."
            )

    def _forward(
        self, history: Tensor, kept: int, cache: DynamicCache | None, positions: int, whole: bool
    ) -> Tensor:
        """Logits [rows, positions, width] after the last tokens, of which the cache holds the first `kept`."""
        rows, length = history.shape
        mask: Tensor | None = None
        if whole:  # most texts: nothing is to be masked, and each operation saved counts beside a small model
            position_ids = torch.arange(kept, length, device=history.device).expand(rows, -1)
        else:
            mask = history >= 0
            tokens = mask.cumsum(1)  # up to each column
            position_ids = (tokens[:, kept:] - 1).clamp(min=0)
        training = self.model.training
        if training:
            self.model.eval()
        try:
            output = self.model(
                input_ids=history[:, kept:].clamp(0, self.model.get_input_embeddings().weight.shape[0] - 1),
                attention_mask=None if mask is None else self._attention_mask(mask, kept),
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=positions,
            )
        finally:
            if training:
                self.model.train()
        self.forwards += 1
        logits = output.logits[:, -positions:].float()
        if mask is not None:
            logits = torch.where(tokens[:, -positions:, None] > 0, logits, 0.0)
        # The sum shows most texts to have none, at a third of the cost; it may also be NaN for infinities.
        if logits.device.type == "cpu" and math.isnan(float(logits.sum())) and bool(logits.isnan().any()):
            row = int(logits.isnan().flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"The companion {self.name} gave NaN for row {row} after {history.shape[1]} tokens."
            )
        return logits

    def _attention_mask(self, mask: Tensor, kept: int) -> Tensor:
        """What the model is given for mask [rows, length]; while it lags, in a form that it does not read back.

        transformers looks for padding in a mask of two dimensions, for which the host must wait at every step.
        """
        if self._lags and mask.shape[1] == kept + 1 and _takes_4d(self.model):
            return mask[:, None, None]
        return mask.long()

    # --- fits the host ---

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise ValueError, naming the first id that differs, unless `tokenizer` means the same by every id.

        One that was found to agree is not compared again until tokens are added or its marks change.
        """
        if self.tokenizer is None or tokenizer is self.tokenizer:
            return
        state = len(tokenizer), *(getattr(tokenizer, mark) for mark in _SPECIAL)
        if self._agrees is not None and self._agrees[0]() is tokenizer and self._agrees[1] == state:
            return
        ours = {i: token for token, i in self.tokenizer.get_vocab().items()}
        theirs = {i: token for token, i in tokenizer.get_vocab().items()}
        advice = "Fusing models needs one tokenizer."
        for i in sorted(ours.keys() & theirs.keys()):
            if ours[i] != theirs[i]:
                raise ValueError(
                    f"The companion {self.name} has another tokenizer: id {i} is {theirs[i]!r} for the host, "
                    f"{ours[i]!r} for the companion. {advice}"
                )
        for mark in _SPECIAL:
            host, own = getattr(tokenizer, mark), getattr(self.tokenizer, mark)
            if host != own:
                raise ValueError(
                    f"The companion {self.name} has another tokenizer: {mark} is {host} for the host, {own} "
                    f"for the companion. {advice}"
                )
        if tokenizer(_PROBE)["input_ids"] != self.tokenizer(_PROBE)["input_ids"]:
            raise ValueError(
                f"The companion {self.name} has the host's vocabulary but splits {_PROBE!r} differently. "
                f"{advice}"
            )
        self._agrees = weakref.ref(tokenizer), state

    def check_width(self, width: int) -> None:
        """Raise ValueError when it scores another vocabulary than the host, by the number of tokens."""
        if abs(self.width - width) > _NEAR:
            raise ValueError(
                f"The companion {self.name} scores {self.width} tokens, the model {width}; they need one "
                "tokenizer."
            )

    def reads_as(self, other: "Companion") -> bool:
        """Whether both read the same prompt: the host's, or the same one of their own."""
        return self._given_prompt == other._given_prompt

    def check_length(self, length: int, needed: bool = False) -> None:
        """Raise ContextOverflow when a text of this length is too long; `needed`: having no say is no way out."""
        refused = self.overflow == "error" or (needed and self.overflow == "off")
        if refused and self.max_length is not None and length > self.max_length:
            raise ContextOverflow(
                f"The companion {self.name} reads {self.max_length} tokens; the prompt and the new tokens are "
                f"{length}. Generate fewer, or load it with overflow='truncate'."
            )

    # --- by name ---

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        prompt: str | None = None,
        overflow: Literal["error", "truncate", "off"] = "error",
        base: Path | None = None,
    ) -> Self:
        """The companion of that name: a folder (relative to `base`), a bundled model, or ORG/NAME on the hub.

        One process loads a model once, and as long as a companion is in use the same arguments give the same
        object. `device` is a GPU if there is one; "auto" or "balanced" spreads the model over all. `dtype` is
        "float32", "bfloat16", "float16" or, as stored, "auto". Raises FileNotFoundError when there is no such
        model, MemoryError when it does not fit on the device, ValueError for a device that is not there.
        """
        folder = base / model if base is not None and (base / model).is_dir() else Path(model)
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} is an adapter without its model; save the two merged (peft: merge_and_unload); name that."
            )
        source = find_model(str(folder))
        one_of("dtype", dtype, _DTYPES)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        weights = (source, revision, dtype, place)
        with _loading:
            found = _loaded.get((weights, prompt, overflow))
            if found is not None:
                return found
            twin = next((c for (used, *_), c in _loaded.items() if used == weights), None)
            if twin is None:
                loaded = _load_model(str(model), source, revision, dtype, place)
                tokenizer = _load_tokenizer(source, revision)
            else:
                loaded, tokenizer = twin.model, twin.tokenizer
            companion = cls(loaded, tokenizer, prompt=prompt, overflow=overflow)
            companion.name = str(model)
            given = {"revision": revision, "device": device, "prompt": prompt}
            given |= {"dtype": None if dtype == "auto" else dtype}
            given |= {"overflow": None if overflow == "error" else overflow}
            given = {key: value for key, value in given.items() if value is not None}
            name = str(Path(source).resolve()) if folder.is_dir() else str(model)
            companion._saved = {"model": name, **given} if given else name
            return _loaded.setdefault((weights, prompt, overflow), companion)

    @classmethod
    def from_parameter(cls, value: Any, base: Path | None = None) -> Any:
        """What a chain file says of a companion: its name, a mapping of `load`'s arguments, or a list of these.

        What is a companion already, or None, is returned as it is.
        """
        if isinstance(value, str | Path):
            return cls.load(value, base=base)
        if isinstance(value, dict):
            if "model" not in value:
                raise ValueError(f"A companion is a name or a mapping with a 'model', got {value!r}.")
            known = {"model", "revision", "dtype", "device", "prompt", "overflow"}
            if unknown := set(value) - known:
                raise ValueError(
                    f"A companion has no {sorted(unknown)[0]!r}; known: {', '.join(sorted(known))}."
                )
            return cls.load(**value, base=base)
        if isinstance(value, list | tuple):
            return tuple(cls.from_parameter(item, base) for item in value)
        return value

    def saved(self) -> str | dict[str, Any]:
        """What `from_parameter` reads: its name, never weights. ValueError for a model made in memory."""
        if self._saved is None:
            raise ValueError(
                f"The companion {self.name} was made from a model in memory, so no saved chain can name it: "
                "use Companion.load(name or folder)."
            )
        return self._saved

    def __repr__(self) -> str:
        return f"Companion({self.name})"


# --- texts ---


def find_parents(old: Tensor, new: Tensor) -> Tensor | None:
    """For each row of `new` [n, length] the first row of `old` [m, length or more] that begins with it.

    None when a row has none.
    """
    if old.shape[1] < new.shape[1]:
        return None
    equal = (new[:, None] == old[None, :, : new.shape[1]]).all(-1)
    return equal.int().argmax(1) if bool(equal.any(1).all()) else None


def _continued(state: _State | None, history: Tensor, positions: int) -> tuple[_State | None, int]:
    """The state cut down to what `history` shares with it, and how many of its columns that are.

    The whole length stands for "its logits are those asked for": nothing is to be computed.
    """
    if state is None:
        return None, 0
    rows, length = history.shape
    had = state.history.shape[1]
    common = _common(state.history, history) if state.history.shape[0] == rows else 0
    if common == length == had and positions <= state.logits.shape[1]:
        return state, length
    kept, cache = common, state.cache
    if cache is None:
        return None, 0
    if kept < length - 1:  # the rows may have moved
        parents = find_parents(state.history, history[:, :-1])
        if parents is not None:
            cache.batch_select_indices(parents)
            kept = length - 1
    kept = max(0, min(kept, length - positions))
    if kept and kept < had:
        cache.crop(kept - had)
    return state, kept


def _may_follow(state: _State, history: Tensor) -> bool:
    """Whether it can be the same text, or the same and a token more, by its shape."""
    rows, length = state.history.shape
    return state.cache is not None and history.shape in ((rows, length), (rows, length + 1))


def read_later(bit: Tensor) -> Callable[[], bool]:
    """A function that tells the bit, without making the host wait for the device now."""
    if bit.device.type != "cuda":
        return lambda: bool(bit)
    copy, copied = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
    copy.copy_(bit, non_blocking=True)
    copied.record()

    def read() -> bool:
        copied.synchronize()
        return bool(copy)

    return read


def _streams(device: torch.device) -> Any:
    """The module with the streams of a device; those of a CPU do nothing."""
    return torch.cuda if device.type == "cuda" else torch.cpu


def _takes_4d(model: Any) -> bool:
    """Whether every layer takes a mask [rows, 1, tokens, length] as it is: true may be attended to."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        getattr(model, "_supports_attention_backend", False)
        and config._attn_implementation == "sdpa"
        and layers == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
    )


def _common(a: Tensor, b: Tensor) -> int:
    """How many leading columns are equal in all rows."""
    length = min(a.shape[1], b.shape[1])
    if torch.equal(a[:, :length], b[:, :length]):  # at most steps
        return length
    differs = (a[:, :length] != b[:, :length]).any(0)
    return int(differs.int().argmax())


def _as_function(prompt: Prompt | None, tokenizer: Any) -> Callable[[list[int]], Sequence[int]] | None:
    if prompt is None or callable(prompt):
        return prompt
    if isinstance(prompt, str) and tokenizer is None:
        raise ValueError("A companion with a prompt of text needs its tokenizer.")
    ids: list[int] = list(tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
    return lambda host: ids


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


# --- models ---

_loaded: "weakref.WeakValueDictionary[tuple, Any]" = weakref.WeakValueDictionary()
_loading = threading.Lock()


def _not_causal(name: str) -> ValueError:
    return ValueError(f"The companion {name} is an encoder-decoder; a companion is a causal LM.")


def _load_model(name: str, source: str, revision: str | None, dtype: str, device: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except OSError as error:  # which may not say what was looked for
        raise FileNotFoundError(f"The companion {name} was not found: {error}") from None
    if config.is_encoder_decoder:
        raise _not_causal(name)
    spread = device in _SPREAD
    if not spread:
        _check_device(name, device)
    print(f"Loading the companion {name} on {device} (dtype {dtype}) ...", file=sys.stderr)
    place = {"device_map": device} if spread else {}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=dtype, **place).eval()
        return model if spread else model.to(device)
    except torch.OutOfMemoryError:
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config, dtype=config.dtype if dtype == "auto" else dtype)
        size = sum(p.numel() * p.element_size() for p in whole.parameters())
        raise MemoryError(
            f"The companion {name} does not fit on {device}: its weights are {size / 2**30:.2f} GiB. Load it "
            "on another device or in a smaller dtype."
        ) from None


def _check_device(name: str, device: str) -> None:
    try:
        known = torch.device(device)
    except RuntimeError:
        known = None
    count = torch.cuda.device_count()
    if known is None or (known.type == "cuda" and (known.index or 0) >= count):
        raise ValueError(
            f"The companion {name} cannot be on device {device!r}; take cpu, cuda, cuda:N, {' or '.join(_SPREAD)} "
            f"(torch sees {count} CUDA devices)."
        )


def _load_tokenizer(source: str, revision: str | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError):  # a model saved without its tokenizer
        return None


def tiny_companion(width: int, seed: int = 0) -> Companion:
    """A tiny random companion of this width, for `Processor.example`. Saving it writes a temporary folder."""
    return _tiny(width, seed).fork()


@functools.cache
def _tiny(width: int, seed: int) -> Companion:
    config = LlamaConfig(
        vocab_size=width, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.4, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    return _Tiny(model)


class _Tiny(Companion):
    def saved(self) -> str:
        return _folder_of(self.model).name


@functools.cache
def _folder_of(model: Any) -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="logitproc-")
    model.save_pretrained(folder.name)
    return folder
