"""How long counting a corpus takes, and how much memory; KenLM's `lmplz` beside it."""

import resource
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from logitproc import NGramPrior, bundled
from logitproc.corpus import documents


def documents_of(corpus: Path, megabytes: float) -> Iterator[str]:
    """The lines of a file, again and again until so many megabytes are read: in pass r > 0 the second half of
    each line is that of another line, r * 1,000 lines before, so that text goes on bringing new n-grams."""
    size, passes = 0, 0
    while True:
        ends: deque[str] = deque(maxlen=1000 * passes or 1)
        with corpus.open(encoding="utf-8") as file:
            for line in file:
                half = line.find(" ", len(line) // 2) + 1
                text = line[:half] + ends[0] if passes and ends else line
                ends.append(line[half:])
                size += len(text.encode())
                yield text
                if size >= megabytes * 1e6:
                    return
        passes += 1


def fit(corpus: Path, megabytes: float) -> dict[str, float]:
    """Count a corpus at order 3 with the bundled tokenizer: seconds, tokens a second, peak memory.

    `counted` is the peak until the prior is on the disk; the rest is that of reading it, which holds all of it.
    """
    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    class Unread(NGramPrior):
        @classmethod
        def load(cls, folder: Any, base: Any = None) -> Any:
            return peak()

    tokenizer, before = AutoTokenizer.from_pretrained(bundled.pocket("base")), peak()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        counted = Unread.fit(documents_of(corpus, megabytes), tokenizer, order=3, out=f"{folder}/prior")
        on_disk = time.perf_counter() - start
        prior = NGramPrior.load(f"{folder}/prior")
        seconds = time.perf_counter() - start
    return {"megabytes": megabytes, "tokens": prior.tokens, "n_grams": sum(len(o.ids) for o in prior.orders),
            "seconds": seconds, "seconds_to_disk": on_disk, "tokens_per_second": prior.tokens / seconds,
            "gigabytes_before": before, "gigabytes_counted": counted, "gigabytes_read": peak()}  # fmt: skip


def fit_lmplz(program: Path, corpus: Path, megabytes: float) -> dict[str, float]:
    """KenLM's `lmplz` and ours from the same tokens: ids on the disk, a document a line, so nothing to tokenize.

    Both go on until the smoothed probabilities are on the disk; `lmplz` may use 2 GB.
    """
    tokenizer, tokens = AutoTokenizer.from_pretrained(bundled.pocket("base")), 0
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/ids", "w", encoding="ascii") as file:
            for text in documents(documents_of(corpus, megabytes)):
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                tokens += len(ids) + 1  # and the end
                file.write(" ".join(map(str, ids)) + "\n")
        start = time.perf_counter()
        subprocess.run([program.resolve(), "-o", "3", "-S", "2G", "-T", folder, "--discount_fallback",
                        "--text", f"{folder}/ids", "--arpa", f"{folder}/arpa"],
                       check=True, stderr=subprocess.DEVNULL)  # fmt: skip
        theirs = time.perf_counter() - start
        start = time.perf_counter()
        with open(f"{folder}/ids", encoding="ascii") as file:
            rows = [np.fromstring(line, np.int32, sep=" ") for line in file]
        prior = NGramPrior.from_ids(rows, order=3, vocab_size=len(tokenizer), eos=tokenizer.eos_token_id)
        prior.kneser_ney  # noqa: B018 (estimated when it is first asked for)
        prior.save(f"{folder}/prior")
        ours = time.perf_counter() - start
    return {"tokens": tokens, "seconds": theirs, "tokens_per_second": tokens / theirs,
            "seconds_of_ours": ours, "tokens_per_second_of_ours": prior.tokens / ours}  # fmt: skip
