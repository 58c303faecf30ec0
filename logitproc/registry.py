"""Names of methods, and the classes behind them.

A method is one file `logitproc/methods/NAME.py` holding one class decorated with `@register("NAME", ...)`,
or a class of another package published in the entry-point group `logitproc.methods` under NAME.
Listing names reads file names and source text only, so it never imports torch.
"""

import ast
import difflib
import importlib
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from .processor import Processor

GROUP = "logitproc.methods"
_FOLDER = Path(__file__).parent / "methods"
_classes: "dict[str, type[Processor]]" = {}

C = TypeVar("C", bound="type[Processor]")


class Entry(NamedTuple):
    """What `logitproc list` shows of a method, read without importing it."""

    name: str
    summary: str
    paper: str
    origin: str


def register(name: str, *, paper: str) -> Callable[[C], C]:
    """Class decorator: publish a `Processor` under `name`, citing `paper` (an arXiv id or an address).

    Raises ValueError when the name is taken by another class or by a file of `logitproc/methods`, or when
    such a file registers a name other than its own; TypeError when the class is no `Processor`.
    """

    def decorate(cls: C) -> C:
        from .processor import Processor

        if not (isinstance(cls, type) and issubclass(cls, Processor)):
            raise TypeError(f"@register({name!r}) needs a subclass of logitproc.Processor, got {cls!r}.")
        package, _, stem = cls.__module__.rpartition(".")
        if package == f"{__package__}.methods" and stem != name:
            raise ValueError(f"methods/{stem}.py registers {name!r}; rename the file or the method.")
        if name in _classes and _where(_classes[name]) != _where(cls):
            raise _collision(name, [_where(_classes[name]), _where(cls)])
        if name in _files() and package != f"{__package__}.methods":
            raise _collision(name, [f"{__package__}.methods.{name}", _where(cls)])
        if not paper:
            raise ValueError(f"@register({name!r}) needs the paper or address that defines the method.")
        cls.name, cls.paper = name, paper
        _classes[name] = cls
        return cls

    return decorate


def names() -> list[str]:
    """All method names, sorted: built in, installed by other packages, registered in this process."""
    return sorted({*_files(), *_plugins(), *_classes})


def get(name: str) -> "type[Processor]":
    """The class registered as `name`.

    LookupError with near names when there is none, ValueError when several packages offer one.
    """
    if name not in _classes:
        targets = {f"{__package__}.methods.{name}"} if name in _files() else set()
        targets |= {point.value for point in entry_points(group=GROUP, name=name)}
        if len(targets) > 1:
            raise _collision(name, targets)
        if name in _files():
            importlib.import_module(f"{__package__}.methods.{name}")
        elif name in _plugins():
            _plugins()[name].load()
        else:
            raise unknown("method", name, names())
    if name not in _classes:
        raise LookupError(f"The module of {name!r} registers no method of that name.")
    return _classes[name]


def entries() -> list[Entry]:
    """One `Entry` a method, sorted by name; imports no method."""
    found = [_from_source(name, path) for name, path in _files().items()]
    for name, point in _plugins().items():
        origin = point.dist.name if point.dist else point.module
        found.append(Entry(name, f"from the package {origin}", "", point.value))
    known = {entry.name for entry in found}
    for name, cls in _classes.items():
        if name not in known:
            found.append(Entry(name, _first_line(cls.__doc__), cls.paper, _where(cls)))
    return sorted(found)


def unknown(kind: str, given: str, known: Iterable[str]) -> LookupError:
    """The error for a name that does not exist, with the nearest names that do."""
    known = sorted(known)
    near = difflib.get_close_matches(given, known, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return LookupError(f"Unknown {kind} {given!r}.{hint} Known: {', '.join(known)}.")


def _collision(name: str, origins: Iterable[str]) -> ValueError:
    return ValueError(f"Two methods are named {name!r}: {' and '.join(sorted(origins))}.")


def _files() -> dict[str, Path]:
    return {p.stem: p for p in sorted(_FOLDER.glob("*.py")) if not p.stem.startswith("_")}


def _plugins() -> dict[str, EntryPoint]:
    return {p.name: p for p in entry_points(group=GROUP) if p.name not in _files()}


def _where(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _from_source(name: str, path: Path) -> Entry:
    paper, summary = "", ""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("register"):
                values = [k.value for k in call.keywords if k.arg == "paper"]
                paper = str(ast.literal_eval(values[0])) if values else ""
                summary = _first_line(ast.get_docstring(node))
    return Entry(name, summary, paper, str(path))
