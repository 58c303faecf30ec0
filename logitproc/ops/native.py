"""C++ sources, compiled at first use for this machine with its own compiler, and kept."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS: tuple[str, ...] = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fopenmp-simd",
         "-fno-math-errno", "-fno-trapping-math")  # fmt: skip
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS += ("-mprefer-vector-width=512",)  # gcc prefers 256 bits where it has 512, a third slower here
if sys.platform == "linux":
    FLAGS += ("-fopenmp",)  # the library that torch has loaded; elsewhere rows take turns on one thread

logger = logging.getLogger(__name__)


@functools.cache
def load(source: Path) -> ctypes.CDLL | None:
    """The library of a C++ source; None, and one line in the log, where it cannot be compiled.

    Compiled for the processor of this machine and kept in the user's cache folder, under a name that changes with
    the source, the headers beside it, the compiler and the processor.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.warning("%s runs in plain torch, which is slower: there is no C++ compiler (c++, g++)", source.name)
        return None
    text = b"".join(file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256(text + repr((FLAGS, compiler, _processor())).encode()).hexdigest()[:16]
    try:
        library = _cache() / f"{source.stem}-{key}.so"
        if not library.exists():
            _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in said.splitlines() if "error" in line.lower()), said.strip())
        logger.warning("%s runs in plain torch, which is slower: it could not be compiled: %s", source.name, reason)
        return None


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Atomic: two processes may do this at once."""
    library.parent.mkdir(parents=True, exist_ok=True)
    logger.info("compiling %s", source.name)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        subprocess.run([compiler, *FLAGS, str(source), "-o", str(made)], check=True, capture_output=True, text=True)
        made.replace(library)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logitproc"


def _processor() -> str:
    """What distinguishes processors that share a home folder: name and instruction sets."""
    try:
        first, *_ = Path("/proc/cpuinfo").read_text().split("\n\n")
        return "".join(line for line in first.splitlines() if line.startswith(("model name", "flags", "Features")))
    except OSError:
        return platform.processor() + platform.machine()
