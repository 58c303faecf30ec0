"""What the README and `examples/` show is run, on the bundled model, offline."""

import csv
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from logitproc import cli

ROOT = Path(__file__).parent.parent
STYLE = """The old captain told us, as he always did, that the sea forgives no man his second mistake.

We laughed at the old captain, as we always did, and the sea was calm that night.

The sea was calm, and no man of us slept, for the old captain walked the deck until the morning.
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my-style.txt").write_text(STYLE)
    return tmp_path


def run(folder, *command):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_of_the_readme_runs_as_printed(folder):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 16
    texts = run(folder, sys.executable, "-c", code).splitlines()
    assert sum(text.startswith(("The road was long", "I never", "She said")) for text in texts) == 6


def test_the_steering_example_runs(folder):
    output = run(folder, sys.executable, str(ROOT / "examples/steer.py"), "my-style.txt")
    assert {line.partition(":")[0] for line in output.splitlines() if ": " in line} >= {"0.0", "0.3", "0.6"}


def test_the_diversity_example_runs_and_its_ledger_serves_the_command_line(folder):
    output = run(folder, sys.executable, str(ROOT / "examples/diversify.py"))
    plain, paper, ratio = (int(n) for n in re.findall(r"(\d+) different tokens", output))
    assert paper > plain and ratio > plain
    command = shlex.split(output.splitlines()[-1].partition(": ")[2])
    assert "The captain looked at" in run(folder, sys.executable, "-m", "logitproc.cli", *command[1:])


def test_the_alignment_example_runs(folder):
    output = run(folder, sys.executable, str(ROOT / "examples/align.py"))
    found = [float(x) for x in re.findall(r"^r = \S+: plainness (\S+)$", output, re.MULTILINE)]
    assert len(found) == 3 and found[0] < found[1] < found[2]  # the dial turns the reward up


def test_the_fusion_example_runs(folder):
    output = run(folder, sys.executable, str(ROOT / "examples/fuse.py"))
    lines = [line.partition(": ") for line in output.splitlines() if ": " in line]
    texts = {mode: [text for m, _, text in lines if m == mode] for mode, *_ in lines}
    assert set(texts) == {"base alone", "static", "newton", "mixture"} and all(len(t) == 3 for t in texts.values())
    assert len({tuple(t) for t in texts.values()}) > 1, "the expert makes itself felt"


def test_the_commands_of_the_readme_run(folder):
    block = (ROOT / "README.md").read_text().split("## Command line")[1].split("```")[1]
    fit, generate = block.splitlines()[1:3]
    logitproc = [sys.executable, "-m", "logitproc.cli"]
    arguments = lambda line: re.findall(r'"[^"]*"|\S+', line.partition("  #")[0])[1:]
    run(folder, *logitproc, *(a.strip('"') for a in arguments(fit)))
    assert "The road was long" in run(folder, *logitproc, *(a.strip('"') for a in arguments(generate)))


def test_the_setup_commands_of_the_readme_are_one_line_each():
    text = (ROOT / "README.md").read_text()
    for mark in ("demo", "tests"):
        block = re.search(rf"<!-- {mark} -->\n```bash\n(.*?)\n```", text, re.DOTALL)[1]
        assert "\n" not in block


def test_the_collection_of_the_readme_runs_is_corrected_and_compared(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT / "eval"))
    (folder / "examples").symlink_to(ROOT / "examples")
    text = (ROOT / "README.md").read_text()
    commands = text.split("## A labelled data set")[1].split("```bash\n")[1].split("```")[0].splitlines()
    collect, export, apply = (line.partition("  #")[0].split()[1:] for line in commands)

    assert cli.main([*collect, "--set", "items_per_label=7", "--set", "plain_items_per_label=3"]) == 0
    report = capsys.readouterr().out
    for part in ("novel: ", "abstract: ", "14 items in", "label accuracy", "plain sampling"):
        assert part in report
    assert cli.main(export) == 0
    with open("check.csv", newline="") as file:
        exported = list(csv.DictReader(file))
    with open("check.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(exported[0]))
        writer.writeheader()
        writer.writerows({**row, "correct_label": row["label"]} for row in exported[:9])
    assert cli.main(apply) == 0 and "labels changed" in capsys.readouterr().out
    compare = re.search(r"python eval/diversity\.py (.*)", text)[1].split()
    assert importlib.import_module("diversity").main(compare) == 0
    assert "Vendi score" in capsys.readouterr().out and Path("runs/compared/diversity.png").is_file()


def test_the_compression_example_runs_and_what_it_saved_says_the_same(folder):
    (folder / "long.txt").write_text(STYLE * 40)
    output = run(folder, sys.executable, str(ROOT / "examples/compress.py"), "long.txt").splitlines()
    paper, weighted = (float(re.search(r"perplexity x ([\d.]+)", line)[1]) for line in output[:2])
    assert weighted < paper
    assert output[2] == output[3] and output[2].startswith("The road was long")
