"""ARPA files of n-gram priors: log10, words `t<id>`, `</s>` for EOS, `<s>`, `<unk>` for every unseen id.

KenLM and other n-gram tools read them (`kenlm` from order 2 on).
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from .artifact import new_file
from .prior import KneserNey, NGramPrior, Order, find_contexts

_ZERO = -99.0  # the format's log10 of 0
_LN10 = math.log(10)


def write(prior: NGramPrior, path: Path) -> None:
    """Write the Kneser-Ney model of `prior`; numbers have 17 digits, so that `read` restores them."""
    kn, eos, v = prior.kneser_ney, prior.tokenizer["eos"], prior.vocab_size

    def word(symbol: int) -> str:
        return "</s>" if symbol == eos else "<s>" if symbol == v else f"t{symbol}"

    def log10(value: float) -> str:
        return f"{max(value / _LN10, _ZERO):.17g}"

    with new_file(path) as file:
        sizes = [len(o.ids) + (2 if n == 1 else 0) for n, o in enumerate(prior.orders, 1)]
        file.write("\\data\\\n" + "".join(f"ngram {n}={size}\n" for n, size in enumerate(sizes, 1)))
        tokens = np.empty((1, 0), np.int64)  # of each context, newest first
        for n, o in enumerate(prior.orders, 1):
            if n > 1:
                tokens = np.concatenate([tokens[o.parent], o.oldest[:, None]], axis=1)
            file.write(f"\n\\{n}-grams:\n")
            grams = np.concatenate([o.ids[:, None], tokens[o.context]], axis=1)  # newest first
            if n == prior.order:
                backoffs = None
            else:
                row = find_contexts(prior.orders, grams, v)
                backoffs = np.where(row >= 0, kn.log_backoff[n][row], 0.0)
            if n == 1:
                start = find_contexts(prior.orders, np.array([[v]]), v)[0] if prior.order > 1 else -1
                back = f"\t{log10(kn.log_backoff[1][start])}" if start >= 0 else ""
                file.write(f"{log10(kn.log_unseen)}\t<unk>\n0\t<s>{back}\n")
            for i, gram in enumerate(grams[:, ::-1].tolist()):
                back = "" if backoffs is None else f"\t{log10(backoffs[i])}"
                file.write(f"{log10(kn.log_prob[n - 1][i])}\t{' '.join(map(word, gram))}{back}\n")
        file.write("\n\\end\\\n")


def read(path: Path, tokenizer: dict) -> tuple[list[Order], KneserNey]:
    """Read an ARPA file whose words are `t<id>` of `tokenizer`. ValueError where it is not one."""
    v, eos = tokenizer["vocab_size"], tokenizer["eos"]
    with open(path, encoding="utf-8") as file:
        try:
            sections = [_section(lines, v, eos) for lines in _sections(file, path)]
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not an ARPA file: it is not text.") from None
    log_unseen = -math.inf
    first = sections[0][0][:, 0]
    if (first == -1).any():
        log_unseen = float(sections[0][1][first == -1][0])

    # Contexts of order n + 1: whatever precedes an (n + 1)-gram or has a back-off, and all suffixes.
    grams = [s[0][:, ::-1] for s in sections]  # newest first
    contexts: list[np.ndarray] = [np.empty((0, n), np.int64) for n in range(len(grams))]
    for n in range(len(grams) - 1, 0, -1):
        parts = [grams[n][:, 1:], grams[n - 1][sections[n - 1][2] != 0]]
        if n + 1 < len(grams):
            parts.append(contexts[n + 1][:, :-1])
        contexts[n] = np.unique(np.concatenate(parts), axis=0)
    orders: list[Order] = []
    log_prob, log_backoff = [], []
    zero = np.zeros(1, np.int64)
    for n, (gram, (_, prob, _)) in enumerate(zip(grams, sections, strict=True)):
        if n == 0:
            keys = parent = oldest = zero
            row = np.zeros(len(gram), np.int64)
            predicted = (gram[:, 0] >= 0) & (gram[:, 0] != v)
            log_backoff.append(np.array([0.0]))
        else:
            parent = find_contexts(orders, contexts[n][:, :-1], v)
            oldest = contexts[n][:, -1]
            keys = parent * (v + 2) + oldest
            partial = Order(keys, parent, oldest, np.zeros(len(keys) + 1, np.int64), np.empty(0, np.int64))
            row = find_contexts([*orders, partial], gram[:, 1:], v)
            predicted = np.ones(len(gram), bool)
            back = np.zeros(len(keys))
            at = find_contexts([*orders, partial], grams[n - 1], v)
            back[at[at >= 0]] = sections[n - 1][2][at >= 0]
            log_backoff.append(back)
        row, ids, prob = row[predicted], gram[predicted, 0], prob[predicted]
        order = np.lexsort((ids, row))
        followers = np.bincount(row, minlength=len(keys))
        indptr = np.concatenate([[0], np.cumsum(followers)])
        orders.append(Order(keys, parent, oldest, indptr, ids[order]))
        log_prob.append(prob[order])
    return orders, KneserNey(log_prob, log_backoff, log_unseen, [])


def _sections(file: TextIO, path: Path) -> Iterator[list[str]]:
    """The lines of each `\\n-grams:` section, checked against the sizes of the header."""
    if not file.readline().startswith("\\data\\"):
        raise ValueError(f"{path} is not an ARPA file: its first line is not \\data\\.")
    sizes: dict[int, int] = {}
    lines: list[str] = []
    n, ended = 0, False
    for line in file:
        line = line.rstrip("\n")
        if match := re.match(r"ngram (\d+)=(\d+)", line):
            sizes[int(match[1])] = int(match[2])
        elif re.match(r"\\\d+-grams:|\\end\\", line):
            if n:
                _check_size(path, n, len(lines), sizes)
                yield lines
            lines, n, ended = [], n + 1, line.startswith("\\end")
        elif line.strip():
            lines.append(line)
    if not ended:
        raise ValueError(f"{path} is truncated: it does not end with \\end\\.")


def _check_size(path: Path, n: int, found: int, sizes: dict[int, int]) -> None:
    if found != sizes.get(n):
        raise ValueError(f"{path} is damaged: {found} {n}-grams where its header says {sizes.get(n)}.")


def _section(lines: list[str], v: int, eos: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(symbols [E, n] with -1 for <unk>, ln p [E], ln b [E]) of a section."""
    symbols: dict[str, int | None] = {"<s>": v, "</s>": eos, "<unk>": -1}
    grams, probs, backs = [], [], []
    for line in lines:
        fields = line.split("\t")
        gram = []
        for word in fields[1].split(" "):
            symbol = symbols.get(word)
            if symbol is None and re.fullmatch(r"t\d+", word) and int(word[1:]) < v:
                symbol = int(word[1:])
            if symbol is None:
                raise ValueError(
                    f"The ARPA word {word!r} is no id of this tokenizer; words are t0 to t{v - 1}."
                )
            gram.append(symbol)
        grams.append(gram)
        probs.append(float(fields[0]))
        backs.append(float(fields[2]) if len(fields) > 2 else 0.0)
    return np.array(grams), _natural(probs), _natural(backs)


def _natural(log10: list[float]) -> np.ndarray:
    values = np.array(log10)
    return np.where(values <= _ZERO, -np.inf, values * _LN10)
