"""The verdicts of `eval/study.py`."""


import lora
import numpy as np
import pytest
import study
import torch
from conftest import tiny_model


def cells(base, held_out, rep=0.0, prompts=20, spread=0.05):
    """Rows of 20 prompts, two seeds each, that scatter a little around the given means."""
    rng = np.random.default_rng(0)
    other = dict.fromkeys(("style_nll", "style_kn_nll", "js", "overlap", "bigram_seen", "distinct_2"), 0.1)
    return study.Cells([
        {"line": line, "base_nll": base + spread * rng.normal(), "held_out_nll": held_out + 0.05 * rng.normal(),
         "rep_4": rep, **other}
        for line in range(1, prompts + 1) for _ in range(2)
    ])  # fmt: skip


PLAIN, CONTROLS = cells(4.4, 7.5), [cells(4.0, 7.2), cells(3.6, 6.8), cells(3.2, 6.4)]


@pytest.mark.parametrize(
    "setting, admissible, collapse",
    [
        (cells(4.2, 6.0), True, False),  # closer, likelier, below the curve
        (cells(4.2, 7.45), False, False),  # hardly closer, and above the curve
        (cells(4.6, 6.0), False, False),  # costs more than .10 nats of fluency
        (cells(4.2, 6.0, rep=0.05), False, False),  # repeats
        (cells(4.2, 6.0, rep=0.2), False, True),  # loops
        (cells(4.4 + np.log(3.2), 6.0), False, True),  # three times the perplexity
        (cells(4.2, 8.0), False, True),  # away from the style
        (cells(3.6, 6.8), False, False),  # what a lower temperature does as well
    ],
)
def test_a_setting_is_judged_by_the_rule_fixed_before_the_run(setting, admissible, collapse):
    verdict = study.judge(setting, PLAIN, CONTROLS)
    assert (verdict["admissible"], verdict["collapse"]) == (admissible, collapse)


@pytest.mark.parametrize(
    "base, chosen",
    [
        ([4.2, 4.2, 4.2], "1"),
        ([4.2, 4.2, 4.48], "0.5"),  # admissible by its mean, but not surely within the margin
        ([4.48, 4.2, 4.6], "0.5"),
        ([4.48, 4.48, 4.6], "0.5"),  # none is sure
        ([4.6, 4.6, 4.6], None),
    ],
)
def test_the_default_strength_keeps_the_margin_on_all_corpora_with_its_interval(base, chosen):
    judged = {
        s: study.judge(cells(b, 6.0, spread=0.2), PLAIN, CONTROLS)
        for s, b in zip(("0.1", "0.5", "1"), base, strict=True)
    }
    easy = {s: study.judge(cells(4.2, 6.0), PLAIN, CONTROLS) for s in judged}
    assert study.default_strength({"one": easy, "other": judged}) == chosen


def test_a_safe_setting_is_surely_within_the_margin_on_all_corpora_and_its_arm_never_collapses():
    judged = lambda *args, **options: study.judge(cells(*args, **options), PLAIN, CONTROLS)
    good, better = judged(4.2, 6.0), judged(4.2, 5.0)
    unsure, loops = judged(4.48, 5.0, spread=0.2), judged(4.2, 5.0, rep=0.2)
    assert unsure["admissible"] and loops["collapse"]
    arms = {"mild": {"0.5": good, "1": better}, "strong": {"0.5": better, "1": loops}, "unsteered": {}}
    result = {corpus: arms for corpus in study.CORPORA}
    assert [setting[:2] for setting in study.safe_settings(result)] == [("mild", "1"), ("mild", "0.5")]
    result["arxiv"] = {**arms, "mild": {"0.5": good, "1": unsure}}
    assert [setting[:2] for setting in study.safe_settings(result)] == [("mild", "0.5")]


def test_a_setting_must_be_safe_on_every_model_and_what_is_not_on_one_is_not_run_on_the_next(monkeypatch):
    judged = lambda base, held_out: study.judge(cells(base, held_out), PLAIN, CONTROLS)
    verdicts = {"entropy": judged(4.2, 6.0), "surprisal": judged(4.2, 5.0), "budget.2": judged(4.6, 4.0)}
    asked = []

    def run(model, grids, seeds):
        asked.append(grids)
        found = {a: {f"{s:g}": verdicts.get(a, judged(4.7, 4.0)) for s in grid} for a, grid in grids.items()}
        return {corpus: {"unsteered": {}} | found for corpus in study.CORPORA}

    monkeypatch.setattr(study, "run", run)
    result = study.priced({"sure": None, "unsure": None})
    assert set(asked[0]) == {study.CONSTANT, *study.SCHEDULES}
    assert asked[1] == dict.fromkeys((study.CONSTANT, "entropy", "surprisal"), study.STRENGTHS)
    best = study.best_everywhere(result)
    assert {(arm, s) for arm, s, _ in best[:2]} == {("surprisal", "0.7"), ("surprisal", "1")} and len(best) == 4
    assert best[0][2] == pytest.approx(2.5, abs=0.1)


def test_seeds_are_averaged_inside_a_prompt():
    rows = [{"line": 1, "x": 1.0}, {"line": 2, "x": 5.0}, {"line": 1, "x": 3.0}, {"line": 2, "x": 7.0}]
    assert study.Cells(rows).per_prompt("x").tolist() == [2.0, 6.0]


def test_the_control_curve_is_interpolated_between_temperatures():
    # Between (4.0, 7.2) and (3.6, 6.8) the curve passes (3.8, 7.0); the setting lies 1.0 below.
    distance = study.curve_distance(cells(3.8, 6.0), [PLAIN, *CONTROLS])
    assert distance["mean"] == pytest.approx(-1.0, abs=0.05)
    assert distance["low"] < distance["mean"] < distance["high"]


def test_the_plot_has_a_panel_for_each_corpus_and_decoding_and_tells_collapses(tmp_path):
    figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib: pip install '.[plot]'")
    cell = lambda *args, **options: study.judge(cells(*args, **options), PLAIN, CONTROLS)
    arms = {"unsteered": {"1": cell(4.4, 7.5), "0.7": cell(3.2, 6.4)}, study.DEFAULT: {"0.1": cell(4.2, 6.0)}}
    arms["paper"] = {"0.1": cell(4.2, 7.45), "0.5": cell(4.2, 7.4), "1": cell(4.2, 8.0)}  # the last collapses
    axis = figure.Figure().subplots()
    assert [note[2] for note in study.draw(axis, 2, ("paper", arms["paper"]))] == ["1", "0.1"]
    assert [line.get_marker() for line in axis.lines[1:]] == ["o", "o", "x"]
    result = {corpus: arms for corpus in study.CORPORA}
    study.plot({"sample": result, "greedy": result}, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_lora_reads_documents_in_rows_and_learns_no_end(monkeypatch):
    monkeypatch.setattr(lora, "WINDOW", 4)
    monkeypatch.setattr(lora, "TOKENS", 6)
    encode = lambda text, **_: {"input_ids": [int(word) for word in text.split()]}
    tokenizer = type("Tokenizer", (), {"eos_token_id": 9, "__call__": lambda self, text, **_: encode(text)})()
    rows = lora.windows(tokenizer, ["1 2 3", "4 5 6", "7 8 1 2"])  # the third is beyond TOKENS
    assert [row["input_ids"] for row in rows] == [[1, 2, 3, 9], [4, 5, 6, 9]]
    assert [row["labels"] for row in rows] == [[1, 2, 3, -100], [4, 5, 6, -100]]


def test_lora_of_the_same_seed_gives_the_same_model(tmp_path):
    pytest.importorskip("peft", reason="needs peft: pip install '.[train]'")
    tiny_model().save_pretrained(tmp_path)
    rows = [{"input_ids": [1, 2, 3, 4] * 4, "labels": [1, 2, 3, 4] * 4}] * 16
    models = [lora.train(str(tmp_path), rows)[0].state_dict() for _ in range(2)]
    before = tiny_model().state_dict()
    assert all(torch.equal(models[0][key], models[1][key]) for key in before)  # merged: no other keys
    assert any(not torch.equal(models[0][key], before[key]) for key in before)
