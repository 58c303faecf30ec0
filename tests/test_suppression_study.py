"""The judgement and the sampler of eval/suppression_study.py, on numbers worked by hand and a tiny model."""


import numpy as np
import pytest
import torch
from conftest import WIDTH, tiny_model
from transformers import LogitsProcessorList, TemperatureLogitsWarper

import logitproc as lp

pytest.importorskip("sklearn")
import suppression_study as study


def cell(diversity: float, accuracy: float, nats: float, items: int = 400):
    right = np.zeros(items)
    right[: round(accuracy * items)] = 1
    figures = dict.fromkeys(study.Figures._fields, 0.0) | {
        "vendi": diversity, "right": right, "nats": np.tile([10 * nats, 10.0], (items, 1)),
    }  # fmt: skip
    return study.Figures(**figures)


def curve(*points):
    made = study.Curve.__new__(study.Curve)
    made.cells = [[cell(*point), cell(*point)] for point in points]
    return made


def test_curves_are_compared_where_both_have_one_diversity():
    a = curve((100, 0.9, 3.0), (200, 0.7, 4.0))
    b = curve((50, 0.8, 3.5), (150, 0.6, 4.5))
    found = study.compare(a, b, "vendi", 120.0, draws=200)
    # At 120: a has .86 and 3.2 nats, b has .66 and 4.2.
    assert (found["diversity"], found["reaches"]) == (120.0, True)
    assert found["accuracy"][0] == pytest.approx(0.2) and found["nats"][0] == pytest.approx(-1.0)
    assert found["accuracy"][1] < 0.2 < found["accuracy"][2] < 0.3
    beyond = study.compare(a, b, "vendi", 500.0, draws=10)
    assert (beyond["diversity"], beyond["reaches"]) == (150.0, False)
    same = study.compare(a, a, "vendi", 120.0, draws=200)["accuracy"]
    assert same[0] == 0 and same[1] < 0 < same[2]


def test_the_sampler_continues_as_generate_does_and_drops_what_has_ended():
    model, prompt, rows = tiny_model(), [5, 6, 7], 12
    greedy = LogitsProcessorList([TemperatureLogitsWarper(1e-4)])
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=study.LONGEST, do_sample=False)[0, 3:].tolist()
    eos = expected[20]
    expected = expected[: expected.index(eos)]
    found = study.sample(model, lp.Chain(), greedy, prompt, rows, torch.Generator(), eos)
    assert found == [expected] * rows
    warm = LogitsProcessorList([TemperatureLogitsWarper(1.0)])
    ends = [len(x) for x in study.sample(model, lp.Chain(), warm, prompt, 200, torch.Generator(), eos)]
    assert len(ends) == 200 and len(set(ends)) > 5 and max(ends) <= study.LONGEST


def test_xtc_drops_the_likely_tokens_but_the_least_of_them_and_never_near_an_end():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    always = study.XTC(1.0, 0.1, 3, torch.Generator())
    assert always(None, scores).softmax(-1).tolist() == [pytest.approx([0, 0, 0.75, 0.25])]
    assert torch.equal(study.XTC(0.0, 0.1, 3, torch.Generator())(None, scores), scores)
    assert torch.equal(study.XTC(1.0, 0.1, 0, torch.Generator())(None, scores), scores)
    assert torch.equal(study.XTC(1.0, 0.4, 3, torch.Generator())(None, scores), scores), "one token is kept"


def test_the_frequency_penalty_counts_the_generated_tokens_of_its_own_text():
    scores, penalty = torch.zeros(2, WIDTH), study.FrequencyPenalty(0.5)
    out = penalty.apply(torch.tensor([[7, 8, 8], [9, 8, -1]]), scores, torch.tensor([2, 2]))
    assert out[0, [7, 8]].tolist() == [0.0, -1.0] and out[1, [9, 8]].tolist() == [0.0, -0.5]


def test_tokens_are_drawn_by_their_probabilities_and_never_a_forbidden_one():
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = study.draw(p.log().repeat(20_000, 1), torch.Generator().manual_seed(0))[:, 0]
    torch.testing.assert_close(drawn.bincount(minlength=6) / 20_000, p, atol=0.012, rtol=0)
    assert set(drawn.tolist()) == {1, 3, 4}
