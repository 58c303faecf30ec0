"""The verdicts of `eval/aligndistil.py`, its arms, and the preference pairs of `examples/fine_tune_pocket.py`."""

import aligndistil as study
import fine_tune_pocket as fine_tune
import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer

import logitproc as lp
from logitproc.bundled import plainness


class Fake:
    """An arm whose prompts scatter around a reward and a KL; the noise is the same for all, as for one seed."""

    def __init__(self, kl: float, reward: float, prompts: int = 200):
        noise = np.random.default_rng(0).normal(size=prompts)
        noise -= noise.mean()
        self.values = {"kl": kl + 0.1 * noise, "reward": reward + 0.3 * noise}

    def per_prompt(self, key: str) -> np.ndarray:
        return self.values[key]


def curve(*rewards: float) -> study.Curve:
    return study.Curve([Fake(kl, reward) for kl, reward in enumerate(rewards)])


def test_families_are_compared_at_equal_divergence():
    plain = curve(0.0, 1.0, 2.0, 3.0)
    above = study.compare(curve(0.0, 1.5, 3.0, 3.0), plain)
    assert above["beats"] and above["ahead_somewhere"] and not above["behind_somewhere"]
    # At KL k + x the gain is 0, .5, 1, 0 at the knots; the nine levels stand at .3, .6, ..., 2.7.
    assert above["levels"][0][:2] == pytest.approx([0.3, 0.15], abs=1e-6)
    below = study.compare(plain, curve(0.0, 1.5, 3.0, 3.0))
    assert below["loses"] and below["mean"][0] == pytest.approx(-above["mean"][0])
    same = study.compare(plain, plain)
    assert not (same["beats"] or same["loses"] or same["ahead_somewhere"] or same["behind_somewhere"])
    # More reward at more divergence, on one line: no difference.
    farther = study.compare(study.Curve([Fake(kl, kl) for kl in (0, 1.5, 4)]), plain)
    assert farther["mean"][0] == pytest.approx(0, abs=1e-6)


def test_every_arm_can_be_built_and_is_named_once():
    arms = study.arms()
    assert {study.split(name)[2] for name in arms} == set(study.MASKS)
    for given in arms.values():
        given = dict(given)
        host = given.pop("host")
        chain = lp.Chain.from_spec([{"name": "aligndistil", **given}])
        assert host in ("mini", "base") and len(chain.processors[0].auxiliaries()) in (1, 2)
    assert study.PROMPTS.read_text(encoding="utf-8").count("\n") == 300


def test_the_reward_is_short_words_and_not_too_many():
    assert plainness("The old church by the water") == pytest.approx(1.25)
    assert plainness("") == plainness("... 42!") == 0
    assert plainness("I saw the old man by the sea") == 3.0  # 3.75, clipped
    assert plainness("extraordinarily " * 8) == -3.0
    assert plainness("house no " * 13) == pytest.approx(2 * 13 * (9 - 7) / 26 - 0.1)
    assert plainness("a") == pytest.approx(2 * 3.5 / 8)  # one short word is not much


def test_preference_pairs_follow_the_reward_and_swap_back():
    words = ["of", "extraordinarily"]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(words)
    short, long = (tokenizer.convert_tokens_to_ids([word] * 8) for word in words)
    rows = fine_tune.preferences(tokenizer, ["w3 w4"] * 200, [[short, long]] * 200)
    right = np.mean([row["chosen"].split()[0] == "of" for row in rows])
    assert len(rows) == 200 and 0.98 < right <= 1  # sigmoid(6) = .9975
    assert not fine_tune.preferences(tokenizer, ["w3 w4"], [[short, short]])


def test_a_pair_learns_its_preference(tmp_path, monkeypatch):
    """Four pairs of words through trl: one model learns to prefer the chosen ones, the other the rejected."""
    pytest.importorskip("trl", reason="needs trl: pip install '.[train]'")
    import json

    tokenizer = tiny_tokenizer()
    rows = [{"prompt": f"w{i}", "chosen": " w20 w20", "rejected": " w30 w30"} for i in range(4, 8)]
    same = [row | {"rejected": row["chosen"]} for row in rows]
    monkeypatch.setattr(fine_tune, "load", lambda name: tiny_model())
    monkeypatch.setattr(fine_tune, "load_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(fine_tune, "LEARNING_RATE", 1e-2)
    monkeypatch.setattr(fine_tune, "EPOCHS", 10)
    monkeypatch.setattr(fine_tune.shutil, "copy", lambda *paths: None)  # there is no bundled tokenizer to copy

    def margin(name: str, given: list[dict], reverse: bool) -> float:
        (tmp_path / "pairs").mkdir(exist_ok=True)
        for part, content in (("train", given), ("held-out", rows)):
            (tmp_path / f"pairs/{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
        fine_tune.train_preference(tmp_path, name, reverse, beta=0.1)
        return json.loads((tmp_path / f"{name}.training.json").read_text())["held_out"]["rewards/margins"]

    torch.manual_seed(0)
    plus, minus = margin("plus", rows, False), margin("minus", rows, True)
    assert plus > 0.1 and minus < -0.1
    # Without a difference the gradient is 0 but for rounding, which Adam makes steps of.
    assert abs(margin("neither", same, True)) < 0.1 * min(plus, -minus)
