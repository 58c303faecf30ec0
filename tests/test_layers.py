"""Imports point one way, from what uses to what is used; engines stay at the edge."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import logitproc as lp

PACKAGE = Path(lp.__file__).parent
ROOT = PACKAGE.parent

# Lowest first. A module imports its own layer and those below it, inside functions too.
LAYERS = (
    {"registry", "checks"},
    {"bundled"},
    {"artifact", "counting", "corpus"},
    {"prior", "arpa", "ledger", "companion", "evidence", "processor", "ops", "tilt"},
    {"heads"},
    {"methods"},
    {"chain"},
    {"speculative"},
    {"generation", "metrics", "scoring", "features", "diversity"},
    {"assessment"},
    {"collect"},
    {"engines", "cli"},
    {"examples", "eval"},
)
CHECKS_ITS_CLASS = {("registry", "processor")}  # `register` refuses what is no Processor
ENGINES = {"vllm", "sglang", "tensorrt_llm", "lm_eval"}
FILES = sorted(
    path
    for folder in (PACKAGE, ROOT / "examples", ROOT / "eval")
    for path in folder.rglob("*.py")
    if path != PACKAGE / "__init__.py"  # which names everything, and imports it when asked
)


def module(path: Path) -> str:
    """The entry of LAYERS that a file belongs to."""
    parts = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Dotted names of everything a file imports when it runs, relative ones resolved."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    annotations_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in annotations_only:
            continue
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            source = (*package, *(node.module.split(".") if node.module else ()))
            yield from ((*source, alias.name) for alias in node.names)


def uses(path: Path) -> set[str]:
    """The entries of LAYERS that a file imports."""
    found = {name[1] for name in imports(path) if name[0] == "logitproc" and len(name) > 1}
    own = {name[0] for name in imports(path)} & {"examples", "eval"}
    return (found & {entry.stem for entry in PACKAGE.iterdir()}) | own


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_its_own_layer_and_those_below(path):
    level = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
    assert module(path) in level, f"give {module(path)!r} its place in LAYERS"
    used = {name for name in uses(path) if (module(path), name) not in CHECKS_ITS_CLASS}
    above = {name for name in used if level.get(name, len(LAYERS)) > level[module(path)]}
    assert not above, f"{module(path)} must not import {above}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_engines_know_engines_and_no_method_is_named_outside_its_file(path):
    named = set(imports(path))
    if module(path) not in ("engines", "eval", "examples"):
        assert not {name[0] for name in named} & ENGINES
    if module(path) not in ("methods", "eval", "examples"):
        assert not {name[:3] for name in named if name[:2] == ("logitproc", "methods") and len(name) > 2}


def test_methods_do_not_import_each_other():
    for path in (PACKAGE / "methods").glob("*.py"):
        others = {name[2] for name in imports(path) if name[:2] == ("logitproc", "methods") and len(name) > 2}
        assert not others - {path.stem}, path.name


def test_the_reader_of_imports_sees_all_forms(tmp_path, monkeypatch):
    file = PACKAGE / "methods" / "imagined.py"
    source = (
        "import torch.nn\nfrom ..prior import NGramPrior\nfrom .. import registry\nimport vllm\n"
        "if TYPE_CHECKING:\n    from ..cli import main\ndef f():\n    from logitproc.engines import x\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: source)
    assert uses(file) == {"prior", "registry"} | ({"engines"} & {entry.stem for entry in PACKAGE.iterdir()})
    assert ("vllm",) in set(imports(file))
    assert ("torch", "nn") in set(imports(file))


def test_importing_the_package_imports_no_torch():
    heavy = {"torch", "transformers", "numpy", "datasets"}
    code = f"import sys, logitproc; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
