"""The folder `pocket/`: tiny causal LMs with one tokenizer, and a fitted prior. See its `MODEL_CARD.md`.

They exist so that the first command works offline and so that examples and tests run real text through
real models. `AutoModelForCausalLM.from_pretrained(lp.pocket("base"))` loads one.
"""

import re
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


def find_model(name: str) -> str:
    """A folder of a model or tokenizer, a bundled model by name, or the name of a repository on the hub.

    FileNotFoundError for anything else: a path that does not exist is never looked up on the hub.
    """
    is_model = lambda folder: any((folder / f"{part}config.json").is_file() for part in ("", "tokenizer_"))
    if is_model(Path(name)):
        return name
    if name in bundled():
        return pocket(name)
    if Path(name).exists():
        raise FileNotFoundError(
            f"{name} is no model: it holds neither config.json nor tokenizer_config.json."
        )
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name).parent.exists():
        return name
    known = [key for key, folder in bundled().items() if is_model(folder)]
    raise FileNotFoundError(
        f"There is no folder {name}; bundled models are {', '.join(known) or 'missing'}, and a model on the "
        "hub is written ORG/NAME."
    )
