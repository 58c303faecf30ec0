"""What is fitted is saved whole or not at all, and never meets another tokenizer in silence."""

import errno
import gc
import json
import os
import stat

import numpy as np
import pytest
from conftest import WIDTH, tiny_tokenizer
from tokenizers import AddedToken, normalizers

import logitproc as lp
from logitproc import artifact
from logitproc.artifact import describe_tokenizer, new_file, new_folder, write_text

ARRAYS = {
    "bytes": np.array([0, 255]),
    "words": np.array([[0, 256], [65535, 1]]),
    "negative": np.array([-1, 70000], np.int32),
    "long": np.array([2**40, -(2**40)]),
    "real": np.array([0.1, -np.inf, np.pi]),
    "single": np.array([0.1, 2.0], np.float32),
    "nothing": np.zeros((0, 3), np.int64),
    "scalar": np.array(300),
}


class Toy(lp.Artifact):
    kind = "toy"

    def __init__(self, tokenizer, scalars=None, arrays=None):
        self.tokenizer, self.scalars, self.arrays = tokenizer, scalars or {}, arrays or {}

    def _state(self):
        return self.scalars, self.arrays

    @classmethod
    def _restore(cls, tokenizer, scalars, arrays):
        return cls(tokenizer, scalars, arrays)


class Other(Toy):
    kind = "other"


@pytest.fixture
def toy(tokenizer) -> Toy:
    return Toy(describe_tokenizer(tokenizer), {"order": 3, "name": "Quijote \u2014 \u00f1"}, ARRAYS)


# --- saved and loaded ---


def test_scalars_and_arrays_come_back_in_the_narrowest_integer_type(toy, tmp_path):
    toy.save(tmp_path / "a")
    loaded = Toy.load(tmp_path / "a")
    assert (loaded.tokenizer, loaded.scalars) == (toy.tokenizer, toy.scalars)
    assert set(loaded.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded.arrays[name], array)
        assert loaded.arrays[name].shape == array.shape
    types = {name: array.dtype.name for name, array in loaded.arrays.items()}
    assert types == {
        "bytes": "uint8", "words": "uint16", "negative": "int32", "long": "int64", "real": "float64",
        "single": "float32", "nothing": "uint8", "scalar": "uint16",
    }  # fmt: skip


def test_an_array_longer_than_a_block_comes_back_whole(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "_BLOCK", 7)
    grid = np.arange(300).reshape(20, 15)
    Toy(toy.tokenizer, arrays={"grid": grid, "strided": grid[:, ::2]}).save(tmp_path / "a")
    loaded = Toy.load(tmp_path / "a").arrays
    np.testing.assert_array_equal(loaded["grid"], grid)
    np.testing.assert_array_equal(loaded["strided"], grid[:, ::2])


def test_the_same_content_gives_the_same_bytes(toy, tmp_path):
    toy.save(tmp_path / "a")
    Toy.load(tmp_path / "a").save(tmp_path / "b")
    backwards = Toy(toy.tokenizer, toy.scalars, dict(reversed(ARRAYS.items())))
    backwards.save(tmp_path / "c")
    for file in ("artifact.json", "artifact.safetensors"):
        assert len({(tmp_path / copy / file).read_bytes() for copy in "abc"}) == 1


def test_a_path_may_be_relative_to_a_base_and_a_missing_one_is_named(toy, tmp_path):
    toy.save(tmp_path / "a")
    assert Toy.load("a", base=tmp_path).scalars == toy.scalars
    with pytest.raises(FileNotFoundError, match="No artifact at b: .*artifact.json"):
        Toy.load("b", base=tmp_path)


# --- refused ---


def test_another_kind_is_refused(toy, tmp_path):
    toy.save(tmp_path / "a")
    with pytest.raises(ValueError, match="holds a 'toy', not a 'other'"):
        Other.load(tmp_path / "a")


def test_a_newer_format_is_refused_even_if_it_lacks_what_we_know(toy, tmp_path):
    toy.save(tmp_path / "a")
    (tmp_path / "a" / "artifact.json").write_text(json.dumps({"format": 2, "library": "9.9"}))
    with pytest.raises(ValueError, match=r"format 2, written by logitproc 9\.9; .* up to 1"):
        Toy.load(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"format": 1}', '{"format": "1"}', "\udcff"])
def test_a_damaged_description_is_refused(toy, tmp_path, text):
    toy.save(tmp_path / "a")
    (tmp_path / "a" / "artifact.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="is damaged"):
        Toy.load(tmp_path / "a")


def test_a_description_that_does_not_fit_its_arrays_is_refused(tmp_path):
    lp.NGramPrior.from_ids([[1, 2, 3]], order=2, vocab_size=5).save(tmp_path / "a")
    file = tmp_path / "a" / "artifact.json"
    document = json.loads(file.read_text())
    for damaged in ({"scalars": {}}, {"scalars": {**document["scalars"], "order": 4}}, {"tokenizer": {}}):
        file.write_text(json.dumps(document | damaged))
        with pytest.raises(ValueError, match="artifact.json is damaged: it does not fit its arrays"):
            lp.NGramPrior.load(tmp_path / "a")


def test_damaged_missing_and_swapped_numbers_are_refused(toy, tmp_path):
    toy.save(tmp_path / "a")
    file = tmp_path / "a" / "artifact.safetensors"
    whole = file.read_bytes()
    other = Toy(toy.tokenizer, arrays={"bytes": np.array([1])})
    other.save(tmp_path / "b")
    swapped = (tmp_path / "b" / "artifact.safetensors").read_bytes()
    for data in (whole[:-1], whole + b"\0", whole[:-1] + bytes([whole[-1] ^ 1]), b"", swapped):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="is damaged: its SHA-256 is"):
            Toy.load(tmp_path / "a")
    file.unlink()
    with pytest.raises(ValueError, match="is damaged: artifact.safetensors is missing"):
        Toy.load(tmp_path / "a")


# --- tokenizers ---


def test_the_same_tokenizer_passes_whatever_its_pad_token(toy, tokenizer):
    toy.check_tokenizer(tokenizer)
    other = tiny_tokenizer()
    other.pad_token = "</s>"
    toy.check_tokenizer(other)
    added = tiny_tokenizer()
    added.add_special_tokens({"pad_token": "<filling>"})
    assert len(added) == WIDTH + 1
    toy.check_tokenizer(added)


def test_another_vocabulary_bos_or_normaliser_is_refused_and_both_are_named(toy):
    grown, lower = tiny_tokenizer(), tiny_tokenizer()
    grown.add_tokens(["w9000"])
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    others = [tiny_tokenizer(WIDTH + 1), tiny_tokenizer(bos_token="w5"), tiny_tokenizer(eos_token="w6")]
    for other in (*others, grown, lower):
        with pytest.raises(ValueError) as caught:
            toy.check_tokenizer(other)
        for side in (toy.tokenizer, describe_tokenizer(other)):
            assert f"({side['vocab_size']} tokens, {side['fingerprint'][:12]})" in str(caught.value)


def test_a_tokenizer_is_described_once_and_anew_when_it_changed(monkeypatch):
    tokenizer, asked = tiny_tokenizer(), []
    monkeypatch.setattr(artifact, "_describe", lambda *a, real=artifact._describe: asked.append(1) or real(*a))
    first = describe_tokenizer(tokenizer)
    first["special"].append(99)
    assert 99 not in describe_tokenizer(tokenizer)["special"] and len(asked) == 1
    before = describe_tokenizer(tokenizer)["fingerprint"]
    tokenizer.add_tokens([AddedToken("w9", special=True)], special_tokens=True)  # it was a plain token
    assert describe_tokenizer(tokenizer)["fingerprint"] != before and len(asked) == 2
    tokenizer.add_tokens(["quite-new"])
    describe_tokenizer(tokenizer)
    assert len(asked) == 3
    key = id(tokenizer)
    del tokenizer
    gc.collect()
    assert key not in artifact._described


def test_the_description_counts_to_the_largest_id(tokenizer):
    about = describe_tokenizer(tokenizer)
    assert (about["vocab_size"], about["bos"], about["eos"]) == (WIDTH, 1, 2)
    assert set(about["special"]) >= {0, 1, 2}


# --- all or nothing ---


def test_a_failure_leaves_nothing_behind_and_the_old_folder_intact(tmp_path):
    def fail(target):
        with new_folder(target, force=True) as new:
            (new / "half").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    old = tmp_path / "old"
    old.mkdir()
    (old / "artifact.json").write_text("kept")
    for target in (old, tmp_path / "fresh"):
        with pytest.raises(OSError, match="No space left"):
            fail(target)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["artifact.json", "old"]


def test_a_full_disk_while_saving_leaves_the_old_artifact_intact(toy, tmp_path, monkeypatch):
    toy.save(tmp_path / "a")

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        Toy(toy.tokenizer).save(tmp_path / "a", force=True)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "text", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert Toy.load(tmp_path / "a").scalars == toy.scalars


def test_a_failed_swap_puts_the_old_folder_back(toy, tmp_path, monkeypatch):
    toy.save(tmp_path / "a")
    replace = os.replace

    def refuse(source, target):
        if target == tmp_path / "a" and ".old." not in str(source):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Input/output"):
        Toy(toy.tokenizer).save(tmp_path / "a", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert Toy.load(tmp_path / "a").scalars == toy.scalars


def test_a_folder_that_cannot_be_made_is_refused_before_work_starts(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file takes no new folder"), new_folder(tmp_path / "file/below/new"):
        raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_existing_folder_is_refused_before_any_work_and_replaced_by_force(toy, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "artifact.json").write_text("stale")
    (tmp_path / "a" / "stale").write_text("stale")
    with pytest.raises(FileExistsError, match="--force"):
        with new_folder(tmp_path / "a"):
            pytest.fail("the block must not run")
    toy.save(tmp_path / "a", force=True)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["artifact.json", "artifact.safetensors"]


def test_what_is_saved_has_the_usual_permissions(toy, tmp_path):
    toy.save(tmp_path / "a")
    write_text(tmp_path / "text", "text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").write_text("plain")
    mode = lambda name: stat.S_IMODE((tmp_path / name).stat().st_mode)
    assert (mode("a"), mode("text")) == (mode("folder"), mode("plain"))
    assert mode("a/artifact.json") == mode("plain")


def test_a_text_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "made" / "on" / "the" / "way.txt"
    write_text(target, "\u00f1\n")
    with pytest.raises(RuntimeError):
        with new_file(target) as file:
            file.write("half")
            raise RuntimeError
    assert target.read_text(encoding="utf-8") == "\u00f1\n"
    assert [p.name for p in target.parent.iterdir()] == ["way.txt"]


def test_force_replaces_only_what_was_written_here(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with (
        pytest.raises(FileExistsError, match="it is not replaced"),
        new_folder(tmp_path / "thesis", force=True),
    ):
        pass
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
