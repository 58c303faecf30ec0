"""What the README and `examples/` show is run, on the bundled model, offline."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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
    plain, paper = (int(n) for n in re.findall(r"(\d+) different tokens", output))
    assert paper > plain
    command = shlex.split(output.splitlines()[-1].partition(": ")[2])
    assert "The captain looked at" in run(folder, sys.executable, "-m", "logitproc.cli", *command[1:])


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
