"""A ledger counts what was generated, merges in any order, forgets as told and is saved whole."""

import builtins
import itertools
import os
import time

import numpy as np
import pytest
import torch
from conftest import WIDTH, tiny_tokenizer

import logitproc as lp
from logitproc import artifact

EOS = 2
ABOUT = {"fingerprint": "a", "name": "ids", "vocab_size": WIDTH, "bos": 1, "eos": EOS, "special": [0, 1, 2]}
KINDS = ({}, {"window": 2}, {"decay": 0.5}, {"texts": True}, {"window": 1, "texts": True})


def make(**options) -> lp.TokenLedger:
    return lp.TokenLedger(ABOUT, **options)


def items(seed: int, n: int = 5) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, WIDTH, rng.integers(1, 9)).tolist() for _ in range(n)]


def filled(shard: int, rounds: int = 6, **options) -> lp.TokenLedger:
    ledger = make(**options)
    for r, label in itertools.product(range(rounds), ("no", "yes")):
        ledger.update(items(10 * shard + 100 * r + (label == "yes")), label, r, shard)
    return ledger


# --- counting ---


def test_generated_ids_are_counted_over_items_up_to_the_first_end_of_text():
    ledger = make()
    ledger.update([[5, 6, 5], [5, EOS, 7, EOS], [EOS], []])
    ledger.update([[6]])
    counts = ledger.counts()
    assert counts.dtype == np.int64 and counts.sum() == 5
    assert (counts[5], counts[6], counts[7], counts[EOS]) == (3, 2, 0, 0)
    assert ledger.items == {0: 5}


def test_rows_padded_after_the_end_agree_with_lists_and_with_tensors():
    padded = [[5, 6, EOS, 0, 0], [7, EOS, EOS, EOS, EOS], [8, 9, 10, 11, 12]]
    expected = make()
    expected.update([[5, 6], [7], [8, 9, 10, 11, 12]])
    for rows in (padded, torch.tensor(padded), list(torch.tensor(padded)), np.array(padded)):
        ledger = make()
        ledger.update(rows)
        assert ledger.hash() == expected.hash()


def test_labels_are_counted_apart_and_pooled():
    ledger = make()
    ledger.update([[5, 5]], "b")
    ledger.update([[5, 6]], "a")
    ledger.update([[7]])
    assert ledger.labels == [None, "a", "b"]
    assert (ledger.counts("a")[5], ledger.counts("b")[5], ledger.counts()[5]) == (1, 2, 3)
    assert ledger.counts()[7] == 1 and ledger.counts("c").sum() == 0


@pytest.mark.parametrize("bad", [[[WIDTH]], [[-1]]])
def test_ids_outside_the_vocabulary_are_refused(bad):
    with pytest.raises(ValueError, match=f"from 0 to {WIDTH - 1}"):
        make().update(bad)


@pytest.mark.parametrize("options", [{"window": 0}, {"window": 1.5}, {"decay": 0.0}, {"decay": 1.1},
                                     {"window": 2, "decay": 0.5}])  # fmt: skip
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="window|decay"):
        make(**options)


# --- rounds ---


def test_a_window_counts_the_last_rounds_and_decay_weighs_them():
    window, decay = make(window=2), make(decay=0.5)
    for ledger in (window, decay):
        for r in (0, 1, 2, 4):
            ledger.update([[10 + r] * 8], round=r)
    assert window.counts().nonzero()[0].tolist() == [14]  # rounds 3 and 4
    assert decay.counts()[[10, 11, 12, 14]].tolist() == [0.5, 1.0, 2.0, 8.0]
    assert window.view(5).counts().tolist() == window.counts().tolist()
    assert decay.view(6).counts()[14] == 4.0, "a round in which nothing was generated is a round"


@pytest.mark.parametrize("options", KINDS)
def test_a_view_of_the_current_round_holds_what_came_before_it(options):
    ledger = make(**options)
    for r in range(6):
        ledger.update(items(r), "a", r)
        started = ledger.view(r + 1)
        ledger.update(items(50 + r), "a", r + 1)
        assert ledger.view(r + 1).hash() == started.hash()
        assert ledger.view(0).counts().sum() == 0


def test_rounds_never_go_back_and_what_was_folded_is_not_told_apart():
    for options in ({}, {"window": 2}):
        ledger = filled(0, **options)
        with pytest.raises(ValueError, match="has reached round 5; round 3 is over"):
            ledger.update(items(0), "a", round=3)
        with pytest.raises(ValueError, match="what came before round 3; rebuild"):
            ledger.view(3)
    with pytest.raises(ValueError, match="numbered from 0"):
        make().update([], round=-1)


def test_a_view_does_not_change():
    ledger = filled(0)
    view, then = ledger.view(), ledger.hash()
    ledger.update(items(9), "no", round=5)
    assert view.hash() == view.view().hash() == then != ledger.hash()
    for change in (lambda: view.update(items(0)), lambda: view.merge(ledger)):
        with pytest.raises(ValueError, match="view of a ledger"):
            change()


# --- merging ---


@pytest.mark.parametrize("options", KINDS)
def test_merging_is_commutative_associative_and_idempotent(options):
    early, late = filled(0, rounds=3, **options), filled(0, rounds=6, **options)
    states = {0: [early, late], 1: [filled(1, **options)], 2: [filled(2, rounds=4, **options)]}
    parts = [state for shard in states.values() for state in shard]
    hashes = set()
    for order in itertools.permutations(parts):
        left = make(**options)
        for part in (*order, order[0], order[2]):
            left.merge(part)
        right, inner = make(**options), make(**options)
        inner.merge(order[2])
        inner.merge(order[3])
        for part in (order[1], inner, order[0]):
            right.merge(part)
        hashes |= {left.hash(), right.hash()}
        assert left.items == {0: 60, 1: 60, 2: 40}
    assert len(hashes) == 1


@pytest.mark.parametrize("options", [kind for kind in KINDS if "decay" not in kind])
def test_two_shards_merge_to_the_ledger_of_one(options):
    one, two, other = make(**options), make(**options), make(**options)
    for r in range(5):
        a, b = items(r), items(50 + r)
        one.update(a + b, "a", r)
        two.update(b, "a", r, shard=0)
        other.update(a, "a", r, shard=1)
    two.merge(other)
    assert two.hash() == one.hash() != other.hash()


def test_ledgers_that_differ_in_kind_do_not_merge():
    with pytest.raises(ValueError, match="window is None here and 2 there"):
        make().merge(make(window=2))
    with pytest.raises(ValueError, match="count the same tokens"):
        make().merge(lp.TokenLedger(tiny_tokenizer()))


# --- saved ---


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_saved_ledger_loads_equal_and_goes_on(options, frozen, tmp_path):
    ledger = filled(0, **options)
    ledger.merge(filled(1, rounds=4, **options))
    ledger = ledger.view(5) if frozen else ledger
    ledger.save(tmp_path / "a")
    ledger.save(tmp_path / "a")
    loaded = lp.TokenLedger.load(tmp_path / "a")
    assert loaded.hash() == ledger.hash() and loaded.items == ledger.items
    if frozen:
        with pytest.raises(ValueError, match="view of a ledger"):
            loaded.update([])
        return
    for each in (loaded, ledger):
        each.update(items(3), "yes", round=7, shard=1)
    assert loaded.hash() == ledger.hash()


def test_another_tokenizer_a_damaged_file_and_a_folder_of_something_else_are_refused(tmp_path):
    ledger = lp.TokenLedger(tiny_tokenizer())
    ledger.update(items(0))
    ledger.save(tmp_path / "a")
    with pytest.raises(ValueError, match="token-ledger was fitted for the tokenizer"):
        lp.TokenLedger.load(tmp_path / "a").check_tokenizer(tiny_tokenizer(WIDTH + 1))
    with pytest.raises(FileExistsError):
        ledger.save(tmp_path / "a", force=False)
    ledger.save(tmp_path / "a")
    (file,) = (tmp_path / "a").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        lp.TokenLedger.load(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not replaced"):
        ledger.save(tmp_path / "b")


class Killed(BaseException):
    pass


def test_killed_at_any_moment_a_folder_holds_the_old_ledger_or_the_new_one(tmp_path, monkeypatch):
    old, new = filled(0, rounds=3), filled(0, rounds=6)
    allowed, found = {old.hash(), new.hash()}, []
    calls = [(os, "fsync"), (os, "replace"), (os, "unlink"), (os, "open"), (builtins, "open")]
    real = {(owner, name): getattr(owner, name) for owner, name in calls}
    for moment in itertools.count():
        old.save(tmp_path / "a")
        left = iter(range(moment))

        def dying(function, left=left):
            def call(*args, **kwargs):
                if next(left, None) is None:
                    raise Killed
                result = function(*args, **kwargs)
                if next(left, None) is None:
                    raise Killed
                return result

            return call

        with monkeypatch.context() as patch:
            for (owner, name), function in real.items():
                patch.setattr(owner, name, dying(function))
            patch.setattr(artifact, "_BLOCK", 16)
            try:
                new.save(tmp_path / "a")
                done = True
            except Killed:
                done = False
        found.append(lp.TokenLedger.load(tmp_path / "a").hash())
        assert found[-1] in allowed
        if done:
            break
    assert set(found) == allowed and len(found) > 8
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 1


# --- bounds ---


def test_memory_does_not_grow_with_the_number_of_rounds():
    for options in ({}, {"window": 3}, {"decay": 0.9}):
        ledger, sizes = make(**options), []
        for r in range(40):
            ledger.update(items(r, n=40), "a", r)
            sizes.append(ledger.nbytes)
        assert max(sizes) <= 4 * WIDTH * (options.get("window", 1) + 1)
        assert ledger.items == {0: 1600}


def test_a_large_vocabulary_and_a_hundred_labels_stay_below_100_mb_and_an_update_below_10_ms():
    ledger = lp.TokenLedger({**ABOUT, "vocab_size": 151_936})
    everything = np.arange(3, 151_936)
    for label in range(100):  # more than any text holds: every token, under every label
        ledger.update([everything], str(label))
    assert ledger.nbytes < 100e6
    rng = np.random.default_rng(0)
    batch = [np.minimum(rng.zipf(1.2, 100), 151_935).tolist() for _ in range(100)]
    durations = []
    for _ in range(7):
        start = time.perf_counter()
        ledger.update(batch, "0")
        durations.append(time.perf_counter() - start)
    assert np.median(durations) < 0.010
