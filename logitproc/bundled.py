"""The folder `pocket/`: tiny causal LMs with one tokenizer, and a fitted prior. See its `MODEL_CARD.md`.

They exist so that the first command works offline and so that examples and tests run real text through
real models. `AutoModelForCausalLM.from_pretrained(lp.pocket("base"))` loads one.
"""

from pathlib import Path

from .registry import unknown

_FOLDER = Path(__file__).parent / "pocket"


def bundled() -> dict[str, Path]:
    """Name -> folder of everything bundled."""
    return {p.name: p for p in sorted(_FOLDER.iterdir()) if p.is_dir() and not p.name.startswith("_")}


def pocket(name: str) -> str:
    """The folder of a bundled model or artifact. LookupError with the known names otherwise."""
    if name not in bundled():
        raise unknown("bundled model", name, bundled())
    return str(bundled()[name])
