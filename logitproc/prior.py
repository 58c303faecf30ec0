"""NGramPrior: the counts of a style corpus, and the distributions that follow from them.

Counts of all orders are kept as a reversed trie of contexts: the contexts of order n are the children of
those of order n - 1 under their oldest token, so the key of a context is `parent * (V + 2) + token`, exact
at any order and vocabulary, and one binary search per order walks from the newest token back. (Ids packed
in base V would overflow 64 bits beyond four tokens, and hashes would have to be verified.)

Symbols are the token ids 0..V-1, V for the start of a document and V + 1 for "no token", which no context
holds. Kneser-Ney follows Chen and Goodman, TR-10-98 (1998), interpolated and modified, in the notation of
Heafield et al., "Scalable Modified Kneser-Ney Language Model Estimation", ACL 2013, section 3.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from .artifact import Artifact, check_new, describe_tokenizer, new_folder, write_artifact, write_text
from .counting import NGramCounter

logger = logging.getLogger(__name__)

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
MAX_ORDER = 5


class Order(NamedTuple):
    """The n-grams of one order: C contexts of n - 1 tokens, E n-grams in rows of ascending next tokens."""

    keys: np.ndarray  # int64 [C], ascending: parent * (V + 2) + oldest token
    parent: np.ndarray  # int64 [C], the context without its oldest token
    oldest: np.ndarray  # int64 [C]
    indptr: np.ndarray  # int64 [C + 1]
    ids: np.ndarray  # int64 [E], the next token

    @property
    def context(self) -> np.ndarray:
        """int64 [E]: the context of each n-gram."""
        return np.repeat(np.arange(len(self.keys)), np.diff(self.indptr))


class KneserNey(NamedTuple):
    """Natural logarithms, float64, one entry an order."""

    log_prob: list[np.ndarray]  # [E] ln p(token given context), interpolated
    log_backoff: list[np.ndarray]  # [C] ln b(context)
    log_unseen: float  # ln p of a token that the corpus does not hold
    discounts: list[tuple[float, ...]]


class NGramPrior(Artifact):
    """N-gram counts of a corpus in one tokenizer's ids; immutable. Make one with `fit` or `from_arpa`.

    Attributes: `order` (1 to 5), `vocab_size`, `documents`, `tokens` (predicted tokens, ends of documents
    included), `corpus` (its name), `orders` (`Order`s, first to last), `counts` (int64 [E] an order; None
    when imported from ARPA, which stores probabilities only), `discounts` (fixed ones, or None).
    """

    kind = "ngram-prior"

    def __init__(
        self,
        tokenizer: dict[str, Any],
        orders: list[Order],
        counts: list[np.ndarray] | None,
        *,
        documents: int,
        tokens: int,
        corpus: str = "",
        discounts: Sequence[Sequence[float]] | None = None,
        kneser_ney: KneserNey | None = None,
    ):
        self.tokenizer, self.orders, self.counts = tokenizer, orders, counts
        self.documents, self.tokens, self.corpus = documents, tokens, corpus
        self.order, self.vocab_size, self.discounts = len(orders), tokenizer["vocab_size"], discounts
        self._kneser_ney = kneser_ney

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(o.ids):,}" for o in self.orders)
        return f"NGramPrior({self.corpus or 'unnamed'}, {self.tokens:,} tokens, n-grams {sizes})"

    # --- fit ---

    @classmethod
    def fit(
        cls,
        corpus: Any,
        tokenizer: Any,
        order: int = 3,
        *,
        discounts: Sequence[Sequence[float]] | None = None,
        out: str | Path | None = None,
        force: bool = False,
        **reading: Any,
    ) -> Self:
        """Count a corpus: a path (txt, jsonl, csv, tsv, parquet), an iterable of texts, a
        `datasets.Dataset`, or the name of a dataset. `reading` goes to `corpus.documents`. `discounts`
        fixes Kneser-Ney's (D1, D2, D3+) of each order instead of estimating them.

        With `out` the prior is saved there too, and a fit that was interrupted resumes when called again
        (its parts wait in `OUT.partial`) with the same corpus; an iterable starts from its beginning, as then.
        Memory is bounded whatever the size of the corpus.

        Raises ValueError for an order outside 1..5 and for a corpus that holds no text, FileNotFoundError
        for a missing file, FileExistsError when `out` exists and `force` is off.
        """
        from .corpus import documents

        _check_order(order)
        _check_discounts(discounts, order)
        if out is not None:
            check_new(out, force)
        about = describe_tokenizer(tokenizer)
        name = Path(corpus).name if isinstance(corpus, str | Path) else type(corpus).__name__
        texts = documents(corpus, **reading)
        first = next(texts)  # what a corpus without a name is known by when it is given again
        source = str(corpus) if isinstance(corpus, str | Path) else name
        identity = [source, _size(corpus), reading, about["fingerprint"], _digest(first)]
        with tempfile.TemporaryDirectory() as scratch:
            partial = Path(f"{out}.partial") if out is not None else Path(scratch) / "partial"
            with _same_corpus(partial, identity):
                counter = NGramCounter(partial, order, about["vocab_size"], about["eos"])
                _count(counter, itertools.chain([first], texts), tokenizer)
                scalars, arrays = counter.finish()
                target = Path(out) if out is not None else Path(scratch) / "prior"
                with new_folder(target, force) as new:
                    extra = {"corpus": name, "discounts": discounts}
                    write_artifact(new, cls.kind, about, scalars | extra, arrays)
            return cls.load(target)

    @classmethod
    def from_ids(
        cls, documents: Iterable[Sequence[int]], order: int, vocab_size: int, eos: int | None = None,
        discounts: Sequence[Sequence[float]] | None = None,
    ) -> Self:  # fmt: skip
        """Count documents that are token ids already; for tests and examples without a tokenizer."""
        _check_order(order)
        _check_discounts(discounts, order)
        tokenizer = {"fingerprint": "", "name": "ids", "vocab_size": vocab_size, "bos": None, "eos": eos,
                     "special": [] if eos is None else [eos]}  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            counter = NGramCounter(Path(scratch), order, vocab_size, eos)
            counter.add(list(documents))
            scalars, arrays = counter.finish()
            in_memory = {name: np.array(array) for name, array in arrays.items()}
            return cls._restore(tokenizer, {**scalars, "discounts": discounts}, in_memory)

    # --- saved form ---

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        scalars = {"order": self.order, "documents": self.documents, "tokens": self.tokens,
                   "corpus": self.corpus, "discounts": self.discounts}  # fmt: skip
        arrays: dict[str, np.ndarray] = {}
        for n, o in enumerate(self.orders, 1):
            arrays[f"ids_{n}"] = o.ids
            arrays[f"followers_{n}"] = np.diff(o.indptr)
            if n > 1:
                arrays[f"oldest_{n}"] = o.oldest
                arrays[f"children_{n}"] = np.bincount(o.parent, minlength=len(self.orders[n - 2].keys))
            if self.counts is not None:
                arrays[f"counts_{n}"] = self.counts[n - 1]
            else:
                arrays[f"log_prob_{n}"] = self.kneser_ney.log_prob[n - 1]
                arrays[f"log_backoff_{n}"] = self.kneser_ney.log_backoff[n - 1]
        if self.counts is None:
            scalars["log_unseen"] = self.kneser_ney.log_unseen
        return scalars, arrays

    @classmethod
    def _restore(cls, tokenizer: dict, scalars: dict, arrays: dict[str, np.ndarray]) -> Self:
        orders: list[Order] = []
        for n in range(1, scalars["order"] + 1):
            indptr = np.concatenate([[0], np.cumsum(arrays[f"followers_{n}"], dtype=np.int64)])
            ids = arrays[f"ids_{n}"].astype(np.int64)
            if n == 1:
                zero = np.zeros(1, np.int64)
                orders.append(Order(zero, zero, zero, indptr, ids))
                continue
            parent = np.repeat(np.arange(len(orders[-1].keys)), arrays[f"children_{n}"])
            oldest = arrays[f"oldest_{n}"].astype(np.int64)
            keys = parent * (tokenizer["vocab_size"] + 2) + oldest
            orders.append(Order(keys, parent, oldest, indptr, ids))
        about: dict[str, Any] = {key: scalars[key] for key in ("documents", "tokens")}
        about |= {"corpus": scalars.get("corpus", ""), "discounts": scalars.get("discounts")}
        if "counts_1" in arrays:
            counts = [arrays[f"counts_{n}"].astype(np.int64) for n in range(1, len(orders) + 1)]
            return cls(tokenizer, orders, counts, **about)
        kneser_ney = KneserNey(
            [arrays[f"log_prob_{n}"] for n in range(1, len(orders) + 1)],
            [arrays[f"log_backoff_{n}"] for n in range(1, len(orders) + 1)],
            scalars["log_unseen"],
            [],
        )
        return cls(tokenizer, orders, None, **about, kneser_ney=kneser_ney)

    # --- distributions ---

    @functools.cached_property
    def lower(self) -> list[np.ndarray]:
        """Per order n >= 2, int64 [E]: the n-gram of order n - 1 that lacks the oldest token.

        It exists for counted corpora; -1 where an imported ARPA file was pruned.
        """
        found = [np.empty(0, np.int64)]
        for n, o in enumerate(self.orders[1:]):
            found.append(self.find_entries(n, o.parent[o.context], o.ids))
        return found

    @property
    def kneser_ney(self) -> KneserNey:
        """Interpolated modified Kneser-Ney, estimated from the counts on first use.

        Every context's probabilities sum to 1 over all ids but the start of document. Discounts that
        cannot be estimated (a count of counts is 0, or one leaves [0, j]) become 0.5, 1, 1.5 with a
        warning.
        """
        if self._kneser_ney is None:
            self._kneser_ney = self._estimate(self._need_counts("Kneser-Ney"))
        return self._kneser_ney

    def _estimate(self, counts: list[np.ndarray]) -> KneserNey:
        bos, eos = self.tokenizer["bos"], self.tokenizer["eos"]
        predictable = self.vocab_size - (bos is not None and bos != eos)
        log_prob, log_backoff, used = [], [], []
        below, log_unseen = None, 0.0
        for n, o in enumerate(self.orders, 1):
            adjusted = self._adjusted(n, counts)
            d = _discounts(adjusted, n) if self.discounts is None else tuple(self.discounts[n - 1])
            context, level = o.context, np.minimum(adjusted, 3)
            rows = len(o.keys)
            total = np.bincount(context, weights=adjusted, minlength=rows)
            removed = np.array([0.0, *d])[level]
            backoff = np.bincount(context, weights=removed, minlength=rows) / total
            shorter = 1.0 / predictable if below is None else below[self.lower[n - 1]]
            prob = (adjusted - removed) / total[context] + backoff[context] * shorter
            if n == 1:
                log_unseen = math.log(backoff[0] / predictable) if backoff[0] > 0 else -math.inf
            with np.errstate(divide="ignore"):  # ln 0 where fixed discounts leave nothing
                log_prob.append(np.log(prob))
                log_backoff.append(np.log(backoff))
            used.append(d)
            below = prob
        return KneserNey(log_prob, log_backoff, log_unseen, used)

    def _adjusted(self, n: int, counts: list[np.ndarray]) -> np.ndarray:
        """a(g): raw counts for the highest order and after the start, else distinct tokens to the left."""
        if n == self.order:
            return counts[n - 1]
        left = np.bincount(self.lower[n], minlength=len(self.orders[n - 1].ids))
        if n == 1:
            return left
        o = self.orders[n - 1]
        return np.where(o.oldest[o.context] == self.vocab_size, counts[n - 1], left)

    def totals(self) -> list[np.ndarray]:
        """Per order, int64 [C]: how often each context was followed by anything."""
        counts = self._need_counts("totals")
        return [np.add.reduceat(c, o.indptr[:-1]) for c, o in zip(counts, self.orders, strict=True)]

    def kept(self, followers: int = 512) -> list[np.ndarray]:
        """Per order, bool [E]: the `followers` commonest next tokens of each context, lower ids first."""
        kept = []
        for c, o in zip(self._need_counts("kept"), self.orders, strict=True):
            keep = np.ones(len(c), bool)
            for row in np.flatnonzero(np.diff(o.indptr) > followers):
                span = slice(o.indptr[row], o.indptr[row + 1])
                keep[span] = False
                keep[o.indptr[row] + np.argsort(-c[span], kind="stable")[:followers]] = True
            kept.append(keep)
        return kept

    def symbols(self, ids: np.ndarray, bos: bool = False) -> np.ndarray:
        """Token ids -> symbols: special and unknown ids never match; with `bos` the BOS id starts a text."""
        table = symbol_table(self, bos)
        ids = np.asarray(ids, np.int64)
        return table[np.clip(ids, -1, self.vocab_size)]

    def log_prob(self, ids: Sequence[int], context: Sequence[int] = (), *, bos: bool = False) -> np.ndarray:
        """ln p of each of `ids` under Kneser-Ney, float64 [len(ids)]; `context` precedes and is not scored.

        With `bos` the text (context included) is taken to begin a document. -inf where p = 0.
        """
        kn = self.kneser_ney
        values = np.full(len(ids), kn.log_unseen)
        for n, (entry, row) in enumerate(self._entries(ids, context, bos)):
            backed_off = values if n == 0 else values + np.where(row >= 0, kn.log_backoff[n][row], 0.0)
            values = np.where(entry >= 0, kn.log_prob[n][entry], backed_off)
        return values

    def log_mixture(
        self, ids: Sequence[int], context: Sequence[int] = (), *, k: float = 1e-3, followers: int = 512,
        weights: Sequence[float] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """ln P_mix of each of `ids`, the paper's style score (arXiv:2601.16224, section 2.1).

        P_mix = sum_n w_n P_n / sum_n w_n over the orders whose context was seen, P_n add-k, contexts cut
        to their commonest `followers`. float64 [len(ids)].
        """
        counts, totals, kept = self._need_counts("log_mixture"), self.totals(), self._kept512
        if followers != 512:
            kept = self.kept(followers)
        weights = default_weights(self.order) if weights is None else weights
        above, below = np.zeros(len(ids)), np.zeros(len(ids))
        for n, (entry, row) in enumerate(self._entries(ids, context, False)):
            seen = row >= 0
            count = np.where((entry >= 0) & kept[n][entry], counts[n][entry], 0)
            prob = (count + k) / (totals[n][row] + k * self.vocab_size)
            above += np.where(seen, weights[n] * prob, 0.0)
            below += np.where(seen, weights[n], 0.0)
        return np.log(above / below)

    def contains(self, ids: Sequence[int], n: int) -> np.ndarray:
        """Whether each n-gram of `ids` occurs in the corpus, bool [max(0, len(ids) - n + 1)].

        Raises ValueError unless 1 <= n <= order.
        """
        if not 1 <= n <= self.order:
            raise ValueError(f"n must be from 1 to {self.order}, the order of this prior; got {n}.")
        entries = [entry for entry, _ in self._entries(ids, (), False)]
        return entries[n - 1][n - 1 :] >= 0

    @functools.cached_property
    def _kept512(self) -> list[np.ndarray]:
        return self.kept(512)

    def _entries(
        self, ids: Sequence[int], context: Sequence[int], bos: bool
    ) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Per order: (n-gram, context) indices of every position, -1 where not stored."""
        text = np.concatenate([np.asarray(context, np.int64), np.asarray(ids, np.int64)])
        lead = np.full(self.order, self.vocab_size + 1)
        if bos:
            lead[-1] = self.vocab_size
        before = np.concatenate([lead, self.symbols(text, bos)])
        at = np.arange(len(context), len(text)) + self.order  # index of each target in `before`
        target, row = text[len(context) :], np.zeros(len(ids), np.int64)
        for n, o in enumerate(self.orders):
            if n > 0:
                key = row * (self.vocab_size + 2) + before[at - n]
                row = np.where(row >= 0, _search(o.keys, key), -1)
            yield np.where(row >= 0, self.find_entries(n, row, target), -1), row

    @functools.cached_property
    def _entry_keys(self) -> list[np.ndarray]:
        return [o.context * (self.vocab_size + 2) + o.ids for o in self.orders]

    def find_entries(self, n: int, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Index of the n-gram (context `rows`, next token `ids`) in order n + 1; -1 where absent."""
        return _search(self._entry_keys[n], rows * (self.vocab_size + 2) + ids)

    def _need_counts(self, what: str) -> list[np.ndarray]:
        if self.counts is None:
            raise ValueError(
                f"This prior was imported from ARPA and holds no counts, which {what} needs; use the "
                "rules 'backoff' or 'ratio', or fit the corpus."
            )
        return self.counts

    # --- ARPA ---

    def to_arpa(self, path: str | Path) -> None:
        """Write Kneser-Ney in ARPA form: log10, words `t<id>`, `</s>`, `<s>`, `<unk>` for unseen ids."""
        from .arpa import write

        write(self, Path(path))

    @classmethod
    def from_arpa(cls, path: str | Path, tokenizer: Any) -> Self:
        """Read what `to_arpa` wrote, for the tokenizer that it was fitted with; the numbers are restored.

        Raises ValueError for a file that is not ARPA, or words that are not `t<id>` of the tokenizer.
        """
        from .arpa import read

        about = tokenizer if isinstance(tokenizer, dict) else describe_tokenizer(tokenizer)
        orders, kneser_ney = read(Path(path), about)
        return cls(about, orders, None, documents=0, tokens=0, corpus=Path(path).name, kneser_ney=kneser_ney)


def default_weights(order: int) -> tuple[float, ...]:
    """The paper's 0.1, 0.3, 0.6 for orders 1, 2, 3; longer orders, which it lacks, weigh like order 3."""
    return (0.1, 0.3, 0.6, 0.6, 0.6)[:order]


def symbol_table(prior: NGramPrior, bos: bool) -> np.ndarray:
    """int64 [V + 2]: symbol of each id; of any id >= V at V, and of -1 at the end."""
    v = prior.vocab_size
    table = np.arange(v + 2)
    table[v:] = v + 1
    table[prior.tokenizer["special"]] = v + 1
    if bos and prior.tokenizer["bos"] is not None:
        table[prior.tokenizer["bos"]] = v
    return table


def _check_order(order: int) -> None:
    if not isinstance(order, int) or not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order must be a whole number from 1 to {MAX_ORDER}, got {order!r}.")


@contextlib.contextmanager
def _same_corpus(partial: Path, identity: list[Any]) -> Iterator[None]:
    """Keep `partial` for a later call with the same corpus when the block is interrupted or the disk is
    full; remove it when the block is done, or when its input was at fault."""
    note, text = partial / "corpus.json", json.dumps(identity, default=str)
    if note.exists() and note.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{partial} holds an interrupted count of another corpus; finish that one first, or remove the folder."
        )
    write_text(note, text)
    try:
        yield
    except (OSError, KeyboardInterrupt):
        raise
    except BaseException:
        shutil.rmtree(partial)
        raise
    shutil.rmtree(partial)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _size(corpus: Any) -> int | None:
    return Path(corpus).stat().st_size if isinstance(corpus, str | Path) and Path(corpus).is_file() else None


def _check_discounts(discounts: Sequence[Sequence[float]] | None, order: int) -> None:
    if discounts is None:
        return
    if len(discounts) != order or any(
        len(d) != 3 or not all(0 <= x <= j for j, x in enumerate(d, 1)) for d in discounts
    ):
        raise ValueError(
            f"discounts must hold {order} triples (D1, D2, D3+) with 0 <= Dj <= j, got {discounts!r}."
        )


def find_contexts(orders: Sequence[Order], newest_first: np.ndarray, vocab_size: int) -> np.ndarray:
    """Index of each context, symbols [rows, n - 1] newest first, in order n; -1 where absent."""
    row = np.zeros(len(newest_first), np.int64)
    for o, symbol in zip(orders[1:], newest_first.T, strict=False):
        row = np.where(row >= 0, _search(o.keys, row * (vocab_size + 2) + symbol), -1)
    return row


def _search(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Index of each key in ascending `sorted_keys`, -1 where absent."""
    if len(sorted_keys) == 0:
        return np.full(len(keys), -1)
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[at] == keys, at, -1)


def _discounts(adjusted: np.ndarray, n: int) -> tuple[float, ...]:
    n1, n2, n3, n4 = (int((adjusted == j).sum()) for j in (1, 2, 3, 4))
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        d = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        if all(0 <= x <= j for j, x in enumerate(d, 1)):
            return d
    logger.warning("Too little text to estimate the discounts of order %d; using 0.5, 1, 1.5.", n)
    return FALLBACK_DISCOUNTS


def _encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Texts -> ids. What a fast tokenizer rests on is asked itself, as the rest of an encoding (offsets, tokens,
    masks) would take half of the time."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _count(counter: NGramCounter, texts: Iterable[str], tokenizer: Any, batch: int = 512) -> None:
    """Tokenize and count, skipping what a resumed counter has counted already."""
    import sys
    from concurrent.futures import Future, ThreadPoolExecutor

    from tqdm import tqdm

    encode = _encoder(tokenizer)

    def add(encoded: Future[list[list[int]]]) -> None:
        ids = encoded.result()
        counter.add(ids)
        bar.update(sum(map(len, ids)))

    texts = itertools.islice(texts, counter.documents, None)
    off = not sys.stderr.isatty()
    with ThreadPoolExecutor(1) as pool, tqdm(desc="counting", unit=" tokens", unit_scale=True, disable=off) as bar:
        before: Future | None = None  # one batch is tokenized while the one before it is counted
        while chunk := list(itertools.islice(texts, batch)):
            ahead = pool.submit(encode, chunk)
            if before:
                add(before)
            before = ahead
        if before:
            add(before)
