"""The study of output heads runs on a tiny model, and its rows say what they should."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer

FILE = Path(__file__).parent.parent / "eval/heads.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("heads_study", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ADVERSARIAL, module.PROMPTS = 60, 2
    module._FLUSH = 8
    return module


@pytest.fixture
def files(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    random = torch.Generator().manual_seed(0)
    for name in ("data", "held-out"):
        words = torch.randint(3, 97, (1000,), generator=random).tolist()
        (tmp_path / f"{name}.txt").write_text(" ".join(f"w{word}" for word in words))
    return tmp_path


def run(study, files, name, *more):
    given = ["--model", files / "model", "--held-out", files / "held-out.txt", "--out", files / "out", "--debug"]
    assert study.main([name, *map(str, given), "--repeats", "1", *map(str, more)]) == 0
    return [json.loads(line) for line in (files / f"out/{name}.json").read_text().splitlines()]


def test_quality_judges_every_kind_on_text_that_no_fit_has_seen(study, files, capsys):
    rows = run(study, files, "quality", "--data", files / "data.txt", "--codes", 24, "--widen", 112, "--plot")
    named = {row["head"]: row for row in rows}
    assert named["dense"]["kl"] == 0 and named["dense"]["perplexity_ratio"] == 1
    assert named["int8"]["kl"] < named["weighted"]["kl"] < named["paper"]["kl"]
    assert named["distilled"]["numbers"] == named["distilled paper"]["numbers"]
    assert named["weighted"]["floor_min"] <= named["weighted"]["floor"]
    assert all(row["ms"] > 0 and row["speedup"] > 0 for row in rows)
    assert (files / "out/quality.png").stat().st_size > 10_000
    printed = capsys.readouterr().err
    assert "of paper" in printed and "KL" in printed


def test_exact_heads_are_held_against_the_dense_one_state_by_state(study, files):
    rows = run(study, files, "exact", "--held-out-tokens", 127)
    assert {row["states"] for row in rows} == {"real", "adversarial", "generated"}
    assert all(row["wrong"] == 0 for row in rows)
    assert {row["steps"] for row in rows if row["states"] == "real"} == {127}


def test_timing_and_fitting_report_every_shape(study, files, monkeypatch):
    monkeypatch.setattr(study, "SHAPES", {"tiny": (1024, 128)})
    out = ["--out", str(files / "out"), "--debug", "--repeats", "1", "--shapes", "tiny", "--codes", "64"]
    assert study.main(["timing", *out, "--tops", "0", "8"]) == 0
    rows = [json.loads(line) for line in (files / "out/timing.json").read_text().splitlines()]
    assert {row["head"] for row in rows} == {"weighted K=64", "int8", "int4", "exact_int8", "exact_nested"}
    assert all(row["speedup"] > 0 and row["bare_ms"] > 0 for row in rows)
    assert {row["top"] for row in rows if row["head"] == "exact_nested"} == {0, 8}
    assert max(row["first"] for row in rows if row["top"] == 0) > 0
    assert study.main(["fitting", *out]) == 0
    assert json.loads((files / "out/fitting.json").read_text())["seconds"] > 0
