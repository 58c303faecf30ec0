"""The command line itself: `main`, and what becomes of errors."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer import Option

from .. import __version__

# Errors that the input causes. KeyError and IndexError are the two LookupErrors that only a bug raises.
ANTICIPATED = (ValueError, LookupError, TypeError, OSError, ImportError)
BUGS = (KeyError, IndexError)

app = typer.Typer(name="logitproc", rich_markup_mode=None, add_completion=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (those of the process by default) and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in arguments  # wherever it stands
    arguments = [argument for argument in arguments if argument != "--debug"]
    command = typer.main.get_command(app)
    try:
        with command.make_context("logitproc", arguments, obj=debug) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as done:
        return done.exit_code
    except BrokenPipeError:  # the reader, `head` for one, has all it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        sentence, status = explain(error)
        print(f"logitproc: {sentence}", file=sys.stderr)
        return status
    return 0


def explain(error: BaseException) -> tuple[str, int]:
    """(one line, exit status) of an error."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return text or "Interrupted.", 2
    if hasattr(error, "format_message"):  # typer's own: an option or a command that does not exist, ...
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "logitproc"
        return f"{error.format_message().rstrip('.')}; see '{path} --help'.", 2
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.strerror, error.filename) if part) + ".", 2
    if isinstance(error, ANTICIPATED) and not isinstance(error, BUGS):
        return text or f"{type(error).__name__}.", 2
    return f"{type(error).__name__}: {text.rstrip('.')}; --debug shows where.", 1


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"logitproc {__version__}")
        raise typer.Exit


# --debug is declared for the help only: main() takes it out, to accept it after a command too.
@app.callback()
def _logitproc(
    debug: Annotated[bool, Option("--debug", help="Show tracebacks and all messages.")] = False,
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Change what a language model says by changing its logits while it decodes, and measure what that
    changed.

    Start with: logitproc demo
    """
