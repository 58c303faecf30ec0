"""The scoring scripts: their figures, what they print, what they refuse, one process against two."""

import importlib
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from torch import Tensor

import logitproc as lp
from logitproc import registry
from logitproc.scoring import score_corpus

EVAL = Path(__file__).parent.parent / "eval"


@dataclass(eq=False)
class Nudge(lp.Processor):
    """Lowers the last token; `forbid` forbids an id."""

    strength: float = 1.0
    forbid: int | None = None
    context = 1

    def step(self, tokens: Tensor, scores: Tensor) -> Tensor:
        lowered = scores.scatter_add(1, tokens.clamp(min=0), -self.strength * (tokens >= 0))
        return lowered if self.forbid is None else lowered.index_fill(1, torch.tensor(self.forbid), -math.inf)

    def check_tokenizer(self, tokenizer) -> None:
        if self.strength == 99:
            raise ValueError("Fitted for another tokenizer.")


Nudge.name = "nudge"

# What `accelerate launch` runs: the script as it is, with the method above registered in each process.
LAUNCHED = """
import sys
sys.path[:0] = {paths!r}
from logitproc import registry
from test_eval import Nudge
registry._classes["nudge"] = Nudge
import {script}
sys.exit({script}.main(sys.argv[1:]))
"""


@pytest.fixture
def run(monkeypatch):
    """Run a script in this process, with the method registered for as long as the test lasts."""
    monkeypatch.setitem(registry._classes, "nudge", Nudge)
    monkeypatch.syspath_prepend(str(EVAL))
    return lambda script, *args: importlib.import_module(script).main([*map(str, args), "--device", "cpu"])


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with a model and texts."""
    folder = tmp_path_factory.mktemp("eval")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(3, 97)}" for _ in range(n)) for n in (40, 3, 17, 90, 8, 1, 25)]
    (folder / "texts.txt").write_text("\n".join(texts))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    (folder / "empty.txt").write_text("\n\n")
    (folder / "chain.yaml").write_text("- {name: nudge, strength: 2.0}\n")
    return folder


def common_flags(here: Path) -> list:
    return ["--model", here / "model", "--data", here / "texts.txt", "--context", 32, "--stride", 8]


def test_perplexity_prints_a_table_and_writes_what_it_measured(run, here, tmp_path, capsys):
    out = tmp_path / "deep" / "report.json"
    assert run("perplexity", *common_flags(here), "--proc", "nudge:strength=2.0", "--json", out) == 0
    (line,) = out.read_text().splitlines()
    found = json.loads(line)
    report = score_corpus(
        tiny_model(), tiny_tokenizer(), lp.Chain([Nudge(2.0)]), (here / "texts.txt").read_text().split("\n"),
        context=32, stride=8, divergence=False,
    )  # fmt: skip
    assert found["tokens"] == report.tokens == 184 and found["documents"] == 7
    for part, loss in {"base": "base_nll", "processed": "nll"}.items():
        assert found[part]["token_perplexity"] == pytest.approx(report.perplexity(loss))
        assert found[part]["word_perplexity"] == pytest.approx(report.word_perplexity(loss))
        assert found[part]["bits_per_byte"] == pytest.approx(report.bits_per_byte(loss))
        assert found[part]["nats_per_token"] == pytest.approx(report.mean[loss])
        assert found[part]["standard_error"] == pytest.approx(report.error[loss])
    about = {"report": "perplexity", "scores": "processed", "context": 32, "stride": 8, "processes": 1}
    assert about.items() <= found.items()
    assert found["chain"] == [{"name": "nudge", "strength": 2.0}]

    shown = capsys.readouterr()
    assert shown.err == ""  # progress needs a terminal
    for word in ("nudge:strength=2.0 (scores: processed)", "context 32, stride 8", "184 scored", "texts.txt"):
        assert word in shown.out
    ratio = found["processed"]["token_perplexity"] / found["base"]["token_perplexity"]
    (row,) = [line for line in shown.out.splitlines() if line.startswith("token perplexity")]
    assert float(row.split()[-1]) == pytest.approx(ratio, abs=1e-4)


def test_without_a_chain_the_raw_scores_are_reported(run, here, capsys):
    assert run("perplexity", *common_flags(here)) == 0
    shown = capsys.readouterr().out
    assert "none (scores: raw)" in shown and "processed" not in shown


def test_js_divergence_reports_every_measure(run, here, tmp_path, capsys):
    out = tmp_path / "report.json"
    flags = [*common_flags(here), "--chain", here / "chain.yaml", "--json", out]
    flags[flags.index("--data") + 1] = here / "texts.jsonl"
    assert run("js_divergence", *flags, "--column", "body", "--limit", 3, "--batch-size", 2) == 0
    found = json.loads(out.read_text())
    assert found["documents"] == 3 and found["tokens"] == 60 and found["chain"][0]["strength"] == 2.0
    for key in ("js", "kl", "reverse_kl", "tv"):
        assert found[key]["mean"] > 0 and found[key]["standard_error"] > 0
    assert 0 < found["js"]["mean"] < 1 and 0 <= found["agree"]["mean"] <= 1
    shown = capsys.readouterr().out
    for title in ("JS divergence", "KL(q || p)", "KL(p || q)", "total variation", "top-1", "negative flips"):
        assert title in shown


def test_infinite_figures_are_null_in_json_and_explained(run, here, tmp_path, capsys):
    out = tmp_path / "report.json"
    assert run("perplexity", *common_flags(here), "--proc", "nudge:forbid=50", "--json", out) == 0
    found = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert found["forbidden"] >= 1 and found["processed"]["token_perplexity"] is None
    assert "of the text are forbidden by the chain" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, sentence",
    [
        (["--proc", "nudgee"], "Unknown method 'nudgee'. Did you mean 'nudge'"),
        (["--proc", "nudge:strenght=1"], "Did you mean 'strength'"),
        (["--proc", "nudge:strength"], "is not key=value"),
        (["--proc", "nudge:strength=99"], "Fitted for another tokenizer"),
        (["--chain", "nowhere.yaml"], "There is no chain file nowhere.yaml"),
        (["--data", "nowhere.txt"], "There is no file nowhere.txt"),
        (["--data", "EMPTY"], "is empty: it holds no text"),
        (["--model", "no/where/at/all"], "There is no folder no/where/at/all"),
        (["--context", "129"], "context must be at most what the model reads, 128; got 129"),
        (["--stride", "33"], "stride must be from 1 to the context, got stride 33 and context 32"),
        (["--sample-by", "verse"], "sample_by must be one of"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_sentence(run, here, capsys, change, sentence):
    change = [str(here / "empty.txt") if word == "EMPTY" else word for word in change]
    assert run("perplexity", *common_flags(here), *change) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and sentence in shown.err
    assert shown.err.startswith("perplexity: ") and shown.err.count("\n") == 1


@pytest.mark.parametrize("place, sentence", [("", "is a folder"), ("file/report.json", "file takes no new folder")])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(run, here, tmp_path, capsys, place, sentence):
    (tmp_path / "file").write_text("")
    assert run("perplexity", *common_flags(here), "--json", tmp_path / place) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err and shown.out == ""


@pytest.mark.parametrize("flag", ["--context", "--stride", "--batch-size", "--limit"])
def test_counts_below_one_are_refused(run, here, capsys, flag):
    with pytest.raises(SystemExit) as end:
        run("js_divergence", *common_flags(here), flag, 0)
    assert end.value.code == 2 and "at least 1, got '0'" in capsys.readouterr().err


def test_js_divergence_needs_something_to_compare_with(run, here, capsys):
    assert run("js_divergence", *common_flags(here)) == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_debug_shows_the_traceback(run, here):
    with pytest.raises(LookupError):
        run("perplexity", *common_flags(here), "--proc", "nudgee", "--debug")


def test_a_failure_that_is_not_the_users_ends_with_status_1(run, here, capsys, monkeypatch):
    def step(self, tokens, scores):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Nudge, "step", step)
    assert run("perplexity", *common_flags(here), "--proc", "nudge") == 1
    assert "out of memory" in capsys.readouterr().err


def test_an_interruption_is_one_sentence(run, here, capsys, monkeypatch):
    def step(self, tokens, scores):
        raise KeyboardInterrupt

    monkeypatch.setattr(Nudge, "step", step)
    assert run("perplexity", *common_flags(here), "--proc", "nudge") == 2
    assert capsys.readouterr().err == "perplexity: Interrupted.\n"


@pytest.mark.parametrize("script", ["perplexity", "js_divergence"])
def test_help_needs_no_torch(script):
    code = (
        f"import sys; sys.path.insert(0, {str(EVAL)!r}); import {script}\n"
        f"try: {script}.main(['--help'])\n"
        "finally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "accelerate launch" in done.stdout and done.stderr == ""


def test_two_processes_give_the_figures_of_one(run, here, tmp_path):
    flags = [*map(str, common_flags(here)), "--proc", "nudge"]
    assert run("js_divergence", *flags, "--json", tmp_path / "one.json") == 0
    launched = tmp_path / "launched.py"
    launched.write_text(
        LAUNCHED.format(paths=[str(EVAL), str(Path(__file__).parent)], script="js_divergence")
    )
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
         "--main_process_port", "0", launched, *flags, "--device", "cpu", "--json", tmp_path / "two.json"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert done.stdout.count("JS divergence") == 1  # one process prints
    assert "(float32, cpu, 2 processes)" in done.stdout
    for key, value in one.items():
        assert two[key] == (pytest.approx(value, abs=1e-6) if isinstance(value, dict) else value), key
