"""Counting n-grams of any corpus in bounded memory: sort, spill, merge.

Every predicted token gives one window: the token and the N - 1 symbols before it. Windows are packed into
64-bit integers, sorted and counted in memory, and spilled as a sorted run whenever the buffer is full. At
the end the runs are merged in ranges of keys that fit in memory, and the lower orders follow by adding up.

Symbols are the token ids 0..V-1, V for the start of a document (`<s>`, never predicted) and V + 1 for
"nothing here", which fills windows at a document's start. A window is ordered from the newest token of its
context to the oldest, the predicted token last, so that a context stands beside all that extend it.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from .artifact import write_text

FORMAT = 1
_MANIFEST = "manifest.json"
_MERGE_SHARE = 4  # a merge holds several copies of its windows where a spill holds about two


class NGramCounter:
    """Counts the n-grams of orders 1..`order`; keeps its work in `folder` and resumes from it.

    A document x_1..x_T is read as y = (<s>, x_1, .., x_T, eos), without eos where that is None. Counted
    are, for every position t >= 1 and every n <= order that fits, y[t-n+1..t]; none spans two documents.

    `memory_tokens` sets the memory (about 60 bytes a token; twice that where a window needs two words) and
    never the result. Constructing on a folder that another counter left, whether killed or finished,
    continues it: `documents` tells how many documents it holds, which the caller skips. What had not been
    spilled is forgotten, the folder is consistent at every moment.

    Raises ValueError for parameters out of range, and for a folder with other parameters or damaged files.
    """

    def __init__(
        self, folder: Path, order: int, vocab_size: int, eos: int | None, memory_tokens: int = 1 << 23
    ):
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}.")
        if not 1 <= vocab_size <= 2**31 - 3:  # symbols are kept as int32
            raise ValueError(f"vocab_size must be from 1 to 2**31 - 3, got {vocab_size}.")
        if eos is not None and not 0 <= eos < vocab_size:
            raise ValueError(f"eos must be None or an id below the vocabulary size {vocab_size}, got {eos}.")
        if memory_tokens < 1:
            raise ValueError(f"memory_tokens must be at least 1, got {memory_tokens}.")
        self.folder, self.order, self.vocab_size, self.eos = Path(folder), order, vocab_size, eos
        self.memory_tokens = memory_tokens
        self._base = vocab_size + 2
        self._widths = _word_widths(order, self._base)
        self._buffer: list[tuple[np.ndarray, int, int]] = []  # symbols, documents, tokens of each add()
        self._spilled = self._read_manifest()
        self._check_runs()

    @property
    def documents(self) -> int:
        """Documents added so far, those of a resumed folder included."""
        return self._spilled.documents + sum(documents for _, documents, _ in self._buffer)

    @property
    def tokens(self) -> int:
        """Predicted tokens so far, ends of documents included."""
        return self._spilled.tokens + sum(tokens for _, _, tokens in self._buffer)

    def add(self, documents: Sequence[Sequence[int] | np.ndarray]) -> None:
        """Count documents of token ids; all of them or, when one is refused, none.

        Raises ValueError for an id outside [0, vocab_size), OSError when the disk is full (what was
        spilled before stays, and the call may be repeated by a new counter on the folder).
        """
        if len(documents) == 0:
            return
        texts = [_flat(document) for document in documents]
        ids = np.concatenate(texts)
        bad = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(bad):
            raise ValueError(f"Token id {bad[0]} is outside the vocabulary of {self.vocab_size} tokens.")
        none, start = self.vocab_size + 1, self.vocab_size
        lead = np.array([none] * (self.order - 2) + [start] * (self.order > 1), np.int32)
        tail = np.array([] if self.eos is None else [self.eos], np.int32)
        stream = np.concatenate([piece for text in texts for piece in (lead, text, tail)]).astype(np.int32)
        self._buffer.append((stream, len(texts), len(ids) + len(texts) * len(tail)))
        if sum(len(symbols) for symbols, _, _ in self._buffer) >= self.memory_tokens:
            self._spill()

    def finish(self) -> tuple[dict[str, int], dict[str, np.ndarray]]:
        """Merge all runs. Returns scalars {"documents", "tokens", "order"} and memory-mapped arrays.

        The arrays are a trie of contexts, C_n of order n and E_n n-grams (C_1 = 1, the empty context).
        The contexts of order n are the distinct (w_{n-1}, .., w_1), newest first, in ascending order:

            oldest_n     [C_n]      the token w_1 of each context, vocab_size for <s>     n = 2..order
            children_n   [C_{n-1}]  how many contexts of order n extend each of order n-1  n = 2..order
            followers_n  [C_n]      how many distinct tokens follow each context           n = 1..order
            ids_n        [E_n]      these tokens, ascending within a context               n = 1..order
            counts_n     [E_n]      how often each was seen                                n = 1..order

        counts are int64, all else int32. The number of runs, their order and `memory_tokens` change no
        byte. May be called again, also after more documents. Raises ValueError when nothing was counted.
        """
        self._spill()
        if not self._spilled.tokens:
            raise ValueError("There is nothing to count: no document holds a token.")
        with _TrieWriter(self.folder, self.order, self.vocab_size) as trie:
            for rows in self._merged():
                trie.push(rows)
            trie.push(_Rows.empty(self.order), last=True)
        scalars = {"documents": self.documents, "tokens": self.tokens, "order": self.order}
        return scalars, trie.arrays()

    def remove(self) -> None:
        """Delete the counter's files, and the folder if nothing else is in it."""
        for pattern in (_MANIFEST, "run-*.bin", "trie-*.bin"):  # without manifest the rest is ignored
            for path in self.folder.glob(pattern):
                path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    # --- spill ---

    def _spill(self) -> None:
        """Turn the buffer into sorted runs; the manifest, written last, makes them count."""
        if not self._buffer:
            return
        stream = np.concatenate([symbols for symbols, _, _ in self._buffer])
        runs, before = list(self._spilled.runs), self.order - 1
        for start in range(before, len(stream), self.memory_tokens):
            run = self._sorted_run(stream[start - before : start + self.memory_tokens])
            if run.shape[1]:
                self._write_run(len(runs), run)
                runs.append(run.shape[1])
        spilled = _Spilled(self.documents, self.tokens, runs)
        manifest = {"format": FORMAT, "parameters": self._parameters(), **spilled._asdict()}
        with _on_disk(self.folder):
            write_text(self.folder / _MANIFEST, json.dumps(manifest) + "\n")
        self._spilled, self._buffer = spilled, []

    def _sorted_run(self, stream: np.ndarray) -> np.ndarray:
        """Distinct windows of a piece of text, ascending, and their counts: int64 [words + 1, windows].

        The first order - 1 symbols are context only.
        """
        last = self.order - 1
        predicted = stream[last:] < self.vocab_size  # what fills a document's start never is
        columns = iter([*range(last - 1, -1, -1), last])  # newest of the context first, target last
        words = np.zeros((len(self._widths), len(predicted)), np.int64)
        for word, width in zip(words, self._widths, strict=True):
            for _ in range(width):
                column = next(columns)
                word *= self._base
                word += stream[column : column + len(predicted)]
        words = words.compress(predicted, axis=1)
        if len(words) == 1:
            words.sort()  # without indices it is several times faster
        else:
            words = words.take(self._sorting(words), axis=1)
        starts = np.flatnonzero(_changes(words))
        counts = np.diff(starts, append=words.shape[1])
        return np.concatenate([words.take(starts, axis=1), counts[None]])

    def _sorting(self, words: np.ndarray) -> np.ndarray:
        """The order that sorts windows, as np.lexsort(words[::-1]) gives it.

        Stable sorts are quick where pieces are sorted already: runs side by side by their first word, and
        then everything but ties. A tie's rank leaves room for the few symbols of a second word.
        """
        if any(words.shape[1] * self._base**width >= 2**63 for width in self._widths[1:]):
            return np.lexsort(words[::-1])
        order = np.argsort(words[0], kind="stable")
        keys = words[0, order]
        for word, width in zip(words[1:], self._widths[1:], strict=True):
            keys = (np.cumsum(_changes(keys[None])) - 1) * self._base**width + word[order]
            again = np.argsort(keys, kind="stable")
            order, keys = order[again], keys[again]
        return order

    def _write_run(self, index: int, run: np.ndarray) -> None:
        path = self._run_path(index)
        with _on_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with path.open("wb") as file:
                    file.write(run.data)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                path.unlink(missing_ok=True)  # gives a full disk its space back
                raise

    def _run_path(self, index: int) -> Path:
        return self.folder / f"run-{index:05}.bin"

    # --- resume ---

    def _parameters(self) -> dict[str, int | None]:
        return {"order": self.order, "vocab_size": self.vocab_size, "eos": self.eos}

    def _read_manifest(self) -> "_Spilled":
        path = self.folder / _MANIFEST
        if not path.exists():
            return _Spilled(0, 0, [])
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found, spilled = manifest["parameters"], _Spilled(*(manifest[k] for k in _Spilled._fields))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged; delete {self.folder} and count again.") from None
        if manifest.get("format") != FORMAT or found != self._parameters():
            raise ValueError(
                f"{self.folder} holds a count with {found}, and this one has {self._parameters()}; "
                "use the same parameters, another folder, or delete it."
            )
        return spilled

    def _check_runs(self) -> None:
        for index, windows in enumerate(self._spilled.runs):
            path, size = self._run_path(index), windows * 8 * (len(self._widths) + 1)
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(
                    f"{path} is damaged: it should have {size} bytes; delete {self.folder} and count again."
                )

    # --- merge ---

    def _run(self, index: int) -> np.ndarray:
        """Memory map of a run. Keep it briefly: the pages that were read count as memory until it goes."""
        return np.memmap(self._run_path(index), np.int64, "r").reshape(len(self._widths) + 1, -1)

    def _merged(self) -> Iterator["_Rows"]:
        """The windows of all runs in ascending order, in ranges of keys that hold whole contexts."""
        bounds = self._ranges()
        for part in range(bounds.shape[1] - 1):
            slices = [self._run(i)[:, bounds[i, part] : bounds[i, part + 1]] for i in range(len(bounds))]
            block = np.concatenate(slices, axis=1)
            del slices
            block = block.take(self._sorting(block[:-1]), axis=1)
            starts = np.flatnonzero(_changes(block[:-1]))
            counts = np.add.reduceat(block[-1], starts)
            symbols = self._unpack(block[:-1].take(starts, axis=1))
            contexts = symbols[:-1].astype(np.int32)
            rows = np.flatnonzero(_changes(contexts))
            followers = np.diff(rows, append=len(counts))
            yield _Rows(contexts.take(rows, axis=1), np.zeros_like(rows), followers, symbols[-1], counts)

    def _ranges(self) -> np.ndarray:
        """Where to cut each run, int64 [runs, ranges + 1], so that a range of all runs fits in memory.

        The cuts are quantiles of a sample, so a range may exceed its size by an eighth. A very frequent
        token does no harm, as ranges need not begin with a new token.
        """
        runs, size = len(self._spilled.runs), max(1, self.memory_tokens // _MERGE_SHARE)
        step = max(1, size // (8 * runs))
        sample = np.sort(np.concatenate([self._run(i)[0, ::step].copy() for i in range(runs)]))
        cuts = sample[size // step :: size // step]
        if len(self._widths) == 1:
            cuts -= cuts % self._base  # the word ends with the target: cut between contexts only
        cuts = np.unique(cuts)
        inner = np.stack([np.searchsorted(self._run(i)[0], cuts) for i in range(runs)])
        return np.column_stack([np.zeros(runs, np.int64), inner, self._spilled.runs])

    def _unpack(self, words: np.ndarray) -> np.ndarray:
        """Words [words, windows] -> symbols [order, windows], int64."""
        symbols = np.empty((self.order, words.shape[1]), np.int64)
        end = 0
        for word, width in zip(words, self._widths, strict=True):
            end += width
            for i in range(end - 1, end - width, -1):
                word, symbols[i] = np.divmod(word, self._base)
            symbols[end - width] = word
        return symbols


class _Spilled(NamedTuple):
    """What the runs on disk hold."""

    documents: int
    tokens: int
    runs: list[int]  # the number of distinct windows of each


class _Rows(NamedTuple):
    """Neighbouring contexts of one order n, ascending, each with its next tokens."""

    contexts: np.ndarray  # int32 [n - 1, C], newest token first
    children: np.ndarray  # int64 [C], how many contexts of order n + 1 extend each
    followers: np.ndarray  # int64 [C]
    ids: np.ndarray  # int64 [E]
    counts: np.ndarray  # int64 [E]

    @classmethod
    def empty(cls, order: int) -> Self:
        nothing = np.empty(0, np.int64)
        return cls(np.empty((order - 1, 0), np.int32), nothing, nothing, nothing, nothing)


class _TrieWriter:
    """Appends rows of the highest order and all that follows from them to one file an array.

    Rows arrive in ascending order. Below the highest order the last row of a batch may go on in the next
    one, so it stays open, at most one row an order.
    """

    def __init__(self, folder: Path, order: int, vocab_size: int):
        self.folder, self.order, self.vocab_size = folder, order, vocab_size
        self._open = {n: _Rows.empty(n) for n in range(1, order)}
        self._names = [f"{kind}_{n}" for n in range(1, order + 1) for kind in ("followers", "ids", "counts")]
        self._names += [f"{kind}_{n}" for n in range(2, order + 1) for kind in ("oldest", "children")]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack, _on_disk(self.folder):
            for name in self._names:  # a new file: arrays of an earlier finish() stay valid
                self._path(name).unlink(missing_ok=True)
            files = {name: stack.enter_context(self._path(name).open("wb")) for name in self._names}
            self._files, self._closing = files, stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        with _on_disk(self.folder):
            self._closing.close()

    def push(self, rows: _Rows, last: bool = False) -> None:
        """Take rows of the highest order; `last` closes all that is open."""
        for n in range(self.order, 0, -1):
            if n < self.order:
                rows = _join(self._open[n], self._shorten(rows), self.vocab_size)
                if not last:
                    rows, self._open[n] = _split_last(rows)
            with _on_disk(self.folder):
                self._write(n, rows)

    def arrays(self) -> dict[str, np.ndarray]:
        """Memory maps of what was written."""
        return {name: _map(self._path(name), _dtype(name)) for name in self._names}

    def _shorten(self, rows: _Rows) -> _Rows:
        """The rows without the oldest token of their contexts; contexts may now repeat."""
        return rows._replace(contexts=rows.contexts[:-1], children=self._full(rows).astype(np.int64))

    def _full(self, rows: _Rows) -> np.ndarray:
        """Which contexts lie within their document, bool [C]; the others exist at lower orders only."""
        if len(rows.contexts) == 0:
            return np.ones(len(rows.followers), bool)
        return rows.contexts[-1] <= self.vocab_size

    def _write(self, n: int, rows: _Rows) -> None:
        full = self._full(rows)
        entries = np.repeat(full, rows.followers)
        if n > 1:
            self._append(f"oldest_{n}", rows.contexts[-1][full])
        if n < self.order:
            self._append(f"children_{n + 1}", rows.children[full])
        self._append(f"followers_{n}", rows.followers[full])
        self._append(f"ids_{n}", rows.ids[entries])
        self._append(f"counts_{n}", rows.counts[entries])

    def _append(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(np.ascontiguousarray(values, _dtype(name)).data)

    def _path(self, name: str) -> Path:
        return self.folder / f"trie-{name}.bin"


def _flat(document: Sequence[int] | np.ndarray) -> np.ndarray:
    ids = np.asarray(document)
    if ids.size == 0:
        return np.empty(0, np.int32)  # numpy takes [] for floats
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"A document must be a flat sequence of token ids, got {document!r:.60}.")
    return ids


def _join(open_row: _Rows, rows: _Rows, vocab_size: int) -> _Rows:
    """Both in one, rows of equal contexts added up."""
    rows = _Rows(*(np.concatenate(pair, axis=-1) for pair in zip(open_row, rows, strict=True)))
    changes = _changes(rows.contexts)
    starts, ranks = np.flatnonzero(changes), np.cumsum(changes) - 1
    keys = np.repeat(ranks, rows.followers) * vocab_size + rows.ids
    order = np.argsort(keys, kind="stable")  # quick where pieces are in order already
    keys = keys[order]
    entries = np.flatnonzero(_changes(keys[None]))
    row, ids = np.divmod(keys[entries], vocab_size)
    return _Rows(
        rows.contexts.take(starts, axis=1),
        np.add.reduceat(rows.children, starts),
        np.bincount(row, minlength=len(starts)),
        ids,
        np.add.reduceat(rows.counts[order], entries),
    )


def _split_last(rows: _Rows) -> tuple[_Rows, _Rows]:
    """All rows but the last, and the last (both empty if there is none)."""
    entries = len(rows.ids) - int(rows.followers[-1:].sum())
    lengths = {"ids": entries, "counts": entries}
    cuts = [(field, lengths.get(name, -1)) for name, field in rows._asdict().items()]
    return _Rows(*(f[..., :at] for f, at in cuts)), _Rows(*(f[..., at:] for f, at in cuts))


def _changes(keys: np.ndarray) -> np.ndarray:
    """Whether a column of `keys` [k, columns] differs from the one before; the first always does."""
    changes = np.zeros(keys.shape[1], bool)
    changes[:1] = True
    for row in keys:
        changes[1:] |= row[1:] != row[:-1]
    return changes


def _word_widths(order: int, base: int) -> list[int]:
    """How many symbols go into each 64-bit word of a window."""
    widest = max(k for k in range(1, 64) if base**k < 2**63)
    return [min(widest, order - done) for done in range(0, order, widest)]


def _dtype(name: str) -> type:
    return np.int64 if name.startswith("counts") else np.int32


def _map(path: Path, dtype: type) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)  # maps hold a byte


@contextlib.contextmanager
def _on_disk(path: Path) -> Iterator[None]:
    """Say what a failed write, usually to a full disk, leaves behind."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"Counting could not write {path} ({error.strerror or error}); what was spilled before is kept, "
            "so count again to go on from there",
        ) from error
