"""Triton kernels compile for a GPU, also where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_every_triton_kernel_compiles():
    pytest.importorskip("triton", reason="the package triton is not installed")
    script = Path(__file__).with_name("compile_kernels.py")
    paths = [str(script.parents[2]), str(script.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
