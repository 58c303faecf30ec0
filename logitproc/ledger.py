"""TokenLedger: what was generated so far, counted between generations.

A processor remembers nothing. What grows from one generation to the next is this object: counts of the
generated tokens by shard (a process), round and label. Per shard it is a grow-only counter, so ledgers merge
in any order, and merging one twice changes nothing. Windows and decay are computed on reading, from the
numbers of the rounds and not from the order of arrival.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from .artifact import Artifact, describe_tokenizer, narrowest, swap_artifact

Label = str | None


class Cell(NamedTuple):
    """What one shard generated in one round for one label. Never changed, only replaced: views share it."""

    ids: np.ndarray | None  # int32, ascending: the tokens that occur; None: `counts` holds every token
    counts: np.ndarray  # the narrowest integers; float32 for what decayed to fractions
    items: int
    texts: tuple[np.ndarray, ...]  # int32, the items themselves, if the ledger keeps them

    @classmethod
    def of(cls, counts: np.ndarray, items: int, texts: tuple[np.ndarray, ...]) -> Self:
        """From dense counts [V]; takes at most 4 bytes a token of the vocabulary below 2^31 of each."""
        ids = np.flatnonzero(counts).astype(np.int32)
        full = 2 * len(ids) > len(counts)
        kept = counts if full else counts[ids]
        whole = kept.astype(np.int64)
        narrow = whole.astype(narrowest(whole)) if (whole == kept).all() else kept.astype(np.float32)
        return cls(None if full else ids, narrow, items, texts)

    def add_to(self, total: np.ndarray, weight: float = 1) -> None:
        """total [V] += weight * counts."""
        if self.ids is None:
            total += self.counts if weight == 1 else self.counts * weight
        else:
            total[self.ids] += self.counts if weight == 1 else self.counts * weight


class Shard(NamedTuple):
    """The part of a ledger that one process writes."""

    items: int  # completed items, those of dropped rounds included
    rounds: dict[int, dict[Label, Cell]]


class TokenLedger(Artifact):
    """Counts of the tokens of completed generations, by shard, round and label.

    Parameters:
        tokenizer: of the model that generates, or what `describe_tokenizer` says of it.
        window: count the last so many rounds only; None for all.
        decay: count a token of k rounds ago as decay**k tokens, in (0, 1]; None for 1.
        texts: keep the items too, 4 bytes a token, which the rule "dry" of `suppression` searches. They obey
            the window, not the decay.

    Memory is bounded: rounds older than the window are dropped, and without a window every round before the
    latest is folded into one (decayed). A round of a label takes 4 bytes a token of the vocabulary at most,
    below 2^31 occurrences of each.

    Example:
        >>> ledger = TokenLedger(tokenizer)
        >>> ledger.update(generated_ids, label="positive", round=0)
        >>> ledger.counts("positive")  # int64 [V]
    """

    kind = "token-ledger"

    def __init__(
        self, tokenizer: Any, window: int | None = None, decay: float | None = None, texts: bool = False
    ):
        if window is not None and not (isinstance(window, int) and window >= 1):
            raise ValueError(f"window must be a whole number of rounds, at least 1, or None; got {window!r}.")
        if decay is not None and not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], or None; got {decay!r}.")
        if window is not None and decay is not None:
            raise ValueError("A ledger forgets by a window or by decay; give one of them.")
        self.tokenizer = tokenizer if isinstance(tokenizer, dict) else describe_tokenizer(tokenizer)
        self.vocab_size: int = self.tokenizer["vocab_size"]
        self.window, self.decay, self.keeps_texts = window, decay, texts
        self._shards: dict[int, Shard] = {}
        self._before: int | None = None  # a view that holds the rounds before this one

    def __repr__(self) -> str:
        return f"TokenLedger({sum(self.items.values()):,} items, {len(self.labels)} labels)"

    # --- writing ---

    def update(
        self, items: Iterable[Sequence[int]], label: Label = None, round: int = 0, shard: int = 0
    ) -> None:
        """Count completed items: the generated ids of each, without the prompt; or a tensor [items, n].

        Nothing from the first end-of-text token on is counted, so padding may follow it. Rounds of a shard
        never go back. Raises ValueError for an id outside the vocabulary, an earlier round and a view.
        """
        self._check_writable()
        texts = [self._generated(item) for item in (items.tolist() if hasattr(items, "tolist") else items)]
        rounds = self._shards[shard].rounds if shard in self._shards else {}
        if round < 0:
            raise ValueError(f"Rounds are numbered from 0, got {round}.")
        if rounds and round < max(rounds):
            raise ValueError(
                f"Shard {shard} has reached round {max(rounds)}; round {round} is over and takes no more items."
            )
        tokens = np.concatenate([np.empty(0, np.int32), *texts])
        counts = np.bincount(tokens, minlength=self.vocab_size)
        cells = dict(rounds.get(round, {}))
        before = cells.get(label, Cell.of(self._zeros(), 0, ()))
        before.add_to(counts)
        kept = before.texts + tuple(texts) if self.keeps_texts else ()
        cells[label] = Cell.of(counts, before.items + len(texts), kept)
        done = self.items.get(shard, 0) + len(texts)
        self._shards[shard] = Shard(done, self._forget({**rounds, round: cells}))

    def merge(self, other: "TokenLedger") -> None:
        """Take from `other` every shard that is further there: commutative, associative, idempotent.

        Raises ValueError when the ledgers belong to other tokenizers, or forget in other ways.
        """
        self._check_writable()
        for key in ("window", "decay", "keeps_texts"):
            if getattr(self, key) != getattr(other, key):
                raise ValueError(
                    f"Ledgers merge when made alike: {key} is {getattr(self, key)} here and "
                    f"{getattr(other, key)} there."
                )
        if self.tokenizer["fingerprint"] != other.tokenizer["fingerprint"]:
            raise ValueError(
                f"Ledgers merge when they count the same tokens: this one is of {self.tokenizer['name']}, the "
                f"other of {other.tokenizer['name']}."
            )
        for shard, theirs in other._shards.items():
            if shard not in self._shards or theirs.items > self._shards[shard].items:
                self._shards[shard] = theirs

    def _generated(self, item: Any) -> np.ndarray:
        ids = np.asarray(item.tolist() if hasattr(item, "tolist") else item, dtype=np.int64)
        eos = self.tokenizer["eos"]
        if eos is not None and eos in ids:
            ids = ids[: np.argmax(ids == eos)]
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"Ids must be from 0 to {self.vocab_size - 1}; got {ids.min()} to {ids.max()}.")
        return ids.astype(np.int32)

    def _forget(self, rounds: dict[int, dict[Label, Cell]]) -> dict[int, dict[Label, Cell]]:
        """Without a window: the latest round, and all before it folded into one."""
        latest = max(rounds)
        if self.window is not None:
            return {r: cells for r, cells in rounds.items() if r >= latest - self.window}
        earlier = [r for r in rounds if r < latest]
        if len(earlier) < 2:
            return rounds
        into = max(earlier)
        labels = {label for r in earlier for label in rounds[r]}
        return {into: {x: self._fold(rounds, earlier, into, x) for x in labels}, latest: rounds[latest]}

    def _fold(self, rounds: dict, earlier: list[int], into: int, label: Label) -> Cell:
        cells = [(r, rounds[r][label]) for r in sorted(earlier) if label in rounds[r]]
        total = self._zeros()
        for r, cell in cells:
            cell.add_to(total, self._weight(into - r))
        return Cell.of(total, sum(c.items for _, c in cells), sum((c.texts for _, c in cells), ()))

    def _check_writable(self) -> None:
        if self._before is not None:
            raise ValueError("This is a view of a ledger and does not change; update the ledger itself.")

    # --- reading ---

    def view(self, round: int | None = None) -> "TokenLedger":
        """This ledger as it is now, which no later `update` changes; with `round`, what came before it.

        Raises ValueError when rounds before `round` are folded together with later ones.
        """
        now = self._latest() + 1 if self._before is None else self._before
        before = now if round is None else round if self._before is None else min(now, round)
        view = type(self)(self.tokenizer, self.window, self.decay, self.keeps_texts)
        view._before = before
        for number, shard in self._shards.items():
            if 0 < before < self._known_from(shard):
                raise ValueError(
                    f"Shard {number} is in round {max(shard.rounds)} and no longer knows what came before "
                    f"round {before}; rebuild the ledger from the items."
                )
            rounds = {r: cells for r, cells in shard.rounds.items() if r < before}
            items = sum(cell.items for cells in rounds.values() for cell in cells.values())
            view._shards[number] = Shard(items, rounds)
        return view

    def _known_from(self, shard: Shard) -> int:
        """The first round whose beginning the shard still knows."""
        latest, oldest = max(shard.rounds, default=0), min(shard.rounds, default=0)
        if self.window is not None:
            return latest if latest > self.window else 0
        return oldest + 1 if len(shard.rounds) > 1 else 0

    @property
    def labels(self) -> list[Label]:
        """Labels that something was counted for, sorted; None, for items without one, comes first."""
        return sorted({label for _, label, _ in self._cells()}, key=_label_order)

    @property
    def items(self) -> dict[int, int]:
        """Shard -> number of completed items."""
        return {number: self._shards[number].items for number in sorted(self._shards)}

    def counts(self, label: Label = None) -> np.ndarray:
        """How often each token was generated for `label`, or at all: [V] int64; float64 with decay."""
        total = self._zeros()
        for age, of, cell in self._cells():
            if label is None or of == label:
                cell.add_to(total, self._weight(age))
        return total

    def texts(self, label: Label = None) -> list[np.ndarray]:
        """The ids of each item for `label`, or of all items. Raises ValueError when they are not kept."""
        if not self.keeps_texts:
            raise ValueError("This ledger keeps counts only; make it with texts=True to keep the items.")
        return [text for _, of, cell in self._cells() if label is None or of == label for text in cell.texts]

    def hash(self) -> str:
        """SHA-256 of what a reader sees: the same for the same items in any number of shards.

        With decay the last digit of a count may depend on how the items were shared out.
        """
        digest = hashlib.sha256(json.dumps([self.tokenizer["fingerprint"], self.labels]).encode())
        for label in self.labels:
            total = self._zeros()
            texts = []
            for age, of, cell in self._cells():
                if of == label:
                    cell.add_to(total, self._weight(age))
                    texts += [text.tobytes() for text in cell.texts]
            digest.update(total.astype(np.int64 if self.decay is None else np.float32).tobytes())
            for text in sorted(texts):
                digest.update(len(text).to_bytes(8, "little") + text)
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of the counts and texts in memory."""
        cells = [cell for s in self._shards.values() for cells in s.rounds.values() for cell in cells.values()]
        arrays = [array for cell in cells for array in (cell.ids, cell.counts, *cell.texts)]
        return sum(array.nbytes for array in arrays if array is not None)

    def _cells(self) -> Iterator[tuple[int, Label, Cell]]:
        """(age in rounds, label, cell) of all that counts, in an order that merging does not change."""
        latest = self._latest() if self._before is None else self._before - 1
        for number in sorted(self._shards):
            for r, cells in sorted(self._shards[number].rounds.items()):
                if self.window is None or r > latest - self.window:
                    for label in sorted(cells, key=_label_order):
                        yield latest - r, label, cells[label]

    def _latest(self) -> int:
        return max((r for shard in self._shards.values() for r in shard.rounds), default=-1)

    def _zeros(self) -> np.ndarray:
        return np.zeros(self.vocab_size, np.int64 if self.decay is None else np.float64)

    def _weight(self, age: int) -> float:
        return 1 if self.decay is None else self.decay**age

    # --- saved form ---

    def save(self, folder: str | Path, force: bool = True) -> None:
        """Write the ledger as a folder, or replace the one there: killed at any moment, a folder holds the
        old state or the new one. With `force` off an existing folder is refused."""
        if Path(folder).exists() and force:
            swap_artifact(Path(folder), self.kind, self.tokenizer, *self._state())
        else:
            super().save(folder)

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        labels = sorted(
            {x for s in self._shards.values() for cells in s.rounds.values() for x in cells}, key=_label_order
        )
        table: list[list[int]] = []
        ids, counts, texts = [], [], list[np.ndarray]()
        for number in sorted(self._shards):
            for r, cells in sorted(self._shards[number].rounds.items()):
                for label in sorted(cells, key=_label_order):
                    cell = cells[label]
                    occur = np.flatnonzero(cell.counts) if cell.ids is None else cell.ids
                    table.append([number, r, labels.index(label), len(occur), cell.items, len(cell.texts)])
                    ids.append(occur)
                    counts.append(cell.counts[occur] if cell.ids is None else cell.counts)
                    texts += cell.texts
        arrays = {
            "cells": np.array(table, np.int64).reshape(-1, 6),  # shard, round, label, tokens, items, texts
            "ids": _joined(ids, np.int32),
            "counts": _joined(counts, np.int64 if self.decay is None else np.float64),
            "lengths": np.array([len(text) for text in texts], np.int64),
            "texts": _joined(texts, np.int32),
        }
        scalars = {
            "window": self.window, "decay": self.decay, "keeps_texts": self.keeps_texts, "labels": labels,
            "items": [list(pair) for pair in self.items.items()], "before": self._before,
        }  # fmt: skip
        return scalars, arrays

    @classmethod
    def _restore(cls, tokenizer: dict, scalars: dict, arrays: dict[str, np.ndarray]) -> Self:
        ledger = cls(tokenizer, scalars["window"], scalars["decay"], scalars["keeps_texts"])
        ledger._before = scalars["before"]
        ledger._shards = {number: Shard(items, {}) for number, items in scalars["items"]}
        ends = np.cumsum(arrays["lengths"])
        texts = np.split(arrays["texts"].astype(np.int32), ends[:-1]) if len(ends) else []
        at = first = 0
        for number, r, label, tokens, items, n_texts in arrays["cells"].tolist():
            span = slice(at, at + tokens)
            dense = ledger._zeros()
            dense[arrays["ids"][span]] = arrays["counts"][span]
            cell = Cell.of(dense, items, tuple(texts[first : first + n_texts]))
            ledger._shards[number].rounds.setdefault(r, {})[scalars["labels"][label]] = cell
            at, first = at + tokens, first + n_texts
        return ledger


def _label_order(label: Label) -> tuple[bool, str]:
    return label is not None, label or ""


def _joined(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)
