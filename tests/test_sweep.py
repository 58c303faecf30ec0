"""The sweep on a tiny random model: cells, resuming, what is summed up, the plot, what is refused."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_model, tiny_tokenizer

from logitproc.prior import NGramPrior

EVAL = Path(__file__).parent.parent / "eval"
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 0.9}


@pytest.fixture(scope="module")
def sweep():
    return importlib.import_module("sweep")


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with a model, two priors and four prompts."""
    folder = tmp_path_factory.mktemp("sweep")
    tokenizer = tiny_tokenizer()
    tiny_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    texts = [" ".join(f"w{3 + (i * k) % 40}" for i in range(30)) for k in range(1, 9)]
    NGramPrior.fit(texts[:6], tokenizer, order=3, out=folder / "style")
    NGramPrior.fit(texts[4:], tokenizer, order=2, out=folder / "held-out")
    (folder / "prompts.txt").write_text("w3 w4\nw9\nw5 w6 w7\nw8 w3\n")
    return folder


@pytest.fixture
def flags(here) -> list[str]:
    return [
        "--model", str(here / "model"), "--proc", f"ngram:prior={here / 'style'},strength=0.5",
        "--held-out", str(here / "held-out"), "--prompts", str(here / "prompts.txt"),
        "--max-new-tokens", "12", "--batch-size", "3", "--seeds", "0,1", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def bench(sweep, here):
    style, held_out = (NGramPrior.load(here / name) for name in ("style", "held-out"))
    prompts = (here / "prompts.txt").read_text().splitlines()
    return sweep.Bench(
        tiny_model(), tiny_tokenizer(), prompts, style, held_out, max_new_tokens=12, batch_size=3
    )


def steered(sweep, here, strength: float, seed: int = 0, **decoding):
    spec = [{"name": "ngram", "prior": str(here / "style"), "strength": strength, "rule": "lift"}]
    return sweep.Cell(f"strength={strength}", spec, decoding or SAMPLED, seed, {"strength": strength})


# --- cells ---


def test_a_row_holds_one_text_and_all_its_figures(sweep, bench, here, tmp_path):
    rows = sweep.run_cell(bench, steered(sweep, here, 0.5), tmp_path)
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    assert [row["prompt"] for row in rows] == bench.prompts
    for row in rows:
        assert row["tokens"] == len(row["ids"]) == 12
        assert set(sweep.MEASURES) <= set(row) and all(math.isfinite(row[m]) for m in sweep.MEASURES)
        assert row["text"].split() == bench.tokenizer.decode(row["ids"]).split()
        context = bench.tokenizer(row["prompt"])["input_ids"]
        assert row["style_nll"] == pytest.approx(-bench.style.log_mixture(row["ids"], context).mean())
        assert row["held_out_nll"] == pytest.approx(-bench.held_out.log_prob(row["ids"], context).mean())
    assert sweep.load_rows(tmp_path) == rows


def test_cells_repeat_in_any_order(sweep, bench, here, tmp_path):
    cells = [steered(sweep, here, 0.5, seed) for seed in (0, 1)]
    forth = [sweep.run_cell(bench, cell, tmp_path / "forth") for cell in cells]
    back = [sweep.run_cell(bench, cell, tmp_path / "back") for cell in reversed(cells)]
    assert forth == back[::-1]
    assert [row["ids"] for row in forth[0]] != [row["ids"] for row in forth[1]]  # seeds differ


def test_strength_0_gives_unsteered_text_and_no_divergence(sweep, bench, here, tmp_path):
    plain = sweep.run_cell(bench, sweep.Cell("unsteered", None, SAMPLED), tmp_path)
    zero = sweep.run_cell(bench, steered(sweep, here, 0.0), tmp_path)
    assert [row["ids"] for row in plain] == [row["ids"] for row in zero]
    assert all(row["js"] == 0 and row["nll"] == row["base_nll"] for row in plain + zero)


def test_a_finished_cell_is_read_and_a_changed_one_is_made(sweep, bench, here, tmp_path, monkeypatch):
    cell = steered(sweep, here, 0.5, do_sample=False)
    rows = sweep.run_cell(bench, cell, tmp_path)
    made = []
    generate = sweep._generate
    monkeypatch.setattr(sweep, "_generate", lambda *args: made.append(args) or generate(*args))
    assert sweep.run_cell(bench, cell, tmp_path) == rows and made == []
    other = sweep.Bench(
        tiny_model(seed=1), bench.tokenizer, bench.prompts, bench.style, bench.held_out,
        max_new_tokens=12, batch_size=3,
    )  # fmt: skip
    assert sweep.run_cell(other, cell, tmp_path) != rows and len(made) == 1
    sweep.run_cell(bench, steered(sweep, here, 0.25, do_sample=False), tmp_path)
    assert len(made) == 2 and len(list((tmp_path / "cells").iterdir())) == 3


def test_a_text_ends_before_eos_where_eos_is_allowed(sweep, here, bench, tmp_path):
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(3, 60))  # so that texts do end
    short = sweep.Bench(
        model, bench.tokenizer, bench.prompts, bench.style, bench.held_out,
        max_new_tokens=12, min_new_tokens=2, batch_size=3,
    )  # fmt: skip
    rows = sweep.run_cell(short, sweep.Cell("unsteered", None, SAMPLED), tmp_path)
    assert min(row["tokens"] for row in rows) < 12
    assert all(row["tokens"] == len(row["ids"]) >= 2 for row in rows)
    assert all(token not in range(3, 60) for row in rows for token in row["ids"])


# --- the grid ---


@pytest.mark.parametrize(
    "text, values",
    [
        ("strength=0:1:0.25", [0, 0.25, 0.5, 0.75, 1]),
        ("strength=0:0.3:0.1", [0, 0.1, 0.2, 0.3]),
        ("guard_length=1:5:2", [1, 3, 5]),
        ("rule=paper,lift", ["paper", "lift"]),
        ("clip=null, 2, 1e-1", [None, 2, 0.1]),
        ("exempt=[1, 2],[3]", [[1, 2], [3]]),
        ("schedule=ramp(4),constant,constant", ["ramp(4)", "constant"]),
    ],
)
def test_grid_values(sweep, text, values):
    assert sweep.grid_values(text) == values
    assert all(isinstance(v, int) for v in sweep.grid_values("n=1:3:1"))  # a count stays one


@pytest.mark.parametrize(
    "text", ["strength", "strength=", "s=0:1:0", "s=1:0:1", "s=0:1", "s=1:5", "s=[1", "s=0:1:1e-9"]
)
def test_grid_values_that_cannot_be_read(sweep, text):
    with pytest.raises(ValueError, match="is neither key=first:last:step nor"):
        sweep.grid_values(text)


def test_the_grid_is_a_product_and_keys_find_their_processor(sweep):
    procs = [{"name": "a", "x": 0}, {"name": "b"}, {"name": "a"}]
    cells = sweep.grid_cells(procs, ["b.x=1,2", "y=3,4"], [SAMPLED, {"do_sample": False}], [7, 8])
    assert len(cells) == (1 + 4) * (2 + 1)  # unsteered and four points, two seeds and greedy
    assert cells[0] == sweep.Cell("unsteered", None, SAMPLED, 7)
    assert cells[-1].label == "b.x=2 y=4" and cells[-1].decoding == {"do_sample": False}
    assert cells[-1].spec == [{"name": "a", "x": 0}, {"name": "b", "x": 2}, {"name": "a", "y": 4}]
    assert "x" not in procs[1]
    with pytest.raises(LookupError, match="Unknown processor of --grid 'c'"):
        sweep.grid_cells(procs, ["c.x=1"], [SAMPLED], [0])


# --- summary ---


def row(sweep, line: int, seed: int, value: float, spec=None, label="unsteered") -> dict:
    """All measures are `value`."""
    about = {"label": label, "spec": spec, "point": {}, "decoding": SAMPLED, "seed": seed}
    return {**about, "line": line, "tokens": 4, **dict.fromkeys(sweep.MEASURES, value)}


def test_seeds_are_averaged_inside_a_prompt_and_differences_are_paired(sweep):
    plain = [row(sweep, line, seed, line + seed) for line in (1, 2) for seed in (0, 1)]
    moved = [row(sweep, line, seed, 3 + 2 * line, [{"name": "x"}], "x") for line in (1, 2) for seed in (0, 1)]
    first, second = sweep.summarise(plain + moved)
    # Prompts 1 and 2 average to 1.5 and 2.5 unsteered, to 5 and 7 steered.
    assert first["mean"]["base_nll"] == {"mean": 2.0, "low": 1.5, "high": 2.5}
    assert second["difference"]["rep_4"] == {"mean": 4.0, "low": 3.5, "high": 4.5}
    assert first["difference"]["rep_4"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert (first["seeds"], first["prompts"], first["tokens"]) == ([0, 1], 2, 16)
    # Four texts at 1, 2, 2 and 3 nats.
    perplexity = first["perplexity"]["base"]
    assert perplexity["geometric"] == pytest.approx(math.exp(2))
    assert perplexity["arithmetic"] == pytest.approx((math.e + 2 * math.e**2 + math.e**3) / 4)
    (alone,) = sweep.summarise(moved)
    assert alone["difference"] is None


def test_halves_share_out_the_prompts(sweep):
    rows = [row(sweep, line, 0, line) for line in (1, 2, 3, 4)]
    means = {
        half: sweep.summarise(rows, half)[0]["mean"]["js"]["mean"] for half in ("choose", "report", "all")
    }
    assert means == {"choose": 2, "report": 3, "all": 2.5}
    with pytest.raises(ValueError, match="nothing to summarise: 1 rows were given, half is 'report'"):
        sweep.summarise(rows[:1], "report")


def test_a_figure_that_is_not_finite_has_no_mean(sweep):
    rows = [row(sweep, line, 0, 1.0) for line in (1, 2)]
    rows[0]["reverse_kl"] = None
    assert math.isnan(sweep.summarise(rows)[0]["mean"]["reverse_kl"]["mean"])


# --- the command ---


def test_the_command_writes_table_figures_and_plot_and_resumes(sweep, flags, tmp_path, capsys, monkeypatch):
    argv = [*flags, "--out", str(tmp_path), "--decoding", "both", "--grid", "strength=0:1:0.5",
            "--grid", "rule=paper,backoff", "--control", "temperature=0.7,1.0"]  # fmt: skip
    assert sweep.main(argv) == 0
    shown = capsys.readouterr()
    found = json.loads((tmp_path / "sweep.json").read_text(), parse_constant=pytest.fail)
    # Unsteered and 3 x 2 points, sampled and greedy; one more control, as T = 1 is there already.
    assert len(found["cells"]) == 7 * 2 + 1 and shown.err == ""
    assert len(list((tmp_path / "cells").iterdir())) == 7 * (2 + 1) + 2
    lines = shown.out.splitlines()
    assert len(lines) == 1 + len(found["cells"]) and "Δ held-out nats" in lines[0]

    rows = sweep.load_rows(tmp_path)
    keys = {(r["label"], str(r["decoding"]), r["seed"], r["line"]) for r in rows}
    assert len(rows) == len(keys) == 23 * 4  # every text once
    assert all(cell["tokens"] == 12 * 4 * len(cell["seeds"]) for cell in found["cells"])
    assert found["flags"]["grid"] == ["strength=0:1:0.5", "rule=paper,backoff"]
    assert found["settings"]["max_new_tokens"] == 12 and found["settings"]["prompts"][1] == "w9"
    by_place = {(cell["label"], cell["decoding"]["do_sample"]): cell for cell in found["cells"]}
    zero, one = (by_place[f"strength={s} rule=backoff", True] for s in ("0.0", "1.0"))
    assert zero["difference"]["base_nll"] == {"mean": 0, "low": 0, "high": 0}
    assert one["mean"]["js"]["mean"] > 0 and one["difference"]["held_out_nll"]["mean"] < 0

    png = (tmp_path / "sweep.png").read_bytes()
    width, height = (int.from_bytes(png[at : at + 4]) for at in (16, 20))
    assert png.startswith(b"\x89PNG") and width >= 1200 and 500 <= height < width and len(png) > 20_000

    monkeypatch.setattr(sweep, "_generate", lambda *_: pytest.fail("a finished cell was made again"))
    assert sweep.main(argv) == 0
    assert capsys.readouterr().out == shown.out and sweep.load_rows(tmp_path) == rows


def test_an_interrupted_sweep_says_so_and_keeps_what_is_done(sweep, flags, tmp_path, capsys, monkeypatch):
    argv = [*flags, "--out", str(tmp_path), "--grid", "strength=1.0"]
    generate, calls = sweep._generate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(sweep, "_generate", interrupted)
    assert sweep.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.err == "sweep: Interrupted; the same command resumes after the cells that are done.\n"
    assert shown.out == "" and len(sweep.load_rows(tmp_path)) == 2 * 4
    assert sweep.main(argv) == 0
    assert (
        len(calls) == 3 + 2 and len(sweep.load_rows(tmp_path)) == 4 * 4
    )  # unsteered and one point, two seeds


def test_without_matplotlib_table_and_figures_are_still_there(sweep, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    argv = [*flags, "--out", str(tmp_path), "--grid", "rule=lift,paper", "--decoding", "greedy"]
    assert sweep.main(argv) == 0
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and 'pip install "logitproc[plot]"' in shown.err
    assert "rule=paper" in shown.out and (tmp_path / "sweep.json").is_file()


def test_a_key_of_words_and_one_series_are_drawn_too(sweep, tmp_path):
    rows = [row(sweep, line, 0, 1.0) for line in (1, 2)]
    for name in ("lift", "paper"):
        rows += [
            row(sweep, line, 0, 2.0, [{"rule": name}], name) | {"point": {"rule": name}} for line in (1, 2)
        ]
    sweep.plot(sweep.summarise(rows), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    "change, sentence",
    [
        (["--grid", "strenght=0,1"], "Did you mean 'strength'"),
        (["--grid", "strength=0:2:1"], "strength must be a number in [0, 1], got 2"),
        (["--grid", "strength="], "'strength=' is neither key=first:last:step nor"),
        (["--grid", "vq.codes=1"], "Unknown processor of --grid 'vq'"),
        (["--grid", "strength=1", "--grid", "strength=0"], "--grid strength is given twice"),
        (["--grid", "rule=lift", "--control", "top_p=0.5"], "--control must be temperature=VALUES"),
        (["--grid", "rule=lift", "--control", "temperature=0"], "all above 0, got 'temperature=0'"),
        (["--grid", "rule=lift", "--held-out", "nowhere"], "No artifact at nowhere"),
        (["--grid", "rule=lift", "--style", "nowhere"], "No artifact at nowhere"),
        (["--grid", "rule=lift", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--grid", "rule=lift", "--model", "nowhere"], "There is no folder nowhere"),
        (["--grid", "rule=lift", "--min-new-tokens", "13"], "from 2 to max_new_tokens, 12; got 13"),
        (["--grid", "rule=lift", "--max-new-tokens", "126"], "has 3 tokens; beside 126 new ones"),
        (["--grid", "rule=lift", "--proc", "ngramm"], "Did you mean 'ngram'"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_sentence(sweep, flags, tmp_path, capsys, change, sentence):
    assert sweep.main([*flags, "--out", str(tmp_path), *change]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and sentence in shown.err
    assert shown.err.startswith("sweep: ") and shown.err.count("\n") == 1
    assert not (tmp_path / "cells").exists()


def test_an_output_folder_that_cannot_be_is_refused_before_the_first_text(sweep, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "run_cell", lambda *_: pytest.fail("a text was made"))
    (tmp_path / "file").write_text("")
    assert sweep.main([*flags, "--grid", "rule=lift", "--out", str(tmp_path / "file")]) == 2
    assert "file takes no new folder (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize("flag, value", [("--seeds", "0,x"), ("--temperature", "0"), ("--batch-size", "0")])
def test_flags_of_the_wrong_kind_are_refused(sweep, flags, capsys, flag, value):
    with pytest.raises(SystemExit) as end:
        sweep.main([*flags, "--out", "unused", "--grid", "rule=lift", flag, value])
    assert end.value.code == 2 and repr(value) in capsys.readouterr().err


def test_priors_of_another_tokenizer_or_without_counts_are_refused(sweep, bench, here, tmp_path):
    other = NGramPrior.fit(["w3 w4"], tiny_tokenizer(size=50), order=2)
    with pytest.raises(ValueError, match="was fitted for the tokenizer"):
        sweep.Bench(tiny_model(), bench.tokenizer, ["w3"], bench.style, other)
    bench.style.to_arpa(tmp_path / "style.arpa")
    imported = NGramPrior.from_arpa(tmp_path / "style.arpa", bench.tokenizer)
    with pytest.raises(ValueError, match="imported from ARPA"):
        sweep.Bench(tiny_model(), bench.tokenizer, ["w3"], imported, bench.held_out)


def test_help_needs_no_torch():
    code = (
        f"import sys; sys.path.insert(0, {str(EVAL)!r}); import sweep\n"
        "try: sweep.main(['--help'])\n"
        "finally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--held-out" in done.stdout and done.stderr == ""


def test_the_bundled_prompts_are_sixty_different_lines(sweep):
    prompts = (EVAL / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(prompts) == len(set(prompts)) == 60 and all(p == p.strip() != "" for p in prompts)
    assert prompts[0].startswith("I still remember") and prompts[19].endswith("the following example:")
