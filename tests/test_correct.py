"""Human correction of a collection: the paper's score, the proxies, the filter, the CSV that people edit."""

import csv
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from logitproc import cli
from logitproc.collect import correct
from logitproc.collect.correct import apply_labels, export_labels, replaced, uncertainty

CLASSES = ["bad", "good"]
WORDS = {"good": "fine lovely warm bright joy", "bad": "dull grey cold dreary gloom", "out": "tax invoice form page"}


def text_of(kind: str, i: int) -> str:
    draw = np.random.default_rng(i)
    return " ".join([*draw.choice(WORDS[kind].split(), 3, replace=False), f"n{i}"])


def collection(folder: Path, wrong: float = 0.25, out: int = 0, size: int = 80) -> dict[str, str]:
    """data.jsonl with some wrong labels and texts out of scope; returns id -> what each text really is."""
    truth, lines = {}, []
    for i in range(size):
        true = CLASSES[i % 2]
        label = CLASSES[(i + 1) % 2] if (i // 2) % round(1 / wrong) == 0 else true
        kind = "out" if i >= size - out else true
        truth[f"{i:04}"] = kind
        lines.append(json.dumps({"id": f"{i:04}", "label": label, "text": text_of(kind, i)}) + "\n")
    folder.mkdir(exist_ok=True)
    (folder / "data.jsonl").write_text("".join(lines))
    return truth


def fill_in(path: Path, truth: dict[str, str], number: int | None = None) -> None:
    """What a person would do with the first rows of an exported CSV."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, correct.COLUMNS)
        writer.writeheader()
        for at, row in enumerate(rows):
            true = truth[row["id"]]
            if number is None or at < number:
                row |= {"in_scope": "no"} if true == "out" else {"correct_label": true}
            writer.writerow(row)


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- the score ---


def test_label_replacement_worked_by_hand():
    def found(prompted: str, proxies: list[float], weight: float = 0.3) -> str:
        return replaced(np.array([prompted]), np.array([proxies]), CLASSES, weight)[0]

    # The prompted class with proxy 0 scores .3, the other with proxy 1 scores .7.
    assert found("good", [1.0, 0.0]) == "bad"
    # A tie when the proxies differ by .3/.7 = .4286, and the prompted label wins it.
    assert found("good", [0.3 / 0.7, 0.0]) == "good" and found("bad", [0.2, 0.2 + 0.3 / 0.7]) == "bad"
    assert found("good", [0.43, 0.0]) == "bad" and found("good", [0.42, 0.0]) == "good"
    # With weight 1 no label changes, with weight 0 the proxy alone decides.
    assert found("good", [1.0, 0.0], 1.0) == "good" and found("good", [0.51, 0.5], 0.0) == "bad"
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 1.5"):
        found("good", [1.0, 0.0], 1.5)


def test_three_classes_take_the_best_score():
    proxies = np.array([[0.1, 0.9, 0.95], [0.5, 0.5, 0.5]])
    assert replaced(np.array(["a", "c"]), proxies, ["a", "b", "c"], 0.3).tolist() == ["c", "c"]


# --- export ---


def test_the_most_uncertain_items_come_first(tmp_path):
    collection(tmp_path, wrong=0.02)
    items = read(tmp_path / "data.jsonl")
    for i in range(5, 50, 9):
        items[i]["text"] = f"lovely fine dull cold n{i}"  # of both kinds
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    assert export_labels(tmp_path, tmp_path / "check.csv", 12) == 12
    with (tmp_path / "check.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == correct.COLUMNS and len(rows) == 12
    shown = [float(row["uncertainty"]) for row in rows]
    assert shown == sorted(shown, reverse=True) and 0 <= shown[-1] <= shown[0] <= 1
    mixed = {f"{i:04}" for i in range(5, 50, 9)}
    assert mixed <= {row["id"] for row in rows[:8]}
    assert all(row["correct_label"] == row["in_scope"] == "" for row in rows)


def test_uncertainty_is_one_less_the_margin_and_needs_two_of_each_label():
    items = [{"label": CLASSES[i % 2], "text": text_of(CLASSES[i % 2], i)} for i in range(20)]
    certain = uncertainty(items)
    items[3]["text"] = "nothing of the kind"
    assert 0 <= certain.min() and certain.max() <= 1 and uncertainty(items)[3] == uncertainty(items).max()
    with pytest.raises(ValueError, match="needs two labels of two items each"):
        uncertainty(items[:3])


# --- apply ---


def test_wrong_labels_are_put_right_from_a_part_that_was_inspected(tmp_path):
    truth = collection(tmp_path)
    export_labels(tmp_path, tmp_path / "check.csv")
    fill_in(tmp_path / "check.csv", truth, 40)
    report = apply_labels(tmp_path, tmp_path / "check.csv")
    after = read(tmp_path / "corrected.jsonl")
    before = {item["id"]: item["label"] for item in read(tmp_path / "data.jsonl")}
    right = lambda key: np.mean([item[key] == truth[item["id"]] for item in after])
    assert right("prompted_label") == 0.75 and right("label") > 0.95
    assert sum(item["inspected"] for item in after) == report["inspected"] == 40
    assert all(item["label"] == truth[item["id"]] for item in after if item["inspected"])
    assert all(item["prompted_label"] == before[item["id"]] for item in after)
    changed = Counter(f"{i['prompted_label']} -> {i['label']}" for i in after if i["label"] != i["prompted_label"])
    assert report["changes"] == dict(changed) and report["changed"] == sum(changed.values()) > 10
    assert report["labels_before"] == dict(Counter(before.values()))
    assert report["labels_after"] == dict(Counter(item["label"] for item in after))
    assert report["proxy_accuracy"]["mean"] > 0.8 and "logistic fit" in report["confidence"]
    assert report["out_of_scope"] == {"marked": 0, "filter": "off, fewer than 5 were marked", "dropped": 0}
    assert "TF-IDF" in report["features"]
    assert json.loads((tmp_path / "corrections.json").read_text()) == report
    balanced = Counter(item["label"] for item in read(tmp_path / "corrected-balanced.jsonl"))
    assert balanced["good"] == balanced["bad"] == min(report["labels_after"].values())


def test_weight_one_keeps_what_was_not_inspected(tmp_path):
    truth = collection(tmp_path)
    export_labels(tmp_path, tmp_path / "check.csv")
    fill_in(tmp_path / "check.csv", truth, 30)
    apply_labels(tmp_path, tmp_path / "check.csv", weight=1.0)
    after = read(tmp_path / "corrected.jsonl")
    assert all(item["label"] == item["prompted_label"] for item in after if not item["inspected"])


@pytest.mark.parametrize("marked, filtered", [(4, False), (8, True)])
def test_items_out_of_scope_are_filtered_when_enough_were_marked(tmp_path, marked, filtered):
    truth = collection(tmp_path, out=16)
    export_labels(tmp_path, tmp_path / "check.csv")
    with (tmp_path / "check.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    outside = [row for row in rows if truth[row["id"]] == "out"][:marked]
    inside = [row for row in rows if truth[row["id"]] != "out"][:40]
    with (tmp_path / "check.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, correct.COLUMNS)
        writer.writeheader()
        writer.writerows([{**row, "in_scope": "no"} for row in outside])
        writer.writerows([{**row, "correct_label": truth[row["id"]]} for row in inside])
    report = apply_labels(tmp_path, tmp_path / "check.csv")
    kept = [item["id"] for item in read(tmp_path / "corrected.jsonl")]
    assert not set(kept) & {row["id"] for row in outside}
    left = [key for key in kept if truth[key] == "out"]
    assert (len(left) <= 1) == filtered and report["out_of_scope"]["dropped"] == 80 - len(kept)
    assert report["out_of_scope"]["filter"].startswith("linear SVC") == filtered
    assert {row["id"] for row in inside} <= set(kept)


# --- the command ---


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """A finished collection in `run`, and its exported CSV; command(...) -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    truth = collection(tmp_path / "run")
    export_labels(tmp_path / "run", tmp_path / "check.csv")
    fill_in(tmp_path / "check.csv", truth, 40)

    def command(*arguments):
        return cli.main(["collect", *arguments]), *capsys.readouterr()

    return command


def test_the_two_commands(command, tmp_path):
    status, out, _ = command("export-labels", "run", "--out", "new.csv", "--number", "9")
    assert status == 0 and "new.csv: 9 items" in out and "apply-labels run --labels new.csv" in out
    status, out, _ = command("apply-labels", "run", "--labels", "check.csv")
    assert status == 0
    for words in ("inspected       40 of 80", "labels changed", "out of scope    0 dropped", "logistic fit", "TF-IDF"):
        assert words in out
    assert (tmp_path / "run" / "corrected.jsonl").is_file()


@pytest.mark.parametrize(
    "edit, sentence",
    [
        (lambda text: text.replace("0001,", "0x01,"), "has no item '0x01'; ids must stay as exported"),
        (lambda text: text.replace(",good,\n", ",god,\n", 1), "'god'. Did you mean 'good'"),
        (lambda text: text.replace(",good,\n", ",good,perhaps\n", 1), "in_scope must be yes or no, got 'perhaps'"),
        (lambda text: text.replace("correct_label", "label2"), "lacks the column 'correct_label'"),
        (lambda text: text.splitlines()[0] + "\n", "holds no inspected item; fill in correct_label"),
        (lambda text: "".join(line + "\n" for line in text.splitlines() if not line.endswith("bad,")),
         "The proxy of 'bad' needs two inspected items with that label and two without; there are 0"),
    ],
)  # fmt: skip
def test_a_csv_with_errors_is_refused_and_nothing_is_written(command, tmp_path, edit, sentence):
    text = (tmp_path / "check.csv").read_text()
    rows = sorted(text.splitlines()[1:], key=lambda row: not row.startswith("0001"))
    (tmp_path / "check.csv").write_text(edit("\n".join([text.splitlines()[0], *rows]) + "\n"))
    status, out, err = command("apply-labels", "run", "--labels", "check.csv")
    assert status == 2 and out == "" and sentence in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "corrected.jsonl").exists()


def test_what_is_missing_is_said(command, tmp_path, monkeypatch):
    assert "There is no file nowhere.csv" in command("apply-labels", "run", "--labels", "nowhere.csv")[2]
    assert "`logitproc collect` writes it when it is done" in command("export-labels", ".", "--out", "x.csv")[2]
    monkeypatch.setitem(sys.modules, "sklearn", None)
    status, _, err = command("export-labels", "run", "--out", "x.csv")
    assert status == 2 and "need scikit-learn: pip install 'logitproc[eval]'" in err and not Path("x.csv").exists()


def test_a_spreadsheet_may_have_added_a_byte_order_mark(command, tmp_path):
    (tmp_path / "check.csv").write_text("\ufeff" + (tmp_path / "check.csv").read_text())
    assert command("apply-labels", "run", "--labels", "check.csv")[0] == 0
