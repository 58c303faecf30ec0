import os
import resource
import signal
import subprocess
import sys
import tracemalloc
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from logitproc import counting
from logitproc.counting import NGramCounter


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Hundreds of tiny runs need not reach the disk; what does is tested in processes of their own."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def count(folder, documents, order, vocab_size, eos=None, memory_tokens=1 << 20, batch=7):
    """Scalars and arrays, copied so that they outlive the folder."""
    counter = NGramCounter(folder, order, vocab_size, eos, memory_tokens)
    add(counter, documents, batch)
    scalars, arrays = counter.finish()
    return scalars, {name: np.array(values) for name, values in arrays.items()}


def add(counter, documents, batch=7):
    for start in range(counter.documents, len(documents), batch):
        counter.add(documents[start : start + batch])


def reference(documents, order, vocab_size, eos):
    """The same arrays from a dictionary of n-grams."""
    arrays, below = {}, [()]
    for n in range(1, order + 1):
        grams = Counter()
        for document in documents:
            y = (vocab_size, *map(int, document), *([] if eos is None else [eos]))
            grams.update(y[t - n + 1 : t + 1] for t in range(max(1, n - 1), len(y)))
        contexts = sorted({gram[-2::-1] for gram in grams})  # newest token first
        rows = {context: [] for context in contexts}
        for gram in sorted(grams):
            rows[gram[-2::-1]].append((gram[-1], grams[gram]))
        entries = [entry for context in contexts for entry in sorted(rows[context])]
        arrays[f"followers_{n}"] = [len(rows[context]) for context in contexts]
        arrays[f"ids_{n}"] = [token for token, _ in entries]
        arrays[f"counts_{n}"] = [times for _, times in entries]
        if n > 1:
            children = Counter(context[:-1] for context in contexts)
            arrays[f"oldest_{n}"] = [context[-1] for context in contexts]
            arrays[f"children_{n}"] = [children[context] for context in below]
        below = contexts
    return arrays


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.asarray(found[name]).tolist() == np.asarray(expected[name]).tolist(), name


def random_documents(vocab_size, seed=0, documents=40, longest=30):
    """Token ids from both ends of the vocabulary, some more frequent than others; some documents empty."""
    rng = np.random.default_rng(seed)
    ids = np.unique(np.r_[np.arange(min(4, vocab_size)), max(0, vocab_size - 4) : vocab_size])
    weights = 1 / np.arange(1, len(ids) + 1)
    lengths = rng.integers(0, longest, documents)
    return [rng.choice(ids, length, p=weights / weights.sum()) for length in lengths]


def test_worked_example(tmp_path):
    # a b a b c / a b c / b c a with a, b, c, eos = 0, 1, 2, 3 and <s> = 4.
    scalars, arrays = count(tmp_path, [[0, 1, 0, 1, 2], [0, 1, 2], [1, 2, 0]], order=3, vocab_size=4, eos=3)
    assert scalars == {"documents": 3, "tokens": 14, "order": 3}
    expected = {
        "followers_1": [4], "ids_1": [0, 1, 2, 3], "counts_1": [4, 4, 3, 3],
        # contexts          a     b     c     <s>
        "oldest_2": [0, 1, 2, 4], "children_2": [4],
        "followers_2": [2, 2, 2, 2],
        "ids_2":    [1, 3, 0, 2, 0, 3, 0, 1],
        "counts_2": [3, 1, 1, 3, 1, 2, 2, 1],
        # contexts  ba ca <s>a ab <s>b bc: sorted by the newest token, then the oldest
        "oldest_3": [1, 2, 4, 0, 4, 1], "children_3": [3, 2, 1, 0],
        "followers_3": [1, 1, 1, 2, 1, 2],
        "ids_3":    [1, 3, 1, 0, 2, 2, 0, 3],
        "counts_3": [1, 1, 2, 1, 2, 1, 1, 2],
    }  # fmt: skip
    same(arrays, expected)


@pytest.mark.parametrize("eos", [None, 2])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("memory_tokens", [20, 100, 10_000])
def test_counts_equal_those_of_a_dictionary(tmp_path, order, eos, memory_tokens):
    documents = random_documents(vocab_size=9)
    _, arrays = count(tmp_path, documents, order, 9, eos, memory_tokens)
    same(arrays, reference(documents, order, 9, eos))


@pytest.mark.parametrize("vocab_size, order, words", [
    (151_936, 3, [3]), (151_936, 4, [3, 1]), (151_936, 5, [3, 2]), (2**31 - 3, 5, [2, 2, 1]),
])  # fmt: skip
@pytest.mark.parametrize("memory_tokens", [64, 10_000])
def test_large_vocabularies_take_several_words(tmp_path, vocab_size, order, words, memory_tokens):
    documents = random_documents(vocab_size)
    assert NGramCounter(tmp_path, order, vocab_size, 0)._widths == words
    _, arrays = count(tmp_path, documents, order, vocab_size, 0, memory_tokens)
    same(arrays, reference(documents, order, vocab_size, 0))


@pytest.mark.parametrize("order, vocab_size", [(1, 9), (3, 9), (5, 151_936)])
def test_number_and_order_of_runs_change_no_byte(tmp_path, order, vocab_size):
    documents = random_documents(vocab_size, documents=60)
    results = []
    for runs in (1, 3, 10):
        for i, shard in enumerate((documents, documents[::-1])):
            counter = NGramCounter(tmp_path / f"{runs}.{i}", order, vocab_size, 1, memory_tokens=1 << 30)
            for part in range(runs):
                counter.add(shard[part * 60 // runs : (part + 1) * 60 // runs])
                counter._spill()
            assert len(list(counter.folder.glob("run-*.bin"))) == runs
            counter.memory_tokens = 100 * runs  # other cuts in the merge, too
            results.append({name: (a.dtype, a.tobytes()) for name, a in counter.finish()[1].items()})
    assert all(result == results[0] for result in results)


def test_a_context_may_spread_over_many_merges(tmp_path):
    # One token follows itself and is followed by 200 others: its rows exceed every range of the merge.
    documents = [[0, 0, other, 0, 0] for other in range(1, 201)]
    _, arrays = count(tmp_path, documents, 3, 201, None, memory_tokens=40)
    same(arrays, reference(documents, 3, 201, None))


def test_a_document_longer_than_the_memory_is_cut_without_a_trace(tmp_path):
    document = np.random.default_rng(1).integers(0, 9, 1000)
    _, arrays = count(tmp_path, [document], 4, 9, 0, memory_tokens=100)
    same(arrays, reference([document], 4, 9, 0))


def test_peak_memory_does_not_grow_with_the_corpus(tmp_path):
    def peak(tokens):
        rng = np.random.default_rng(0)
        counter = NGramCounter(tmp_path / str(tokens), 3, 1000, None, memory_tokens=50_000)
        tracemalloc.start()
        for _ in range(tokens // 1000):
            counter.add([(rng.pareto(1, 1000) * 10).clip(0, 999).astype(np.int64)])
        counter.finish()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak(500_000) < 1.1 * peak(100_000)


def test_a_run_is_let_go_before_ranges_are_looked_for_in_the_next(tmp_path, monkeypatch):
    # The pages read of a mapped file count as memory as long as it is mapped; all runs are as large as the corpus.
    counter = NGramCounter(tmp_path, 3, 9, 0, memory_tokens=100)
    add(counter, [[1, 2, 3, 4] * 10] * 20)
    counter.finish()
    mapped, original = [], NGramCounter._run

    def run(self, index):
        found = original(self, index)
        mapped.append(weakref.ref(found.base))
        assert sum(file() is not None for file in mapped) == 1
        return found

    monkeypatch.setattr(NGramCounter, "_run", run)
    counter._ranges()
    assert len(mapped) > 10


# --- resuming ---


def test_a_counter_goes_on_where_another_stopped(tmp_path):
    documents = random_documents(9)
    expected = count(tmp_path / "whole", documents, 3, 9, 0)
    first = NGramCounter(tmp_path / "parts", 3, 9, 0, memory_tokens=50)
    first.add(documents[:10])  # spilled
    first.add(documents[10:11])  # waits in memory and is lost
    second = NGramCounter(tmp_path / "parts", 3, 9, 0, memory_tokens=80)
    assert (first.documents, second.documents) == (11, 10)
    add(second, documents)
    scalars, arrays = second.finish()
    assert scalars == expected[0]
    same(arrays, expected[1])


@pytest.mark.parametrize("fsync", range(1, 8))
def test_a_counter_survives_a_kill_at_any_write(tmp_path, fsync):
    # Each run and each manifest is one fsync, and the process kills itself inside the n-th. The first
    # spill is two runs and a manifest.
    documents = [document.tolist() for document in random_documents(9)]
    script = f"""
import contextlib, os, pathlib
from logitproc.counting import NGramCounter
left, fsync = {fsync}, os.fsync
def kill(handle):
    global left
    left -= 1
    if left == 0:
        with contextlib.suppress(OSError):  # a manifest is open for reading, and not in its place yet
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    fsync(handle)
os.fsync = kill
documents, counter = {documents}, NGramCounter(pathlib.Path({str(tmp_path / "parts")!r}), 3, 9, 0, 100)
for start in range(0, 40, 2):
    counter.add(documents[start : start + 2])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    counter = NGramCounter(tmp_path / "parts", 3, 9, 0, 100)
    assert counter.documents < 40 and (counter.documents > 0) == (fsync > 3)
    add(counter, documents)
    same(counter.finish()[1], count(tmp_path / "whole", documents, 3, 9, 0)[1])


def test_an_interrupt_between_run_and_manifest_counts_nothing_twice(tmp_path, monkeypatch):
    documents = random_documents(9)
    expected = count(tmp_path / "whole", documents, 3, 9, 0)[1]
    counter = NGramCounter(tmp_path / "parts", 3, 9, 0, memory_tokens=50)
    counter.add(documents[:10])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(counting, "write_text", interrupt)
        counter.add(documents[10:20])
    for resumed in (NGramCounter(counter.folder, 3, 9, 0), counter):  # a new counter, or the same one
        add(resumed, documents)
        same(resumed.finish()[1], expected)


def test_an_interrupted_finish_may_be_repeated(tmp_path, monkeypatch):
    documents = random_documents(9)
    expected = count(tmp_path / "whole", documents, 3, 9, 0)[1]
    counter = NGramCounter(tmp_path / "parts", 3, 9, 0, memory_tokens=50)
    add(counter, documents)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(counting._TrieWriter, "_shorten", interrupt)
        counter.finish()
    resumed = NGramCounter(counter.folder, 3, 9, 0)
    assert resumed.documents == len(documents)
    same(resumed.finish()[1], expected)


def interrupt(*args):
    raise KeyboardInterrupt


def test_arrays_stay_valid_when_more_is_counted(tmp_path):
    documents = random_documents(9)
    counter = NGramCounter(tmp_path, 2, 9, None)
    counter.add(documents[:20])
    _, early = counter.finish()
    counter.add(documents[20:])
    same(counter.finish()[1], reference(documents, 2, 9, None))
    same(early, reference(documents[:20], 2, 9, None))


@pytest.mark.parametrize("step", ["add", "finish"])
def test_a_full_disk_is_told_and_leaves_a_consistent_folder(tmp_path, step):
    documents = [np.random.default_rng(i).integers(0, 5000, 500) for i in range(20)]
    counter = NGramCounter(tmp_path / "parts", 3, 5000, None, memory_tokens=1 << 20)
    counter.add(documents[:1])
    counter._spill()
    counter.add(documents[1:])
    if step == "finish":
        counter._spill()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # larger files fail in write()
    try:
        with pytest.raises(OSError, match="Counting could not write .*count again to go on"):
            counter.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resumed = NGramCounter(counter.folder, 3, 5000, None)
    assert resumed.documents == (1 if step == "add" else 20)
    assert len(list(counter.folder.glob("run-*.bin"))) == (1 if step == "add" else 2)
    add(resumed, documents)
    same(resumed.finish()[1], count(tmp_path / "whole", documents, 3, 5000)[1])


def test_remove_deletes_its_own_files_only(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "mine.txt").touch()
    for rest in (["mine.txt"], []):
        counter = NGramCounter(folder, 3, 9, None)
        counter.add([[1, 2, 3]])
        counter.finish()
        counter.remove()
        assert os.listdir(folder) == rest if rest else not folder.exists()
        (folder / "mine.txt").unlink(missing_ok=True)


# --- bad input ---


@pytest.mark.parametrize("document, message", [
    ([1, 9], "Token id 9 is outside the vocabulary of 9 tokens"),
    ([-1], "Token id -1 is outside"),
    ([2**31], "Token id 2147483648 is outside"),
    ([2**70], "flat sequence of token ids"),
    ([1.0], "flat sequence of token ids"),
    ([[1, 2]], "flat sequence of token ids"),
    ("text", "flat sequence of token ids"),
])  # fmt: skip
def test_a_bad_document_is_refused_and_nothing_of_its_batch_is_counted(tmp_path, document, message):
    counter = NGramCounter(tmp_path, 2, 9, None)
    counter.add([[1, 2]])
    with pytest.raises(ValueError, match=message):
        counter.add([[3], document])
    assert (counter.documents, counter.tokens) == (1, 2)
    same(counter.finish()[1], reference([[1, 2]], 2, 9, None))


@pytest.mark.parametrize("changed, message", [
    ({"order": 0}, "order must be at least 1, got 0"),
    ({"vocab_size": 0}, "vocab_size must be from 1"),
    ({"vocab_size": 2**31}, "vocab_size must be from 1"),
    ({"eos": 9}, "eos must be None or an id below the vocabulary size 9, got 9"),
    ({"eos": -1}, "eos must be None"),
    ({"memory_tokens": 0}, "memory_tokens must be at least 1"),
])  # fmt: skip
def test_bad_parameters_are_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        NGramCounter(**{"folder": tmp_path, "order": 2, "vocab_size": 9, "eos": None} | changed)


@pytest.mark.parametrize("documents", [[], [[], []]])
def test_nothing_to_count_is_an_error(tmp_path, documents):
    counter = NGramCounter(tmp_path, 2, 9, None)
    counter.add(documents)
    with pytest.raises(ValueError, match="There is nothing to count"):
        counter.finish()


def test_an_empty_document_is_its_end(tmp_path):
    _, arrays = count(tmp_path, [[], []], 3, 9, eos=2)
    same(arrays, reference([[], []], 3, 9, 2))
    assert arrays["counts_2"].tolist() == [2] and len(arrays["ids_3"]) == 0


@pytest.mark.parametrize("changed", [{"order": 3}, {"vocab_size": 10}, {"eos": None}])
def test_a_folder_of_other_parameters_is_refused(tmp_path, changed):
    parameters = {"order": 2, "vocab_size": 9, "eos": 1}
    counter = NGramCounter(tmp_path, **parameters)
    counter.add([[1, 2]])
    counter.finish()
    with pytest.raises(ValueError, match="'order': 2, 'vocab_size': 9, 'eos': 1.*and this one has"):
        NGramCounter(tmp_path, **parameters | changed)


@pytest.mark.parametrize("name, damage", [
    ("manifest.json", lambda path: path.write_text("{")),
    ("manifest.json", lambda path: path.write_text("[]")),
    ("manifest.json", lambda path: path.write_text('{"format": 1}')),
    ("run-00000.bin", lambda path: path.unlink()),
    ("run-00000.bin", lambda path: path.write_bytes(path.read_bytes()[:-8])),
])  # fmt: skip
def test_a_damaged_folder_is_refused(tmp_path, name, damage):
    counter = NGramCounter(tmp_path, 2, 9, None)
    counter.add([[1, 2]])
    counter.finish()
    damage(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is damaged.*delete"):
        NGramCounter(tmp_path, 2, 9, None)
