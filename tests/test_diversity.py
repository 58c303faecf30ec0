"""Diversity figures worked by hand, their closed forms against double sums, and the script that compares arms."""

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

from logitproc import assessment, corpus
from logitproc.assessment import Real, assess, table
from logitproc.diversity import (
    distance_to,
    nearest_neighbour,
    remote_clique,
    same_length,
    self_bleu,
    vendi,
    words,
)
from logitproc.features import SentenceFeatures, tf_idf
from logitproc.metrics import distinct_n

EVAL = Path(__file__).parent.parent / "eval"
BOTH_FORMS = pytest.mark.parametrize("form", [np.asarray, sparse.csr_array], ids=["dense", "sparse"])


def unit_rows(rows: int, d: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, d)) + 0.3  # not centred: the mean must matter
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# --- meaning ---


@BOTH_FORMS
def test_remote_clique_of_known_sets(form):
    same, four = np.tile(unit_rows(1, 5), (7, 1)), np.eye(4)
    antipodal = np.array([[1.0, 0.0]] * 50 + [[-1.0, 0.0]] * 50)
    assert remote_clique(form(same)) == pytest.approx(0, abs=1e-12)
    assert remote_clique(form(four)) == pytest.approx(1)
    assert remote_clique(form(antipodal)) == pytest.approx(1.0101, abs=5e-5)  # above 100 different texts:
    assert remote_clique(form(np.eye(100))) == pytest.approx(1)
    a, b = unit_rows(2, 3)
    assert remote_clique(form(np.stack([a, b]))) == pytest.approx(1 - a @ b)
    assert remote_clique(form(np.stack([a, b])), "euclidean") == pytest.approx(np.linalg.norm(a - b))
    assert math.isnan(remote_clique(form(a[None])))


@BOTH_FORMS
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_remote_clique_equals_the_double_sum_and_the_m_form_differs_by_its_factor(form, distance):
    x = unit_rows(600, 8)  # more than one block
    between = 1 - x @ x.T if distance == "cosine" else np.linalg.norm(x[:, None] - x[None], axis=-1)
    m = len(x)
    off = between[~np.eye(m, dtype=bool)]
    found = remote_clique(form(x), distance)
    assert found == pytest.approx(off.sum() / (m * (m - 1)))
    assert found * (m - 1) / m == pytest.approx(off.sum() / m**2)


@BOTH_FORMS
def test_vendi_counts_orthogonal_texts_and_copies_once(form):
    assert vendi(form(np.tile(unit_rows(1, 5), (6, 1)))) == pytest.approx(1)
    assert vendi(form(np.eye(4))) == pytest.approx(4)
    assert vendi(form(np.repeat(np.eye(4), 9, axis=0))) == pytest.approx(4)
    x = unit_rows(5, 3)  # by the definition, with the larger of the two matrices
    values = np.linalg.eigvalsh(x @ x.T / 5)
    values = values[values > 1e-12]
    assert vendi(form(x)) == pytest.approx(np.exp(-(values * np.log(values)).sum()))


@BOTH_FORMS
def test_nearest_neighbour_sees_what_remote_clique_does_not(form):
    antipodal = np.array([[1.0, 0.0]] * 2 + [[-1.0, 0.0]] * 2)
    assert nearest_neighbour(form(antipodal)) == (pytest.approx(0), 1.0)
    x = unit_rows(600, 8)
    between = 1 - x @ x.T + 10 * np.eye(600)
    mean, near = nearest_neighbour(form(x), 0.05)
    assert mean == pytest.approx(between.min(1).mean()) and 0 < near < 1
    assert near == pytest.approx((between.min(1) < 0.05).mean())
    assert all(map(math.isnan, nearest_neighbour(form(x[:1]))))


@BOTH_FORMS
def test_the_distance_to_real_texts_is_the_mean_over_all_pairs(form):
    x, y = unit_rows(6, 4), unit_rows(5, 4, seed=1)
    assert distance_to(form(x), form(y)) == pytest.approx((1 - x @ y.T).mean())


# --- wording ---


def test_words_are_lower_case_and_marks_are_words():
    assert words("It's  I, Ishmael.") == ["it", "'", "s", "i", ",", "ishmael", "."]


@pytest.mark.parametrize("m", [1, 4, 9])
def test_distinct_1_of_one_repeated_token_is_one_in_its_length(m):
    assert distinct_n([["a"] * m], 1) == pytest.approx(1 / m)


def test_the_same_length_is_made_by_cutting_the_last_text():
    assert same_length(["abc", "de", "fgh"], 4) == ["abc", "d"]
    assert same_length(["abc"], 9) == ["abc"]


def test_self_bleu_worked_example():
    # "a b c d" against "a b c e": 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, 0 (counts .1) of 1.
    one_way = (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** (1 / 4)
    assert self_bleu(["abcd", "abce"]) == pytest.approx(one_way)
    # Of order 1: "a a" finds one "a" (clipped) in "a b b": 1/2, and is 2 words against 3: exp(1 - 3/2).
    # "a b b" finds one "a" and no "b": 1/3; it is not shorter.
    assert self_bleu(["aa", "abb"], n=1) == pytest.approx((math.exp(-0.5) / 2 + 1 / 3) / 2)


def test_self_bleu_of_copies_is_one_and_each_text_is_judged_by_all_others():
    assert self_bleu(["abcdef"] * 3) == pytest.approx(1)
    assert self_bleu(["abcdef", "uvwxyz", "ghijkl"]) < 0.1
    # "ab" finds "a" in one text and "b" in another; its pair in none.
    assert self_bleu(["ab", "a", "b"], n=1) == pytest.approx(1)
    assert math.isnan(self_bleu(["abc", ""]))


# --- arms ---

LIKE = {"good": "a fine and lovely film of warm light", "bad": "the dull grey plot drags on for hours"}
PLACES = "rome paris oslo delhi lima cairo quito tunis accra minsk sofia riga".split()


def items(labels: str, seed: int) -> list[dict]:
    draw = np.random.default_rng(seed)
    return [
        {
            "text": f"{' '.join(draw.permutation(LIKE[label].split())[:5])} in {draw.choice(PLACES)} {i}",
            "label": label,
            "base_nll": 2.0 + i % 2,
            "token_ids": [5] * (1 + i % 2),
        }
        for i, label in enumerate(labels.split())
    ]


def real(n: int) -> Real:
    return Real([(item["text"], item["label"]) for item in items("good bad " * n, 7)])


def test_assess_tells_a_diverse_set_from_copies_and_right_labels_from_wrong_ones():
    good, copies = items("good bad " * 20, 0), items("good bad", 1) * 30
    wrong = [{**item, "label": {"good": "bad", "bad": "good"}[item["label"]]} for item in good]
    found = assess({"good": good, "copies": copies, "wrong": wrong}, real(40))
    arms, settings = found["arms"], found["settings"]
    assert settings["texts"] == 40 and settings["distance"] == "cosine" and "offline" in settings["features"]
    assert arms["good"]["vendi"] > 20 and arms["copies"]["vendi"] == pytest.approx(2, abs=0.3)
    assert arms["good"]["near_duplicates"] < 0.2 and arms["copies"]["near_duplicates"] == 1
    assert arms["good"]["distinct_3"] > 2 * arms["copies"]["distinct_3"]
    assert arms["good"]["vocabulary"] > arms["copies"]["vocabulary"]
    assert arms["good"]["self_bleu"] < arms["copies"]["self_bleu"] == pytest.approx(1)
    for prefix in ("", "second_"):
        assert arms["good"][f"{prefix}label_accuracy"] == 1 and arms["wrong"][f"{prefix}label_accuracy"] == 0
        assert arms["good"][f"{prefix}student_accuracy"] == 1
        assert arms["wrong"][f"{prefix}student_accuracy"] == 0
    assert settings["oracles"] == {"words": (1.0, 0.0), "naive Bayes": (1.0, 0.0)}
    # nats are weighted by tokens: (2 * 1 + 3 * 2) / 3
    assert arms["good"]["base_perplexity"] == pytest.approx(math.exp(8 / 3))
    shown = table(found)
    assert "100.0% ± 0.0%" in shown and "TF-IDF" in shown and "16 others" in shown


def test_duplicates_do_not_change_the_offline_features():
    texts = ["one two three", "two four five"]
    once, often = SentenceFeatures(None, texts), SentenceFeatures(None, texts * 5)
    assert (once(texts) != often(texts)).nnz == 0
    assert np.allclose(np.sqrt(once(texts).power(2).sum(1)), 1) and once(["unknown"]).nnz == 0


def test_why_the_offline_features_are_not_decomposed():
    # A decomposition fitted to what it measures keeps what repeats: it finds copies more diverse than originals.
    draw = np.random.default_rng(0)
    text = lambda: " ".join(f"w{i}" for i in draw.zipf(1.4, 12).clip(max=5000))
    distinct, copies = [text() for _ in range(200)], [text() for _ in range(100)] * 2
    features = SentenceFeatures(None, distinct + copies)
    assert vendi(features(distinct)) > vendi(features(copies))
    weights = tf_idf().fit_transform(distinct + copies)
    rows = TruncatedSVD(100, random_state=0).fit_transform(weights)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert vendi(rows[:200]) < vendi(rows[200:])


def test_embeddings_are_normalised_named_and_used_by_the_second_oracle(monkeypatch):
    class SentenceTransformer:
        def __init__(self, name):
            assert name == "some/model"

        def encode(self, texts, show_progress_bar):
            return np.array([[3.0 * ("lovely" in t or "film" in t or "fine" in t), 4.0] for t in texts])

    module = type(sys)("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    assert SentenceFeatures("some/model", [])(["a fine day", "x"]).tolist() == [[0.6, 0.8], [0, 1]]
    found = assess({"arm": items("good bad " * 20, 0)}, real(40), "some/model")
    assert found["settings"]["features"] == "some/model"
    assert set(found["settings"]["oracles"]) == {"words", "embeddings"}


def test_what_is_not_installed_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="'some/model' need the package sentence-transformers: pip install"):
        SentenceFeatures("some/model", [])
    monkeypatch.setitem(sys.modules, "sklearn", None)
    found = assess({"arm": items("good bad " * 3, 0)})  # lexical figures need nothing
    assert "pip install 'logitproc[eval]'" in found["settings"]["features"] and "vendi" not in found["arms"]["arm"]
    with pytest.raises(ImportError, match="need scikit-learn: pip install 'logitproc\\[eval\\]'"):
        assess({"arm": items("good bad " * 3, 0)}, real(9))


def test_a_set_of_one_label_still_has_a_student():
    arms = assess({"arm": items("good good good", 0)}, real(20))["arms"]
    assert arms["arm"]["student_accuracy"] == pytest.approx(0.5, abs=0.3)


@pytest.mark.parametrize(
    "arms, data, sentence",
    [
        ({"a": items("good", 0)}, None, "a holds 1 texts; diversity needs at least two"),
        ({"a": items("good bad", 0)}, Real([("x", "good"), ("y", "ugly")] * 5), "labels bad, which the real"),
        ({"a": items("good good", 0)}, Real([("x", "good")] * 5), "has one label, good; an oracle needs two"),
    ],
)
def test_assess_refuses_what_it_cannot_judge(arms, data, sentence):
    with pytest.raises(ValueError, match=sentence):
        assess(arms, data)


def test_the_real_test_data_is_set_aside_once():
    train, test = real(40).split()
    assert len(test) == 16 and sorted([*train, *test]) == sorted(real(40).train)
    assert Real([("a", "b")], [("c", "b")]).split() == ([("a", "b")], [("c", "b")])


# --- the script ---


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EVAL))
    return importlib.import_module("diversity")


@pytest.fixture
def here(tmp_path):
    write = lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain" / "data.jsonl", items("good bad " * 2, 1) * 6)
    write(tmp_path / "diverse.jsonl", items("good bad " * 12, 0))
    rows = "".join(f'"{text}",{label}\n' for text, label in real(30).train)
    (tmp_path / "real.csv").write_text("text,label\n" + rows)
    (tmp_path / "unlabelled.csv").write_text("text,kind\na,b\n")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "items-0.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": "a"}\n')
    return tmp_path


def test_the_script_writes_a_table_json_and_a_plot(script, here, capsys):
    pytest.importorskip("matplotlib")
    flags = ["--real", str(here / "real.csv"), "--out", str(here / "out")]
    assert script.main([str(here / "plain"), f"mine={here / 'diverse.jsonl'}", *flags]) == 0
    found = json.loads((here / "out" / "diversity.json").read_text())
    assert list(found["arms"]) == ["plain", "mine"] and found["settings"]["texts"] == 24
    assert found["arms"]["mine"]["vendi"] > found["arms"]["plain"]["vendi"]
    assert (here / "out" / "diversity.png").stat().st_size > 5000
    assert "Vendi score" in capsys.readouterr().out


def test_the_frontier_holds_what_nothing_beats_on_both_axes(script):
    arm = lambda x, y: {"vendi": x, "label_accuracy": y}
    arms = {"a": arm(1, 0.9), "b": arm(2, 0.8), "c": arm(1.5, 0.7), "d": arm(3, 0.5), "e": arm(3, 0.4)}
    assert script.frontier(arms, "vendi") == ["a", "b", "d"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["nowhere"], "There is no nowhere."),
        (["unfinished"], "its collection is not finished, start it again"),
        (["broken.jsonl"], "line 2, is no JSON object with text and label"),
        (["plain", "plain"], "Two arms are named 'plain'; give one as NAME=FOLDER"),
        (["plain", "--real", "nowhere.csv"], "There is no file nowhere.csv"),
        (["plain", "--real", "unlabelled.csv"], "needs the columns 'text' and 'label'; a row has 'text', 'kind'"),
        (["plain", "--real-test", "real.csv"], "--real-test needs --real"),
    ],
)
def test_the_script_refuses_bad_input_in_one_sentence(script, here, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(here)
    assert script.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and sentence in shown.err and shown.err.count("\n") == 1


def test_labelled_texts_are_read_from_every_format(tmp_path):
    (tmp_path / "a.tsv").write_text("label\ttext\n1\tone\n0\t \n")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "label": 1}\n')
    assert corpus.labelled(tmp_path / "a.tsv") == corpus.labelled(tmp_path / "a.jsonl") == [("one", "1")]
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="csv, tsv, jsonl or json"):
        corpus.labelled(tmp_path / "a.txt")


def test_every_figure_of_the_table_is_measured():
    arms = assess({"arm": items("good bad " * 9, 0)}, real(20))["arms"]
    assert {key for key, _, _ in assessment.FIGURES} == {k for k in arms["arm"] if not k.endswith("_error")}
