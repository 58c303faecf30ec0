"""Names lead to classes; a method is one file, and a plug-in is one entry point."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import logitproc as lp
from logitproc import registry

ROOT = Path(lp.__file__).parents[1]

METHOD = '''
"""Quieten: halve every score. arXiv:0000.00000."""

from dataclasses import dataclass

from {package}processor import Processor
from {package}registry import register


@register("{name}", paper="arXiv:0000.00000")
@dataclass(eq=False)
class QuietenLogitsProcessor(Processor):
    """Divide every score by a temperature.

    scores [rows, width] -> scores / temperature [rows, width]. Source: this module.

    Example:
        >>> QuietenLogitsProcessor(2.0)
    """

    temperature: float = 2.0
    argmax_invariant = True
    supports_continuous_batching = True

    @classmethod
    def example(cls, width):
        return cls()

    @classmethod
    def neutral(cls, width):
        return cls(temperature=1.0)

    def step(self, tokens, scores):
        return scores / self.temperature
'''


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[lp.Processor]]:
    """A registry of its own for each test, in which the built-in methods are loaded."""
    for name in lp.names():
        lp.get(name)
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    return registry._classes


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a package that offers a method as `name`; its module registers it as `says`."""
    packages = []

    def install(package: str, name: str, says: str | None = None) -> None:
        packages.append(package)
        source = METHOD.format(name=says or name, package="logitproc.")
        (tmp_path / f"{package}.py").write_text(source)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        point = f"{name} = {package}:QuietenLogitsProcessor"
        (info / "entry_points.txt").write_text(f"[logitproc.methods]\n{point}\n")

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    for package in packages:
        sys.modules.pop(package, None)


class Toy(lp.Processor):
    """Does nothing."""


def test_a_wrong_name_is_answered_with_near_names_and_all_names():
    with pytest.raises(LookupError, match=r"Unknown method 'ngramm'\. Did you mean 'ngram'\? Known: .*ngram"):
        lp.get("ngramm")
    with pytest.raises(LookupError, match=r"Unknown method 'zzz'\. Known: "):
        lp.get("zzz")


def test_every_name_leads_to_a_class_that_knows_its_name():
    assert "ngram" in lp.names()
    for name in lp.names():
        assert lp.get(name).name == name


def test_a_registered_class_is_found_and_described():
    cls = lp.register("toy", paper="arXiv:0000.00000")(Toy)
    assert lp.get("toy") is cls
    assert "toy" in lp.names()
    entry = next(entry for entry in registry.entries() if entry.name == "toy")
    assert entry == ("toy", "Does nothing.", "arXiv:0000.00000", f"{__name__}.Toy")


def test_two_classes_may_not_share_a_name():
    class Other(lp.Processor):
        pass

    lp.register("toy", paper="arXiv:0000.00000")(Toy)
    with pytest.raises(ValueError, match=r"Two methods are named 'toy': .*Toy and .*Other"):
        lp.register("toy", paper="arXiv:0000.00000")(Other)
    assert lp.get("toy") is Toy


def test_a_class_defined_again_takes_its_own_place():
    # A notebook cell that runs twice, or importlib.reload.
    again = type("Toy", (lp.Processor,), {"__module__": __name__})
    for cls in (Toy, again):
        lp.register("toy", paper="arXiv:0000.00000")(cls)
    assert lp.get("toy") is again


def test_the_name_of_a_file_in_methods_is_taken_before_it_is_imported(registered):
    del registered["ngram"]
    with pytest.raises(ValueError, match=r"'ngram': logitproc\.methods\.ngram and .*Toy"):
        lp.register("ngram", paper="arXiv:0000.00000")(Toy)


def test_a_method_must_be_a_processor_and_cite_a_paper():
    for wrong in (object, lambda ids, scores: scores):
        with pytest.raises(TypeError, match="needs a subclass of logitproc.Processor"):
            lp.register("toy", paper="arXiv:0000.00000")(wrong)
    with pytest.raises(ValueError, match="needs the paper"):
        lp.register("toy", paper="")(Toy)


def test_a_file_in_methods_registers_its_own_name():
    cls = type("Toy", (lp.Processor,), {"__module__": "logitproc.methods.louder"})
    with pytest.raises(ValueError, match=r"methods/louder\.py registers 'quieter'"):
        lp.register("quieter", paper="arXiv:0000.00000")(cls)


def test_an_unregistered_subclass_never_passes_for_its_parent():
    lp.register("toy", paper="arXiv:0000.00000")(Toy)
    assert type("Child", (Toy,), {}).name == "Child"


def test_a_plug_in_is_listed_without_being_imported_and_loaded_when_asked_for(plugin):
    plugin("quiet_package", "quieten")
    assert "quieten" in lp.names()
    entry = next(entry for entry in registry.entries() if entry.name == "quieten")
    assert "quiet_package" in entry.summary and "quiet_package:" in entry.origin
    assert "quiet_package" not in sys.modules
    assert lp.get("quieten").__module__ == "quiet_package"
    assert lp.Chain.from_spec([{"name": "quieten", "temperature": 3.0}]).processors[0].temperature == 3.0


def test_two_plug_ins_of_one_name_and_one_named_like_a_file_are_refused(plugin, registered):
    plugin("quiet_one", "quieten")
    plugin("quiet_two", "quieten")
    with pytest.raises(ValueError, match=r"'quieten': quiet_one:\w+ and quiet_two:\w+"):
        lp.get("quieten")
    del registered["ngram"]
    plugin("quiet_three", "ngram")
    with pytest.raises(ValueError, match=r"'ngram': logitproc\.methods\.ngram and quiet_three:\w+"):
        lp.get("ngram")


def test_a_plug_in_that_registers_another_name_is_refused(plugin):
    plugin("quiet_package", "quieten", says="hush")
    with pytest.raises(LookupError, match="'quieten' registers no method of that name"):
        lp.get("quieten")


def test_listing_methods_imports_no_torch():
    code = """
        import sys, logitproc.registry as registry
        assert 'ngram' in registry.names()
        assert next(e for e in registry.entries() if e.name == 'ngram').paper == 'arXiv:2601.16224'
        assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)
    """
    _python("-c", re.sub(r"(?m)^ +", "", code), at=ROOT)


@pytest.fixture(scope="module")
def dropped_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with one more file in `methods/`, and nothing else edited."""
    root = tmp_path_factory.mktemp("checkout")
    bundled = str(ROOT / "logitproc" / "pocket")
    skip = lambda folder, names: names if folder == bundled else {"__pycache__"} & set(names)
    shutil.copytree(ROOT / "logitproc", root / "logitproc", ignore=skip)
    (root / "tests").mkdir()
    for file in ("setup.cfg", "tests/conftest.py", "tests/elsewhere.py", "tests/test_contract.py"):
        shutil.copy(ROOT / file, root / file)
    source = METHOD.format(name="quieten", package="..")
    (root / "logitproc" / "methods" / "quieten.py").write_text(source.lstrip())
    return root


def test_a_file_dropped_into_methods_is_listed_described_and_generates(dropped_in):
    code = """
        import sys, logitproc as lp
        from logitproc import cli, registry
        assert 'quieten' in lp.names()
        entry = next(e for e in registry.entries() if e.name == 'quieten')
        assert entry[1:3] == ('Divide every score by a temperature.', 'arXiv:0000.00000')
        assert cli.main(['list']) == 0 and 'torch' not in sys.modules
        assert lp.get('quieten')(temperature=3.0).temperature == 3.0
        assert cli.main(['describe', 'quieten']) == 0
        generate = ['generate', '--prompt', 'The road', '--model', {mini!r}, '--max-new-tokens', '3']
        assert cli.main([*generate, '--proc', 'quieten:temperature=3.0', '--json']) == 0
    """.format(mini=lp.pocket("mini"))
    out = _python("-c", re.sub(r"(?m)^ +", "", code), at=dropped_in)
    listed = next(line for line in out.splitlines() if line.startswith("quieten"))
    assert "arXiv:0000.00000" in listed and "Divide every score" in listed
    described = out[out.index("quieten (arXiv:0000.00000)") :]
    assert "temperature" in described and "--proc quieten" in described
    assert json.loads(out.splitlines()[-1])["chain"] == [{"name": "quieten", "temperature": 3.0}]


def test_the_command_line_runs_as_a_module(dropped_in):
    assert "quieten" in _python("-m", "logitproc.cli", "list", at=dropped_in)


def test_a_file_dropped_into_methods_is_under_contract(dropped_in):
    options = ("-k", "quieten", "-q", "-p", "no:cacheprovider")
    out = _python("-m", "pytest", "tests/test_contract.py", *options, at=dropped_in)
    assert int(re.search(r"(\d+) passed", out)[1]) > 20
    assert "failed" not in out


def _python(*arguments: str, at: Path) -> str:
    """Standard output of a Python process that finds the package of the folder `at` first."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=at, env={**os.environ, "PYTHONPATH": str(at)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
