"""The command line: `logitproc list | describe | generate | fit | collect | demo`.

Thin: a command checks what it was given, calls the library and prints. Results go to standard output,
everything else to standard error. Nothing heavy is imported before a command needs it, so that `--help`
and `list` answer at once. Exit status: 0 done, 2 wrong usage or input, 1 failed.
"""

from . import methods, generate, demo, fit, collect  # noqa: F401, I001 - each adds its commands, in this order
from .app import explain, main
from .common import choose_device, load_model
from .generate import build_chain, read_prompts

__all__ = ["build_chain", "choose_device", "explain", "load_model", "main", "read_prompts"]
