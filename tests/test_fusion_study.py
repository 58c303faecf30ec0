"""The judgement of `eval/fusion.py` on figures made up so that the right answer is known."""

import math

import fusion_cells
import fusion_judge
import fusion_tasks
import numpy as np
import pytest
from conftest import tiny_tokenizer

TOKENS = np.full(60, 20)


def judge(**losses: float) -> fusion_judge.Judge:
    """Every document has 20 tokens; losses are nats a token, noise that all arms share, a little of their own."""
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.5, 60)
    arms = {
        arm.replace("_", " "): {
            "nll": (TOKENS * (loss + shared + rng.normal(0, 0.01, 60))).tolist(),
            "kl": [1.0] * 60, "right": [1, 0] * 30,
        }
        for arm, loss in losses.items()
    }  # fmt: skip
    return fusion_judge.Judge([{"tokens": TOKENS.tolist(), "arms": arms, "alpha": {}}])


def test_differences_are_paired_and_closure_lies_between_host_and_ceiling():
    j = judge(host=5.0, expert=4.0, ceiling=3.0, grid=4.02)
    mean, low, high = j.closure("expert")
    assert mean == pytest.approx(0.5, abs=0.01) and low < mean < high < 0.52
    assert j.beats("expert", "grid") and not j.beats("grid", "expert"), "0.02 nats, far below the noise they share"
    assert j.figures("expert")["loss_ratio"] == pytest.approx(3 / 4, abs=0.01)
    assert j.figures("ceiling")["accuracy"] == 0.5 and j.figures("ceiling")["accuracy_ratio"] is None


def test_the_default_is_the_best_mode_that_falls_below_the_host_nowhere():
    better = {"host": 5.0, "ceiling": 3.0, "expert": 4.0, "grid": 3.2, "mixture": 3.6}
    worse = {**better, "grid": 5.5, "mixture": 4.5}
    choose = lambda dev, doubtful: fusion_judge.choose(dev, doubtful, ("grid", "mixture"))
    good, bad = judge(**better), judge(**worse)
    assert choose({"a": good}, {"a": good}) == "grid"
    assert choose({"a": good, "b": bad}, {}) == "mixture"
    assert choose({"a": good}, {"a": bad}) == "mixture", "not even with the expert of another task"


def test_a_setting_says_which_experts_there_are():
    names = ("a", "b", "c")
    found = {setting: fusion_cells.experts_of(setting, "c", names) for setting in fusion_cells.SETTINGS}
    assert found == {"single": ("c",), "wrong": ("a",), "several": names, "unseen": ("a", "b")}
    assert [fusion_cells.experts_of(setting, "b", names) for setting in fusion_cells.WRONG[:2]] == [("c",), ("a",)]


def test_the_bound_is_that_of_every_text():
    parts = {"host": 4.0, "upscale_0.3": 3.0}
    held = judge(**parts, mixture_share_0=2.96)
    assert fusion_judge.bound_excess(held) < 0
    broken = judge(**parts, mixture_share_0=3.0 + 2.0 * math.log(2) / 20)
    assert fusion_judge.bound_excess(broken) > 0


def test_a_label_is_judged_at_the_first_token_in_which_the_words_differ():
    task = fusion_tasks.Task(("w9 w4", "w9 w5 w6"), [], [], [])
    ids, at, options = fusion_tasks.encode(tiny_tokenizer(), task, fusion_tasks.Document("w7 w8 ", 1))
    assert (ids, at, options) == ([1, 7, 8, 9, 5, 6, 2], 4, [4, 5])
    assert fusion_tasks.encode(tiny_tokenizer(), task, fusion_tasks.Document("w7", None)) == ([1, 7, 2], None, [])


def cell(expert: float) -> dict:
    """Of a seed whose expert has this loss, and whose mixture a tenth less."""
    j = judge(host=5.0, expert=expert, mixture=0.9 * expert, ceiling=3.0)
    arms = {arm: {"nll": nll.tolist(), "kl": [1.0] * 60, "right": []} for arm, nll in j.nll.items()}
    return {"tokens": TOKENS.tolist(), "arms": arms, "alpha": {}}


def width(found: dict) -> float:
    return found["difference"][2] - found["difference"][1]


def test_over_seeds_an_expert_that_depends_on_its_seed_has_a_wider_interval():
    alike = fusion_judge.over_seeds([[cell(4.0), cell(4.0)]], "mixture", "expert")
    apart = fusion_judge.over_seeds([[cell(3.5), cell(4.5)]], "mixture", "expert")
    assert apart["closure"] == pytest.approx([0.925, 0.475], abs=0.01)
    for found in (alike, apart):
        mean, low, high = found["difference"]
        assert mean == pytest.approx(-0.4, abs=0.01) and low < mean < high
    assert width(apart) > 3 * width(alike)


def test_over_tasks_seeds_are_drawn_together_and_documents_are_not():
    over = lambda *tasks: fusion_judge.over_seeds(tasks, "mixture", "expert")
    both = over([cell(3.5), cell(4.5)], [cell(3.0), cell(4.0)])
    assert both["closure"] == pytest.approx([(0.925 + 1.15) / 2, (0.475 + 0.7) / 2], abs=0.01)
    assert both["difference"][0] == pytest.approx(-0.375, abs=0.01)
    seeds = [cell(3.5), cell(4.5)]
    assert width(over(seeds, seeds)) > 0.9 * width(over(seeds)), "one draw of seeds for all tasks"
    once = [cell(4.0)]
    assert width(over(once, once)) == pytest.approx(width(over(once)) / math.sqrt(2), rel=0.15)
