"""`logitproc list` and `logitproc describe`."""

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import registry
from ..bundled import bundled
from .app import app
from .common import Json
from .layout import table

if TYPE_CHECKING:
    from ..processor import Processor


@app.command("list")
def list_methods(as_json: Json = False) -> None:
    """Name, paper and summary of every method."""
    rows = [(entry.name, entry.paper, entry.summary) for entry in registry.entries()]
    if as_json:
        for row in rows:
            print(json.dumps(dict(zip(("name", "paper", "summary"), row, strict=True)), ensure_ascii=False))
    else:
        print(table([("name", "paper", "summary"), *rows]))


@app.command()
def describe(name: Annotated[str, typer.Argument(metavar="NAME", help="As `list` shows it.")]) -> None:
    """What a method does, needs and can do."""
    cls = registry.get(name)
    example = cls.example(64)
    spec = _example_spec(example)
    parameters = [
        (f"  {f.name}", _annotation(f.type), _default(f))
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.init
    ]
    context = example.context
    yes = {True: "yes", False: "no"}
    facts = [
        ("  reads", {None: "all tokens", 0: "no tokens"}.get(context, f"the last {context} tokens")),
        ("  beam search", yes[cls.supports_beam]),
        ("  assisted decoding", yes[cls.supports_assisted]),
        ("  continuous batching", yes[cls.supports_continuous_batching]),
        ("  leaves greedy decoding alone", yes[cls.argmax_invariant]),
        ("  companions", ", ".join(cls.companions) or "none"),
    ]
    print(f"{name} ({cls.paper})\n\n{inspect.getdoc(cls)}\n")
    print(f"Fields\n{table(parameters)}\n\nCapabilities, for the example below\n{table(facts)}\n")
    print(f'Example\n  logitproc generate --prompt "..." --proc {as_flag(spec)}')


def _annotation(kind: Any) -> str:
    return kind if isinstance(kind, str) else re.sub(r"\b(\w+\.)+", "", inspect.formatannotation(kind))


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"default {field.default!r}"
    return "required" if field.default_factory is dataclasses.MISSING else "optional"


def _example_spec(example: "Processor") -> dict[str, Any]:
    """What `example` was made from, as a spec: its name and the parameters that are not the default."""
    spec: dict[str, Any] = {"name": example.name}
    for field in dataclasses.fields(example):  # type: ignore[arg-type]
        value = getattr(example, field.name)
        if field.name in example.artifacts and value is not None:
            spec[field.name] = _bundled_artifact(value.kind)
        elif field.name in example.companions and value is not None:
            spec[field.name] = ["mini"] if isinstance(value, Sequence) else "mini"
        elif field.init and value != field.default:
            spec[field.name] = value
    return spec


def as_flag(spec: dict[str, Any]) -> str:
    """NAME:key=value,... as --proc reads it."""
    import yaml

    flow = lambda value: yaml.safe_dump([value], default_flow_style=True, width=math.inf).strip()[1:-1]
    given = [f"{key}={flow(value)}" for key, value in spec.items() if key != "name"]
    return f"{spec['name']}:{','.join(given)}" if given else spec["name"]


def _bundled_artifact(kind: str) -> str:
    for name, folder in bundled().items():
        document = folder / "artifact.json"
        if document.is_file() and json.loads(document.read_text(encoding="utf-8")).get("kind") == kind:
            return name
    return "FOLDER"
